"""Merges of big shapes under a cap: what every stage holds and costs, beside the cap.

    OMP_NUM_THREADS=1 python benchmarks/big.py --only vit_large_patch16_224 --memory 1GB
    OMP_NUM_THREADS=1 python benchmarks/big.py --only resnet18 --memory none 400MB --check

Two networks with random weights, random inputs: neither changes the work, and the merge is worth nothing. The weights
lie in safetensors files, as large checkpoints do, and are read from there as they are used. Each merge is a process of
its own. Memory is what /proc/self/status says, every 5 ms: "private" (RssAnon) has to be in memory, "mapped" (RssFile)
are pages of files, temporary ones too, that the system takes back when it needs room. Both are counted from when models
and inputs are there. Linux only. --check compares the results of all caps, bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import machine
from safetensors.torch import save_file
from torch import Tensor, nn

import fxzip
from fxzip import passes
from fxzip.allocator import trim
from fxzip.files.checkpoint import load_weights, read_checkpoint
from fxzip.match import resolve
from fxzip.measure.moments import SpaceMoments
from fxzip.memory import parsed, shown
from fxzip.merge import choose

HERE = Path(__file__).resolve()


def timm_net(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, **options)

    return make


def llama(layers: int, dtype: torch.dtype) -> Callable[[], nn.Module]:
    """1.1 billion parameters with 22 layers: hidden 2048, 32 heads, 4 of keys, 5632 in the MLP, 32,000 tokens."""

    def make() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32,
            num_key_value_heads=4, vocab_size=32_000, use_cache=False,
        )  # fmt: skip
        return nn.Module.to(LlamaForCausalLM(config), dtype)

    return make


def images(size: int) -> Callable[[int], Any]:
    return lambda count: torch.randn(count, 3, size, size)


def tokens(count: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 32_000, (count, 64))}


SHAPES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "resnet18": (timm_net("resnet18"), images(128)),
    "vit_small_patch16_224": (timm_net("vit_small_patch16_224"), images(224)),
    "resnet152": (timm_net("resnet152"), images(224)),
    "vit_large_patch16_224": (timm_net("vit_large_patch16_224"), images(224)),
    "vit_large_2_blocks": (timm_net("vit_large_patch16_224", depth=2), images(224)),
    "convnext_xlarge": (timm_net("convnext_xlarge"), images(224)),
    "llama_2_layers": (llama(2, torch.bfloat16), tokens),
    "llama_1b": (llama(22, torch.bfloat16), tokens),
}


class Watch:
    """Private and mapped bytes of this process, their peaks by stage."""

    def __init__(self) -> None:
        self.stage, self.over = "", False
        self.base = self.now()
        self.peaks: dict[str, tuple[int, int]] = {}
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    @staticmethod
    def now() -> tuple[int, int]:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        private, mapped = (1024 * int(lines[k].split()[0]) for k in ("RssAnon", "RssFile"))
        return private, mapped

    def _run(self) -> None:
        while not self.over:
            self.look()
            time.sleep(0.005)

    def look(self) -> None:
        found, known = self.now(), self.peaks.get(self.stage, (0, 0))
        self.peaks[self.stage] = max(known[0], found[0] - self.base[0]), max(known[1], found[1] - self.base[1])

    @contextmanager
    def on(self, stage: str) -> Iterator[None]:
        self.stage = stage
        self.look()
        yield
        self.look()
        self.stage = ""


def from_file(make: Callable[[], nn.Module], seed: int, folder: Path) -> nn.Module:
    """A network whose weights are in a file there; nothing of it is in memory yet."""
    torch.manual_seed(seed)
    path, model = folder / f"{seed}.safetensors", make().eval()
    save_file(model.state_dict(), path)
    load_weights(model, read_checkpoint(path))
    trim()
    return model


def merge(
    name: str, method: str, memory: str | None, samples: int, batch: int, verify: bool, until: str | None
) -> dict[str, Any]:
    """One merge, stage by stage, as `fxzip.merge` does it."""
    make, draw = SHAPES[name]
    folder = tempfile.TemporaryDirectory()
    models = [from_file(make, seed, Path(folder.name)) for seed in range(2)]
    torch.manual_seed(9)
    loader = [draw(batch) for _ in range(samples // batch)]
    watch, rows = Watch(), []

    def measured(stage: str, run: Callable[[], Any]) -> Any:
        start = time.process_time()
        with watch.on(stage):
            found = run()
        rows.append([stage, time.process_time() - start, *watch.peaks[stage], watch.now()[0] - watch.base[0]])
        return found

    repair, solver, matcher = choose(method, None, models, wrong := [])
    assert not wrong and repair is None, wrong or "big.py: no repair"
    graph = measured("Trace", lambda: passes.start(models, loader, progress=False, copies=False))
    stages = [passes.Infer(), passes.Cut(until), *([passes.Prove()] if verify else []), passes.Read()]
    stages += [passes.Cap(memory or "1000TB", matcher, solver), passes.Measure(), passes.Match(matcher)]
    stages += [passes.Average(), *([passes.Solve(solver)] if solver else []), passes.Build(), passes.Calibrate()]
    stages += [passes.Describe()]
    plan: Any = None
    for stage in stages:
        graph = measured(type(stage).__name__, lambda stage=stage, g=graph: stage(g).graph_module)
        if type(stage).__name__ == "Cap":
            plan = passes.job(graph).plan
    watch.over = True
    found = hashlib.sha256()
    for key, tensor in graph.state_dict().items():
        found.update(key.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    result = sum(t.numel() * t.element_size() for t in (*graph.parameters(), *graph.buffers()))
    return {
        "name": name + (f" until {until}" if until else ""), "method": method, "memory": memory, "rows": rows,
        "plan": str(plan), "passes": len(plan.passes),
        "parameters": sum(p.numel() for p in models[0].parameters()), "models": plan.models, "inputs": plan.inputs,
        "result": result, "cap": parsed(memory), "sha256": found.hexdigest(), "base": watch.base[0],
    }  # fmt: skip


def copies(method: str, n: int) -> str:
    """What matching two models' n features takes, in units of their second moments: `planning._COPIES`."""
    torch.manual_seed(0)
    rows = torch.randn(3000, n, dtype=torch.float64)
    rows = torch.cat([rows, 0.7 * rows[:, torch.randperm(n)] + 0.7 * torch.randn(3000, n)], 1)
    moments = SpaceMoments((n, n), 3000.0, rows.mean(0), rows.T @ rows / 3000)
    del rows
    watch, start = Watch(), time.process_time()
    with watch.on(method):
        resolve(method)(moments, n)
    watch.over = True
    return f"{method}, n = {n}: {watch.peaks[method][0] / (32 * n * n):.2f}, CPU {time.process_time() - start:.1f} s"


def text(found: Mapping[str, Any]) -> str:
    counted = [r for r in found["rows"] if r[0] in ("Measure", "Match", "Average", "Solve")]
    before = next(r[4] for r in found["rows"] if r[0] == "Read")  # the traced copies of the models, libraries
    beyond = max(r[2] - before - (found["result"] if r[0] in ("Average", "Solve") else 0) for r in counted)
    cap = "no cap" if found["cap"] is None else f"cap {shown(found['cap'])}"
    lines = [
        f"### {found['name']}, {found['method']}, {cap}",
        "",
        f"{found['parameters'] / 1e6:,.0f} million parameters; models {shown(found['models'])}, result"
        f" {shown(found['result'])}, inputs {shown(found['inputs'])}; {found['passes']} passes",
        "",
        "| stage | CPU s | private, at most | private, afterwards | mapped, at most |",
        "| :-- | --: | --: | --: | --: |",
        *(f"| {s} | {c:.1f} | {p / 1e6:,.0f} MB | {h / 1e6:,.0f} MB | {m / 1e6:,.0f} MB |"
          for s, c, p, m, h in found["rows"]),
        f"| **Measure to Solve, beyond Read's and the result** | | **{beyond / 1e6:,.0f} MB** | | |",
        "",
        f"At most {(found['base'] + max(r[2] for r in found['rows'])) / 1e9:.1f} GB of private memory in all, libraries"
        f" and the result among them; {sum(r[1] for r in found['rows']):,.0f} s of CPU.",
    ]
    return "\n".join([*lines, "", "```", found["plan"], "```", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["resnet18"], choices=list(SHAPES))
    parser.add_argument("--method", default="zip")
    parser.add_argument("--memory", nargs="+", default=["1GB"], help="caps, one after the other; none: no cap")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--until", help="first module that stays per model")
    parser.add_argument("--verify", action="store_true", help="with the proof, which no cap is for")
    parser.add_argument("--check", action="store_true", help="all caps have to make the same network")
    parser.add_argument("--copies", type=int, metavar="N", help="only what --method takes for N features")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.copies:
        return print(copies(args.method, args.copies))
    if args.child:
        warnings.simplefilter("ignore", fxzip.MergeWarning)
        cap = None if args.memory[0] == "none" else args.memory[0]
        found = merge(args.only[0], args.method, cap, args.samples, args.batch, args.verify, args.until)
        Path(args.child).write_text(json.dumps(found))
        return
    for name in args.only:
        hashes = {}
        for cap in args.memory:
            with tempfile.TemporaryDirectory() as folder:
                out = os.path.join(folder, "found.json")
                subprocess.run([sys.executable, str(HERE), *_again(args, name, cap), "--child", out], check=True)
                found = json.loads(Path(out).read_text())
            print(text(found), flush=True)
            hashes[cap] = found["sha256"]
        if args.check:
            assert len(set(hashes.values())) == 1, f"{name}: the caps make different networks: {hashes}"
            print(f"{name}: {' and '.join(hashes)} make the same network, bit for bit\n", flush=True)
    print(machine(argparse.Namespace(seed=0), batch=args.batch, samples=args.samples))


def _again(args: argparse.Namespace, name: str, cap: str) -> list[str]:
    given = ["--only", name, "--method", args.method, "--memory", cap, "--samples", str(args.samples)]
    return [*given, "--batch", str(args.batch), *(["--verify"] if args.verify else []),
            *(["--until", args.until] if args.until else [])]  # fmt: skip


if __name__ == "__main__":
    main()
