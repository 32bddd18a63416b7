"""What the reproductions share: training, merging, the papers' accuracies, the table.

A paper is a list of `Setting`s. Images come from `torchvision.datasets` or ImageFolder directories, parents are trained
by the paper's recipe (or loaded: they are kept in --cache), and every merge is a call of fxzip.merge. With --reduced
the same code runs on what a laptop has: fewer images, classes, epochs and channels; its numbers are no reproduction.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

sys.path.insert(0, str(Path(__file__).parent.parent))

import nets  # noqa: E402
from common import Row, announce, machine, options, parse, save, show  # noqa: E402
from tasks import Task  # noqa: E402
from training import Recipe, fit  # noqa: E402

import fxzip  # noqa: E402
from fxzip.evaluate import Ensemble  # noqa: E402


@dataclass(frozen=True)
class Merge:
    """A row: what fxzip.merge is called with. published: the paper's figures, mean / joint."""

    name: str
    options: Mapping[str, Any]
    published: str = ""


@dataclass(frozen=True)
class Setting:
    """title; tasks: (args) -> the tasks; make: (classes) -> a network; recipe, as in the paper; merges.

    embed: outputs are compared with a vector per class ("embedding heads"), see `Embedded`. published: of the ensemble.
    score: as the function of that name, where accuracies are not what is to be known. seeds: of each parent, beyond
    --seed (0, 1, ..); key, a task's name and this name a parent in --cache.
    """

    title: str
    tasks: Callable[[argparse.Namespace], list[Task]]
    make: Callable[[int], nn.Module]
    recipe: Recipe
    merges: Sequence[Merge]
    key: str
    calibration: int = 4096
    embed: int = 0
    published: str = ""
    score: Callable[..., Any] | None = None
    seeds: Sequence[int] = ()


# --------------------------------------------------------------------------------------------- networks


class Embedded(nn.Module):
    """`network`, whose output is compared with a unit vector per class: logits are 100 times the cosines.

    The paper takes CLIP's text features of the class names (--embeddings FILE: a tensor [classes of all tasks, d] by
    torch.save). Without, directions at random stand in for them: comparable across heads too, but no language.
    """

    def __init__(self, network: nn.Module, vectors: Tensor):
        super().__init__()
        self.network = network
        self.register_buffer("vectors", 100 * F.normalize(vectors, dim=1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(self.network(x), dim=1), self.vectors)


def class_vectors(args: argparse.Namespace, tasks: Sequence[Task], size: int) -> list[Tensor]:
    """Per task, [classes, size]."""
    count = sum(t.classes for t in tasks)
    if args.embeddings:
        found = torch.load(args.embeddings, weights_only=True).float()
        if len(found) != count:
            raise SystemExit(f"--embeddings {args.embeddings}: {len(found)} vectors for {count} classes")
    else:
        found = torch.randn(count, size, generator=torch.Generator().manual_seed(1))
    return list(found.split([t.classes for t in tasks]))


def parents(setting: Setting, tasks: Sequence[Task], args: argparse.Namespace) -> tuple[list[nn.Module], list[float]]:
    """The trained networks, in eval mode on --device, and the seconds each took; kept in --cache."""
    vectors = class_vectors(args, tasks, setting.embed) if setting.embed else None
    models, seconds = [], []
    for k, task in enumerate(tasks):
        with torch.random.fork_rng():
            seed = args.seed + (setting.seeds[k] if setting.seeds else k)
            torch.manual_seed(seed)
            model = setting.make(setting.embed or task.classes)
            model = (Embedded(model, vectors[k]) if vectors else model).to(args.device)
            facts = (vars(setting.recipe), args.split, args.reduced, args.embeddings, args.pretrained, setting.embed)
            name = hashlib.sha256(repr(facts).encode()).hexdigest()[:8]
            path = Path(args.cache) / f"paper-{setting.key}-{task.name.replace(' ', '')}-s{seed}-{name}.pt"
            if path.exists():
                found = torch.load(path, weights_only=True)
                model.load_state_dict(found["state_dict"])
            else:
                start = time.perf_counter()
                own = _some(task.train, setting.recipe.images, args.seed)
                batches = _Epochs(_loader(own, setting.recipe.batch, args, True), setting.recipe.epochs)
                fit(model, batches, len(batches), setting.recipe, f"train {task.name}")
                found = {"state_dict": model.state_dict(), "seconds": time.perf_counter() - start}
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(found, path)
        models.append(model.eval())
        seconds.append(found["seconds"])
    return models, seconds


@dataclass
class _Epochs:
    loader: DataLoader
    count: int

    def __len__(self) -> int:
        return self.count * len(self.loader)

    def __iter__(self):
        for _ in range(self.count):
            yield from self.loader


def _loader(images: Dataset, batch: int, args: argparse.Namespace, shuffle: bool = False) -> DataLoader:
    whole = shuffle and len(images) >= batch  # type: ignore[arg-type]
    return DataLoader(images, batch, shuffle=shuffle, drop_last=whole, num_workers=args.workers)


def _some(images: Dataset, count: int | None, seed: int) -> Dataset:
    total = len(images)  # type: ignore[arg-type]
    if count is None or count >= total:
        return images
    return Subset(images, torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].tolist())


# ------------------------------------------------------------------------------------- merging and scoring


@torch.no_grad()
def score(network: nn.Module, tasks: Sequence[Task], args: argparse.Namespace) -> Any:
    """Accuracies as the papers define them, over the test images of all tasks."""
    heads: list[list[Tensor]] = []
    labels, start = [], 0
    for task in tasks:
        for x, y in batches_of(task, args):
            heads.append([h.float().cpu() for h in network(x.to(args.device))])
            labels.append(y + start)
        start += task.classes
    logits, truth = [torch.cat(h) for h in zip(*heads, strict=True)], torch.cat(labels)
    lists = list(torch.arange(start).split([t.classes for t in tasks]))
    return fxzip.accuracy(lambda k: tuple(h[k] for h in logits), [c.tolist() for c in lists],
                          torch.arange(len(truth)), truth)  # fmt: skip


def batches_of(task: Task, args: argparse.Namespace) -> Iterable[tuple[Tensor, Tensor]]:
    """Test images and labels, --test of them."""
    return _loader(_some(task.test, args.test, args.seed), 250, args)


def run(setting: Setting, args: argparse.Namespace) -> list[Row]:
    """A row per parent, the ensemble and every merge."""
    tasks = setting.tasks(args)
    models, seconds = parents(setting, tasks, args)
    one = _loader(tasks[0].test, 1, args).dataset[0][0][None].to(args.device)
    base = fxzip.cost(models[0], one)

    def row(name: str, network: nn.Module, published: str = "", took: float | None = None) -> Row:
        found = (setting.score or score)(network, tasks, args)
        size = fxzip.cost(network, one)
        return announce(Row(name, found.per_task, found.mean, found.joint, size.parameters, size.flops / base.flops,
                            took, published=published))  # fmt: skip

    rows = [row("ensemble", Ensemble(models).eval(), "" if args.reduced else setting.published, sum(seconds))]
    for merge in setting.merges:
        count = int(merge.options.get("calibration", args.calibration or setting.calibration))
        start = time.perf_counter()
        try:
            zipped = fxzip.merge(models, calibration_loader(tasks, count, args), seed=args.seed, device=args.device,
                                 progress=False, **{**merge.options, "calibration": count})  # fmt: skip
        except fxzip.FxzipError as error:
            rows.append(Row(merge.name, (None,) * len(tasks), None, None, note=f"{type(error).__name__}: {error}"))
            continue
        rows.append(row(merge.name, zipped, "" if args.reduced else merge.published, time.perf_counter() - start))
    return rows


def calibration_loader(tasks: Sequence[Task], count: int, args: argparse.Namespace) -> Iterable:
    """`count` training images of all tasks in random order, not augmented."""
    every = ConcatDataset([_some(t.plain, -(-count // len(tasks)), args.seed) for t in tasks])
    return _loader(_some(every, len(every) - 1, args.seed), min(256, count), args)


def main(doc: str | None, settings: Mapping[str, Callable[[argparse.Namespace], Setting]], argv=None) -> None:
    """Run the named settings and print a table each."""
    parser = options(doc)
    parser.add_argument("--setting", nargs="+", choices=settings, default=list(settings), help=", ".join(settings))
    parser.add_argument("--reduced", action="store_true", help="small enough for a laptop; no reproduction")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--split", type=int, default=0, metavar="SEED", help="which classes go to which task")
    parser.add_argument("--embeddings", metavar="FILE", help="a vector per class, see paper.Embedded")
    parser.add_argument("--pretrained", nargs="+", metavar="FILE", help="where parents start, a state_dict each")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    args = parse(parser, argv)
    tables = []
    for name in args.setting:
        setting = settings[name](args)
        setting = replace(setting, recipe=setting.recipe.adjusted(args))
        rows = run(setting, args)
        notes = machine(args, calibration=args.calibration or setting.calibration, epochs=setting.recipe.epochs,
                        split=args.split, reduced=args.reduced)  # fmt: skip
        title = setting.title + (" (reduced: no reproduction)" if args.reduced else "")
        show(title, rows, [f"task {k}" for k in range(len(rows[0].per_task))], notes)
        tables.append((title, rows))
    save(args.out, tables, notes)


__all__ = ["Merge", "Recipe", "Setting", "batches_of", "main", "nets"]
