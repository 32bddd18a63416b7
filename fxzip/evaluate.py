"""What the tables say: per-task and joint accuracy as the papers define them, parameters and FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .trace.guards import plain_kernels

Logits = Sequence[Tensor] | Mapping[str, Tensor]
ClassLists = Sequence[Sequence[int]] | Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Accuracy:
    """In percent. per_task: in the order of the class lists; mean: over tasks; joint: over all classes."""

    per_task: tuple[float, ...]
    mean: float
    joint: float


@dataclass(frozen=True)
class Cost:
    """parameters: scalars in distinct parameters; flops: of one forward (a multiply-add is two)."""

    parameters: int
    flops: int


class Ensemble(nn.Module):
    """Every model on the same input: what a merge is measured against, at the cost of all of them. Returns a tuple,
    or with `names` a dict, as a merge of a list or a dict of models does.

    >>> Ensemble([nn.Linear(4, 2), nn.Linear(4, 3)])(torch.zeros(1, 4))[1].shape
    torch.Size([1, 3])
    """

    def __init__(self, models: Sequence[nn.Module], names: Sequence[str] | None = None):
        super().__init__()
        self.models, self.names = nn.ModuleList(models), names

    def forward(self, *inputs: Any) -> Any:
        outputs = tuple(model(*inputs) for model in self.models)
        return outputs if self.names is None else dict(zip(self.names, outputs, strict=True))


@torch.no_grad()
def accuracy(
    forward: Callable[[Tensor], Logits],
    class_lists: ClassLists,
    images: Tensor,
    labels: Tensor,
    batch: int = 500,
) -> Accuracy:
    """Accuracy of a network with one head per task, in percent (the protocol of ZipIt!, Stoica et al. 2024).

    per task: the task's own images, its own head. joint: the raw logits of all heads side by side,
    arg max over all classes, on every image whose class some head knows.

    forward: images [b, ...] -> a tuple, or dict by task name, of logits [b, classes of the task].
    class_lists: per task the class of each logit; a list goes by order, a dict by task name.
    images: [n, ...], labels: int64 [n]. Modes are the caller's business: pass a model in `.eval()`.
    Raises InputError if heads and class lists do not fit, or a task has no image.

    >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    >>> a = accuracy(lambda x: (x, 2 * x.flip(1)), [[0, 1], [2, 3]], x, torch.tensor([0, 1, 3]))
    >>> a.per_task, round(a.joint, 1)
    ((100.0, 100.0), 33.3)
    """
    names, classes = _tasks(class_lists)
    if not len(images) or len(images) != len(labels):
        raise InputError(f"accuracy: {len(images)} images and {len(labels)} labels")
    truth = labels.cpu()
    for name, own in zip(names, classes, strict=True):
        if not torch.isin(truth, own).any():
            raise InputError(f"accuracy: no image of task {name!r}, whose classes are {own.tolist()}")
    everything = torch.cat(classes)  # [sum of classes]
    per_batch = []
    for x in images.split(batch):
        heads = _heads(forward(x), names, classes)
        own = [c[h.argmax(1)] for c, h in zip(classes, heads, strict=True)]
        per_batch.append(torch.stack([*own, everything[torch.cat(heads, 1).argmax(1)]]))  # [tasks + 1, b]
    predicted = torch.cat(per_batch, 1)  # [tasks + 1, n]
    scores = [
        100 * (row == truth)[torch.isin(truth, own)].double().mean().item()
        for row, own in zip(predicted, [*classes, everything], strict=True)
    ]
    return Accuracy(tuple(scores[:-1]), sum(scores[:-1]) / len(classes), scores[-1])


def cost(module: nn.Module, inputs: Any) -> Cost:
    """Parameters of `module` and FLOPs of one forward on `inputs`, in eval mode; modes are restored.

    inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
    FLOPs are those torch.utils.flop_counter knows (matrix products, convolutions, attention);
    fused CPU kernels it does not know (attention, LSTM, GRU) are taken apart first.

    >>> cost(nn.Linear(4, 2), torch.zeros(3, 4))
    Cost(parameters=10, flops=48)
    """
    from torch.utils.flop_counter import FlopCounterMode  # brings triton, where that is installed

    args, kwargs = _call(inputs)
    with _eval(module), plain_kernels(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*args, **kwargs)
    return Cost(sum(p.numel() for p in module.parameters()), counter.get_total_flops())


def _tasks(class_lists: ClassLists) -> tuple[tuple[str, ...] | tuple[int, ...], list[Tensor]]:
    """-> task names (or indices), classes of each task."""
    if not class_lists:
        raise InputError("accuracy: class_lists is empty; give the classes of each head, [[0, 1], [2, 3]]")
    if isinstance(class_lists, Mapping):
        return tuple(class_lists), [torch.as_tensor(c) for c in class_lists.values()]
    return tuple(range(len(class_lists))), [torch.as_tensor(c) for c in class_lists]


def _heads(logits: Logits, names: tuple, classes: list[Tensor]) -> list[Tensor]:
    """Logits on the CPU in the order of `names`, checked against the class lists."""
    if isinstance(logits, Tensor):
        raise InputError("accuracy: forward returned one tensor, not a tuple or dict of one per task")
    if len(logits) != len(classes):
        raise InputError(f"accuracy: forward returned {len(logits)} outputs for {len(classes)} class lists")
    by_name = isinstance(logits, Mapping) and all(isinstance(n, str) for n in names)
    if by_name and set(logits) != set(names):
        tasks = f"forward has {sorted(logits)}, class_lists {sorted(names)}"
        raise InputError(f"accuracy: the tasks differ: {tasks}")
    ordered = [logits[n] for n in names] if by_name else _values(logits)
    for name, h, own in zip(names, ordered, classes, strict=True):
        if h.shape[1:] != own.shape:
            raise InputError(f"accuracy: task {name!r} has logits {tuple(h.shape)} but {len(own)} classes")
    return [h.cpu() for h in ordered]


def _values(logits: Logits) -> list[Tensor]:
    return list(logits.values()) if isinstance(logits, Mapping) else list(logits)


def _call(inputs: Any) -> tuple[tuple, dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


@contextmanager
def _eval(module: nn.Module) -> Iterator[None]:
    """`module` in eval mode; each submodule's own mode afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
