"""What `fxzip eval` measures: accuracy of the merged network, its models and their ensemble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import InputError
from ..evaluate import accuracy
from ..report import table
from ..trace import bind, counted, tensors_of
from . import data as datas
from . import job
from .recipe import Read


@dataclass(frozen=True)
class Test:
    """batches of (input, labels), the classes of every output by task. Labels of different tasks' own data do not
    meet: the second task's begin where the first one's end."""

    batches: Sequence[tuple[Any, int]]  # loader, what is added to its labels
    classes: Mapping[str, list[int]]


def assigned(given: Sequence[str], tasks: Sequence[str]) -> tuple[dict[str, str], str | None]:
    """`TASK=DATA` by task, or one for all. Raises InputError for a mixture, or tasks without data."""
    own = {t: text[len(t) + 1 :] for text in given for t in tasks if text.startswith(f"{t}=")}
    if not own and len(given) == 1:
        return {}, given[0]
    if len(own) != len(given) or set(own) != set(tasks):
        raise InputError(f"--data: give it once, or as TASK=DATA for each of the tasks {', '.join(tasks)}")
    return own, None


def labelled(read: Read, own: Mapping[str, str], one: str | None, classes: Sequence[str], size: int | None) -> Test:
    """The labelled data, and which class each output is. Raises InputError where that is not said."""
    if one is None:
        if classes:
            raise InputError("--classes: with data per task, output i is class i of the task's data")
        return _own(read, own, size)
    samples = _samples(read, one, size)
    named: dict[str, list[Any]] = {
        t: list(m.classes) for t, m in zip(read.recipe.tasks, read.recipe.models, strict=True) if m.classes
    }
    for text in classes:
        task, _, listed = text.partition("=")
        if task not in read.recipe.tasks or not listed:
            tasks = ", ".join(read.recipe.tasks)
            raise InputError(f"--classes {text!r}: write TASK=0,1,2 for one of the tasks {tasks}")
        named[task] = listed.split(",")
    if set(named) != set(read.recipe.tasks):
        lacks = next(t for t in read.recipe.tasks if t not in named)
        raise InputError(
            f"which classes are the outputs of {lacks!r}? Pass --classes {lacks}=0,1,2 (labels or names of the data, in"
            f" the order of the outputs), write classes into the recipe, or pass --data {lacks}=DATA for each task"
        )
    indices = {t: [_class(samples, c) for c in listed] for t, listed in named.items()}
    return Test([(datas.loader(samples), 0)], {t: indices[t] for t in read.recipe.tasks})


@torch.no_grad()
def scores(zipped: nn.Module, read: Read, test: Test, parents: bool, trust_code: bool) -> str:
    """The table: a row per network, a column per task."""
    tasks = list(test.classes)
    logits, labels = _logits(zipped, test)
    if read.recipe.heads in ("concat", "joint"):
        logits = list(logits[0].split([len(c) for c in test.classes.values()], 1))
    if read.recipe.heads == "average":  # one answer, to every task
        logits = logits * len(tasks)
    rows = [("merged", logits)]
    if parents:
        networks = job.prepared(read, trust_code).networks
        outputs = [_logits(network, test)[0][0] for network in networks.values()]
        alone = [[o if i == j else None for j in range(len(tasks))] for i, o in enumerate(outputs)]
        rows = [*zip(tasks, alone, strict=True), ("ensemble", outputs), *rows]
    body = [(name, *_row(given, test, labels)) for name, given in rows]
    lines = table(("network", *(f"{t} %" for t in tasks), "mean %", "joint %"), body)
    return "\n".join([*lines, "", f"{len(labels)} samples; joint: arg max over all outputs side by side"])


def _row(given: Sequence[Tensor | None], test: Test, labels: Tensor) -> list[str]:
    """Percentages; of a network that does one task only, that one."""
    order = torch.arange(len(labels))
    known = {t: x for (t, x) in zip(test.classes, given, strict=True) if x is not None}
    found = accuracy(lambda k: {t: x[k] for t, x in known.items()}, {t: test.classes[t] for t in known}, order, labels)
    per_task = dict(zip(known, found.per_task, strict=True))
    whole = len(known) == len(test.classes)
    return [*(f"{per_task[t]:.1f}" if t in known else "-" for t in test.classes),
            *(f"{x:.1f}" if whole else "-" for x in (found.mean, found.joint))]  # fmt: skip


def _logits(network: nn.Module, test: Test) -> tuple[list[Tensor], Tensor]:
    """Every output [n, classes] on all samples, and the labels [n]."""
    form = signature(network.forward)
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    found: list[list[Tensor]] = []
    labels = []
    for batches, offset in test.batches:
        for x, y in batches:
            output = network(*tree_map(lambda t: _cast(t, dtype), bind(x, form)))
            heads = list(output.values()) if isinstance(output, dict) else output
            heads = heads if isinstance(heads, (list, tuple)) else [heads]
            found.append([_matrix(counted(h)) for h in heads])
            labels.append(y + offset)
    return [torch.cat(column) for column in zip(*found, strict=True)], torch.cat(labels)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _matrix(output: Any) -> Tensor:
    tensor = next((t for t in tensors_of(output) if t.is_floating_point()), None)
    if tensor is None or tensor.dim() != 2:
        shape = None if tensor is None else list(tensor.shape)
        raise InputError(f"eval: counts classes, [n, classes] per task; an output is {shape}: measure it in Python")
    return tensor.float().cpu()


def _own(read: Read, own: Mapping[str, str], size: int | None) -> Test:
    batches, classes, start = [], {}, 0
    for task in read.recipe.tasks:
        samples = _samples(read, own[task], size)
        count = len(samples.classes) or 1 + max(int(samples[k][1]) for k in range(len(samples)))
        batches.append((datas.loader(samples), start))
        classes[task] = list(range(start, start + count))
        start += count
    return Test(batches, classes)


def _samples(read: Read, text: str, size: int | None) -> datas.Samples:
    """As the recipe reads its images, from the working directory."""
    entries = (read.recipe.data, *(m.data for m in read.recipe.models))
    given = next((d for d in entries if d), None)
    images = datas.Images(size or (given and given.image_size), given.mean, given.std) if given else datas.Images(size)
    samples = datas.samples(text, images, Path())
    if not samples.labelled:
        raise InputError(f"data {text!r} has no labels to compare with")
    return samples


def _class(samples: datas.Samples, wanted: int | str) -> int:
    if wanted in samples.classes:
        return samples.classes.index(str(wanted))
    try:
        return int(wanted)
    except ValueError as error:
        names = ", ".join(map(str, samples.classes)) or "no names"
        raise InputError(f"class {wanted!r}: the data has {names}") from error
