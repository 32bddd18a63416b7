"""What every benchmark shares: options, merging and scoring, the table."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from data import CACHE, Data
from torch import Tensor, nn
from tqdm import tqdm

import fxzip
from fxzip.comparable import compare_heads
from fxzip.evaluate import Ensemble
from fxzip.rewrite import Comparable


def mirrored(images: Tensor) -> Tensor:
    return images.flip(-1)


MANY = fxzip.Distill(views=[mirrored], precision="bfloat16", solve_samples=4_096)  # of many images
OUTPUTS = replace(MANY, features=0.1, epochs=11, rate=0.05, damping=0.01)
METHODS: dict[str, dict[str, Any]] = {
    "average": {"method": "average"},
    "permute": {"method": "permute"},
    "zip": {"method": fxzip.Zip(alpha=0.3, beta=0.125)},
    "zip-beta1": {"method": fxzip.Zip(alpha=0.3, beta=1.0)},
    "select": {"method": "select"},
    "permute+repair": {"method": "permute+repair"},
    "zip-beta1+repair": {"method": fxzip.Repair(fxzip.Zip(alpha=0.3, beta=1.0))},
    "pair": {"method": "pair"},
    "transport": {"method": "transport"},
    "cca": {"method": "cca"},
    "rebasin": {"method": "rebasin"},
    "rebasin-order": {"method": fxzip.Rebasin(start="order")},
    "c2m3": {"method": "c2m3"},
    "mudsc-permute": {"method": fxzip.MuDSC(matcher=fxzip.Permute())},
    "mudsc": {"method": "mudsc"},
    "mudsc-0.7": {"method": fxzip.MuDSC(balance=0.7)},
    "mudsc-0.3": {"method": fxzip.MuDSC(balance=0.3)},
    "mudsc-0": {"method": fxzip.MuDSC(balance=0.0)},
    "solve": {"method": "solve"},
    "solve-select": {"method": fxzip.Solve(matcher=fxzip.Select())},
    "solve-select-1.33x": {"method": fxzip.Solve(matcher=fxzip.Select()), "budget": 1.33},
    "solve-alpha1": {"method": fxzip.Solve(matcher=fxzip.Zip(alpha=1.0, beta=1.0))},
    "solve-pair": {"method": fxzip.Solve(matcher=fxzip.Pair())},
    "unmerge": {"method": fxzip.Unmerge()},
    "solve-1.15x": {"method": "solve", "budget": 1.15},
    "solve-1.33x": {"method": "solve", "budget": 1.33},
    "distill": {"method": "solve+distill"},
    "distill-1.15x": {"method": "solve+distill", "budget": 1.15},
    "distill-1.33x": {"method": "solve+distill", "budget": 1.33},
    "distill-mirror": {"method": fxzip.Distill(views=[mirrored])},
    "distill-mirror-bf16": {"method": fxzip.Distill(views=[mirrored], precision="bfloat16")},
    "distill-mirror-many": {"method": MANY},
    "distill-mirror-outputs": {"method": replace(MANY, features=1.0, epochs=8, rate=0.1)},
    "distill-mirror-1.33x": {"method": fxzip.Distill(views=[mirrored]), "budget": 1.33},
    "distill-mirror-outputs-1.33x": {"method": OUTPUTS, "budget": 1.33},
}
TIMED, COMPARED = 4_096, 16_384  # images, at most, of a timed forward, and to make heads comparable on


@dataclass(frozen=True)
class Row:
    """One network of a table; None where it does not apply.

    flops: times one parent's. seconds: to train or to merge.
    forwards: the merge's seconds, in units of one forward of all parents over its calibration images: the mean of one
        right before the merge and one right after.
    compared: joint, with heads made comparable on the calibration images, as heads="joint" does.
    """

    name: str
    per_task: tuple[float | None, ...]
    mean: float | None
    joint: float | None
    parameters: int | None = None
    flops: float | None = None
    seconds: float | None = None
    forwards: float | None = None
    published: str = ""
    note: str = ""
    compared: float | None = None


@dataclass(frozen=True)
class Bench:
    """The parents, what to score on (float32 images), and what to calibrate on."""

    parents: Sequence[nn.Module]
    class_lists: Sequence[Sequence[int]]
    images: Tensor
    labels: Tensor
    calibration: Tensor
    seed: int

    @classmethod
    def of(
        cls, parents: Sequence[nn.Module], class_lists: Sequence[Sequence[int]], data: Data, count: int, seed: int
    ) -> Bench:  # fmt: skip
        """On all test images of `data`, with `count` of its calibration images."""
        images, labels = data.test
        return cls(parents, class_lists, data.normalise(images), labels, data.calibration(count, seed), seed)

    def parent_rows(self, seconds: Sequence[float | None], names: Sequence[str]) -> list[Row]:
        """Every parent on its own task, then all of them as an ensemble."""
        rows = []
        for i, (model, classes) in enumerate(zip(self.parents, self.class_lists, strict=True)):
            own = torch.isin(self.labels, torch.tensor(classes))
            score = fxzip.accuracy(lambda x, m=model: (m(x),), [classes], self.images[own], self.labels[own])
            per_task = tuple(score.mean if i == j else None for j in range(len(self.parents)))
            size = fxzip.cost(model, self.images[:1]).parameters
            rows.append(Row(names[i], per_task, None, None, size, 1.0, seconds[i]))
        return [*rows, self.row("ensemble", Ensemble(list(self.parents)).eval())]

    def row(self, name: str, model: nn.Module, **more: Any) -> Row:
        """Accuracy and cost of a network with one output per task."""
        logits = _logits(model, self.images)
        compared = comparable(_logits(model, self.calibration[:COMPARED]), logits)
        score, joint = self._score(logits), self._score(compared).joint
        size, one = fxzip.cost(model, self.images[:1]), fxzip.cost(self.parents[0], self.images[:1])
        flops = size.flops / one.flops
        return Row(name, score.per_task, score.mean, score.joint, size.parameters, flops, compared=joint, **more)

    def _score(self, logits: Sequence[Tensor]) -> fxzip.Accuracy:
        """logits: of every head, [test images, classes]."""
        order = torch.arange(len(self.labels))
        return fxzip.accuracy(lambda k: tuple(h[k] for h in logits), self.class_lists, order, self.labels)

    def merged(self, name: str, method: str, count: int, cut: Mapping[str, str] | None = None, **more: Any) -> Row:
        """Merge as METHODS[method] says on the first `count` calibration images, and score. cut: `until`, `since`.

        A refusal by fxzip becomes a row that says why; any other error is a bug and ends the run.
        """
        loader = self.calibration[:count].split(256)
        forwards = [self.forward_seconds(count)]
        start = time.perf_counter()
        try:
            zipped = fxzip.merge(self.parents, loader, calibration=count, seed=self.seed,
                                 progress=False, **METHODS[method], **(cut or {}))  # fmt: skip
        except fxzip.FxzipError as error:
            nothing = (None,) * len(self.parents)
            return Row(name, nothing, None, None, note=f"{type(error).__name__}: {error}", **more)
        seconds = time.perf_counter() - start
        forwards.append(self.forward_seconds(count))
        return self.row(name, zipped, seconds=seconds, forwards=2 * seconds / sum(forwards), **more)

    @torch.no_grad()
    def forward_seconds(self, count: int) -> float:
        """Seconds that all parents need for the first `count` calibration images, in batches as merges get them; of
        many, from as many as say it."""
        timed, start = min(count, TIMED), time.perf_counter()
        for model in self.parents:
            for x in self.calibration[:timed].split(256):
                model(x)
        return (time.perf_counter() - start) * count / timed


@torch.no_grad()
def _logits(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Of every head, [n, classes]."""
    return [torch.cat(head) for head in zip(*(network(x) for x in images.split(250)), strict=True)]


class Mirrored(nn.Module):
    """The mean of what a network gives for an image and for its mirror image."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple((a + b) / 2 for a, b in zip(self.network(x), self.network(mirrored(x)), strict=True))


class _Heads(nn.ModuleList):
    def forward(self, *logits: Tensor) -> list[Tensor]:
        return [head(x) for head, x in zip(self, logits, strict=True)]


@torch.no_grad()
def comparable(calibration: Sequence[Tensor], logits: Sequence[Tensor]) -> list[Tensor]:
    """`logits` of every head as heads="joint" would give them, after the same network's on its calibration images."""
    heads = _Heads(Comparable.like(x) for x in calibration)
    compare_heads(heads, [tuple(calibration)])
    return heads(*logits)


def options(doc: str | None, methods: bool = False) -> argparse.ArgumentParser:
    """The options every benchmark has; `methods`: also --methods, of those whose rows are METHODS."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", metavar="DIR", help="image sets, see data.py; without it, torchvision downloads")
    p.add_argument("--test", type=int, metavar="N", help="score on N test images instead of all")
    p.add_argument("--train", type=int, metavar="N", help="train every parent on at most N images")
    p.add_argument("--epochs", type=int, help="epochs for every parent")
    p.add_argument("--calibration", type=int, metavar="N", help="images that merging sees, for every method")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, help="CPU threads (default: torch's, which follow OMP_NUM_THREADS)")
    p.add_argument("--cache", metavar="DIR", default=str(CACHE), help="trained parents are kept here")
    p.add_argument("--out", metavar="FILE", help="also write the rows as JSON")
    if methods:
        p.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    return p


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def markdown(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    """The table; the columns of compared heads and of published figures only where there are any."""
    published, compared = any(r.published for r in rows), any(r.compared is not None for r in rows)
    header = ["network", *tasks, "mean", "joint", *(["compared"] if compared else [])]
    header += ["parameters", "FLOPs", "seconds", "forwards"]
    header += ["published (mean / joint)"] if published else []
    lines = [header, [":--", *["--:"] * (len(header) - 1)]]
    for r in rows:
        scores = (*r.per_task, r.mean, r.joint, *([r.compared] if compared else []))
        cells = [*map(number, scores), f"{r.parameters:,}" if r.parameters else "-"]
        cells += ["-" if r.flops is None else f"{r.flops:.2f}x", number(r.seconds), number(r.forwards)]
        lines.append([r.name, *cells, *([r.published or "-"] if published else [])])
    notes = [f"\n{r.name}: {r.note}" for r in rows if r.note]
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + notes)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def machine(args: argparse.Namespace, **more: Any) -> str:
    """What one needs to know to repeat and to judge the numbers."""
    facts = {"seed": args.seed, **more}
    threads = torch.get_num_threads()
    unit = 2**30 if platform.system() == "Darwin" else 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return "\n".join((
        ", ".join(f"{k} {v}" for k, v in facts.items()),
        f"{_cpu()}, {os.cpu_count()} cores, {threads} thread{'s' if threads > 1 else ''}, "
        f"torch {torch.__version__}, Python {platform.python_version()}, fxzip {fxzip.__version__}, "
        f"peak memory {peak:.1f} GiB, {datetime.date.today()}",
        "mean: per task, own head; joint: arg max over all heads; compared: joint, heads made comparable. "
        "FLOPs: times one parent's. "
        "forwards: seconds in units of one forward of all parents on the calibration images.",
    ))  # fmt: skip


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    models = [s for s in info.read_text().splitlines() if s.startswith("model name")] if info.exists() else []
    return models[0].split(":", 1)[1].strip() if models else platform.processor() or platform.machine()


def show(title: str, rows: Sequence[Row], tasks: Sequence[str], notes: str) -> None:
    print(f"\n## {title}\n\n{markdown(rows, tasks)}\n\n{notes}", flush=True)


def save(path: str | None, tables: Sequence[tuple[str, Sequence[Row]]], notes: str) -> None:
    if path:
        content = {"tables": {t: [asdict(r) for r in rows] for t, rows in tables}, "notes": notes}
        Path(path).write_text(json.dumps(content, indent=1))


def draw(figure: Any, path: str | Path) -> None:
    """Write a figure, in a folder that is made if missing: the same bytes from the same numbers."""
    import matplotlib

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "fxzip"}):
        figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)


def announce(row: Row) -> Row:
    """Print a row as soon as it is there: runs are long."""
    tqdm.write(f"{row.name:34s} mean {number(row.mean):>5s}  joint {number(row.joint):>5s}  "
               f"{'' if row.compared is None else f'compared {row.compared:5.1f}  '}"
               f"{number(row.seconds):>6s} s  {row.note[:200]}", file=sys.stderr)  # fmt: skip
    return row


@torch.no_grad()
def drifted(bench: Bench, row: Row, zipped) -> Row:
    """With a note of how far the logits are from the parents': squared, relative to their variance, on test images."""
    drift = []
    for k, parent in enumerate(bench.parents):
        want = torch.cat([parent(x) for x in bench.images.split(250)])
        made = torch.cat([zipped(x)[k] for x in bench.images.split(250)])
        drift.append(float((made - want).square().sum() / (want - want.mean(0)).square().sum()))
    return replace(row, note=f"drift {sum(drift) / len(drift):.4f}")
