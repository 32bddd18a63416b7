"""The models of coverage.py in torch-pruning's dependency graph and in rebasin: docs/coverage_peers.json, and from
there a section of docs/COVERAGE.md.

Both are used through what they export, in an environment of their own (pip install torch-pruning==1.6.1
rebasin==0.0.47 torchview graphviz, beside torch, fxzip and the libraries of the suites). Small models come first, in
one order over all suites; docs/coverage.json says how large each is. A model with more parameters than
`--parameters`, or without a number there, is left out, and so is what `--budget` leaves no time for: `tried` counts.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from coverage import CACHE as OURS
from coverage import ROOT
from coverage_model import TimeUp, apart, jitter
from coverage_table import SUITES, write
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

TOLERANCE = 1e-9  # relative, in float64; heads mixed up under weights as they are drawn may move outputs by 1e-7 only
NONE = {"tried": 0, "analysed": 0, "late": 0, "passed": 0}
CACHE = OURS.with_name("coverage_peers.jsonl")
HOW = """Made by `python benchmarks/coverage_peers.py`. The test is the first part of fxzip's proof: what the tool says
may be permuted is permuted, and the output in float64, with perturbed parameters, must stay to {tolerance:.0e}.
torch-pruning: every group of coupled channels that some layer reads is permuted at random (num_heads not given; of an
output object it is shown the tensors that fxzip looks at).
rebasin: a model with other random weights is aligned to the model, which permutes it; batch norms take the statistics
of the batch, as its documents want running ones recomputed. *analysed*: no error in {limit} s of processor time and
{memory} GiB, and something was permuted. *pass*: besides, the output moves where every second of the permuted tensors
is left as it was. *out of time*: of those not analysed, where these seconds were up. Tried so far: the smallest of
every suite, up to {parameters:.1f} million parameters; no whole detectors. fxzip (up to a minute for analysis and
proof): the same models in the tables below; *pass* is *sound* there."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="torchvision,timm,transformers,toys")
    parser.add_argument("--only", default="*", metavar="GLOB")
    parser.add_argument("--limit", type=int, default=30, help="seconds of processor time per model and tool (30)")
    parser.add_argument("--memory", type=int, default=6, help="GiB per model and tool (6)")
    parser.add_argument("--parameters", type=float, default=30, help="millions that a model may have (30)")
    parser.add_argument("--budget", type=float, default=float("inf"), help="start no model after so many seconds")
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args(argv)
    known = [json.loads(line) for line in args.cache.read_text().splitlines()] if args.cache.is_file() else []
    done, start = {(r["tool"], r["suite"], r["name"]) for r in known}, time.monotonic()
    args.cache.parent.mkdir(parents=True, exist_ok=True)
    for suite, name in chosen(args):
        for tool in TOOLS if time.monotonic() - start < args.budget else ():
            if (tool, suite, name) in done:
                continue
            found = apart(args.limit, lambda t=tool, s=suite, n=name: measure(t, s, n), args.memory)
            answer = found if isinstance(found, dict) else {"refused": "the process ended"}
            known.append({"tool": tool, "suite": suite, "name": name, **answer})
            with args.cache.open("a") as file:
                file.write(json.dumps(known[-1]) + "\n")
            print(known[-1], flush=True)
    publish(known, args)
    return 0


def sizes() -> dict[tuple[str, str], float]:
    """(suite, name) -> parameters, of every model in the table."""
    table = json.loads((ROOT / "docs" / "coverage.json").read_text())
    return {(r["suite"], r["name"]): r.get("parameters", float("inf")) for r in table}


def chosen(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(suite, name) of the models to try, small ones first."""
    size = sizes()
    mine = (k for k in size if k[0] in args.suite.split(",") and fnmatch(k[1], args.only))
    small = (k for k in mine if size[k] <= args.parameters * 1e6 and not k[1].endswith(".whole"))
    return sorted(small, key=lambda k: (size[k], k))


def publish(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Counts per tool and suite, and all rows; and the page that shows the counts."""
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for row in sorted(rows, key=lambda r: (list(TOOLS).index(r["tool"]), SUITES.index(r["suite"]), r["name"])):
        count = counts.setdefault(row["tool"], {}).setdefault(row["suite"], dict(NONE))
        moved = row.get("moved", 0) > 0
        count["late"] += row.get("refused", "").startswith("TimeUp")
        count["tried"] += 1
        count["analysed"] += moved
        count["passed"] += moved and row["error"] < TOLERANCE < row["control"]
    table = json.loads((ROOT / "docs" / "coverage.json").read_text())
    for row in (r for r in table if (r["suite"], r["name"]) in {(p["suite"], p["name"]) for p in rows}):
        count = counts.setdefault("fxzip", {}).setdefault(row["suite"], dict(NONE))
        count["tried"] += 1
        count["analysed"] += row.get("free", 0) > 0
        count["passed"] += row.get("sound") is True
    versions = {tool: version(tool) for tool in counts}
    size = sizes()
    largest = max((size[r["suite"], r["name"]] for r in rows), default=0) / 1e6
    how = HOW.format(tolerance=TOLERANCE, limit=args.limit, memory=args.memory, parameters=largest)
    found = {"how": how, "versions": versions, "counts": counts, "rows": rows}
    (ROOT / "docs" / "coverage_peers.json").write_text(json.dumps(found, indent=1) + "\n")
    write({f"{r['suite']}:{r['name']}": r for r in table}, ROOT / "docs")
    print(json.dumps(counts, indent=1))


def measure(tool: str, suite: str, name: str) -> dict[str, Any]:
    """moved: tensors that were permuted; error: change of the output, relative to its largest entry; control: its
    change where every second of them is left as it was."""
    from zoo_others import SUITES as MODELS

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, batch = MODELS[suite]()[name]()
    model = model.eval().double()
    jitter(model)
    x = batch(2)
    x = {k: _double(v) for k, v in x.items()} if isinstance(x, dict) else _double(x)
    with torch.no_grad():
        try:
            mine, before, after = TOOLS[tool](model, x)
        except (Exception, TimeUp) as error:
            return {"refused": f"{type(error).__name__}: {error}"[:200]}
        moved = [n for n in before if not torch.equal(before[n], after[n])]
        wanted, half = _outputs(mine, x, before), {n: before[n] for n in moved[::2]}
        error, control = (_far(wanted, _outputs(mine, x, state)) for state in (after, {**after, **half}))
    return {"moved": len(moved), "tensors": len(before), "error": error, "control": control}


def _far(wanted: list[torch.Tensor], given: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in zip(wanted, given, strict=True))


State = dict[str, torch.Tensor]


def _double(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(_double(y) for y in x)
    return x.double() if x.is_floating_point() else x


def _outputs(model: nn.Module, x: Any, state: State) -> list[torch.Tensor]:
    from fxzip.trace import counted, tensors_of

    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensor.copy_(state[name])
    with _InDouble():
        out = model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x)
    return [t for t in tensors_of(counted(out)) if t.is_floating_point()]


class _InDouble(TorchFunctionMode):
    """float64 also where the code of a model asks for float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*tree_map(_wide, args), **tree_map(_wide, kwargs or {}))


def _wide(x: Any) -> Any:
    return torch.float64 if x is torch.float32 else x


def _state(model: nn.Module) -> State:
    return {n: p.detach().clone() for n, p in (*model.named_parameters(), *model.named_buffers())}


def torch_pruning(model: nn.Module, x: Any) -> tuple[nn.Module, State, State]:
    import torch_pruning as tp  # type: ignore[import-not-found]

    from fxzip.trace import counted, tensors_of

    before = _state(model)
    with torch.enable_grad():
        graph = tp.DependencyGraph().build_dependency(
            model, example_inputs=x, output_transform=lambda out: tensors_of(counted(out))
        )
    for group in list(graph.get_all_groups()):
        if all(graph.is_out_channel_pruning_fn(item.dep.handler) for item in group):
            continue  # nothing reads these channels: they are the output, which users of the tool name themselves
        root, prune = group[0].dep.target.module, group[0].dep.handler
        count = len(group[0].idxs)
        order = torch.randperm(count).tolist()
        plain = graph.get_pruning_group(root, prune, idxs=list(range(count)))
        mixed = graph.get_pruning_group(root, prune, idxs=order)
        for a, b in zip(plain, mixed, strict=True):
            _permute(graph, a.dep, [int(i) for i in a.idxs], [int(i) for i in b.idxs])
    return model, before, _state(model)


def _permute(graph: Any, dep: Any, old: list[int], new: list[int]) -> None:
    module, out = dep.target.module, graph.is_out_channel_pruning_fn(dep.handler)
    if isinstance(module, nn.Parameter):
        tensors = [(module, dep.target.pruning_dim)]
    else:
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        tensors = []
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.dim() == 1 and (out or not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))):
                tensors.append((tensor, 0))
            elif tensor.dim() > 1:
                rows = out != (transposed or isinstance(module, nn.Embedding))
                tensors.append((tensor, 0 if rows or tensor.shape[1] == 1 else 1))
    for tensor, axis in tensors:
        index = torch.arange(tensor.shape[axis])
        if max(old) >= len(index):
            continue  # channels that the axis does not have: inputs of a grouped convolution
        index[old] = torch.tensor(new)
        tensor.copy_(tensor.index_select(axis, index))


def rebasin(model: nn.Module, x: Any) -> tuple[nn.Module, State, State]:
    from rebasin import PermutationCoordinateDescent  # type: ignore[import-not-found]

    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean = module.running_var = None  # type: ignore[assignment]
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.copy_(parameter.mean() + parameter.std().nan_to_num() * torch.randn_like(parameter))
    before = _state(other)
    descent = PermutationCoordinateDescent(model, other, x)
    descent.rebasin()
    return other, before, _state(other)


TOOLS = {"torch-pruning": torch_pruning, "rebasin": rebasin}

if __name__ == "__main__":
    sys.exit(main())
