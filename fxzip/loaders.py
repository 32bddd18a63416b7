"""Loaders as users give them: looked into without losing a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .errors import InputError
from .trace import describe
from .trace.guards import kept_rng


def first_batches(loader: Any, tasks: list[str], found: list[str]) -> tuple[Any, dict[str, Any]]:
    """The loader or loaders, safe to iterate again, and first batches by task (task 0 for a shared one). What is wrong
    goes to `found`."""
    if loader is None:
        return None, {}
    if not isinstance(loader, Mapping):
        first, again = _peek_into(loader, "loader", found)
        return again, {} if first is None or not tasks else {tasks[0]: first}
    if set(loader) != set(tasks):
        found.append(f"loader has the keys {sorted(map(str, loader))}, the models are named {sorted(tasks)}")
        return None, {}
    given = {task: loader[task] for task in tasks}
    once: dict[int, tuple[Any, Iterable]] = {}  # by loader: an iterator that serves two tasks runs once for both
    for task, own in given.items():
        if id(own) not in once:
            once[id(own)] = _peek_into(own, f"loader[{task!r}]", found)
    pairs = {task: once[id(own)] for task, own in given.items()}
    again = {task: pair[1] for task, pair in pairs.items()}
    return again, {task: pair[0] for task, pair in pairs.items() if pair[0] is not None}


def _peek_into(loader: Any, label: str, found: list[str]) -> tuple[Any, Iterable]:
    try:
        return peek(loader, label)
    except InputError as error:
        found.append(str(error))
        return None, ()


def peek(loader: Any, label: str = "loader") -> tuple[Any, Iterable]:
    """The first batch, and an iterable that still gives every batch, from the first, as often as asked.

    An iterator (a generator) can only run once: its batches are kept as they are drawn. Anything else is
    returned as it is, with global random states as before, so that a shuffling loader starts the same.
    Raises InputError for what is not iterable, is empty, or yields samples rather than batches.

    >>> first, again = peek(n for n in [10, 20])
    >>> first, list(again), list(again)
    (10, [10, 20], [10, 20])
    """
    if isinstance(loader, Tensor):
        raise InputError(f"{label} is a tensor {describe(loader)}: pass [tensor] for a single batch")
    if isinstance(loader, torch.utils.data.Dataset) and not isinstance(
        loader, torch.utils.data.IterableDataset
    ):
        raise InputError(f"{label} is a Dataset of samples: wrap it in a DataLoader, which makes batches")
    if isinstance(loader, Iterator):
        again: Iterable = Replay(loader)
        return _first(iter(again), label), again
    with kept_rng(()):
        try:
            iterator = iter(loader)
        except TypeError as error:
            raise InputError(f"{label} is not iterable: {type(loader).__name__}") from error
        return _first(iterator, label), loader


def _first(iterator: Iterator, label: str) -> Any:
    try:
        batch = next(iterator, _END)
    except Exception as error:
        raise InputError(f"{label} fails at its first batch: {type(error).__name__}: {error}") from error
    if batch is _END:
        raise InputError(f"{label} is empty: it gives no batch")
    return batch


_END = object()


def _copied(batch: Any) -> Any:
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, batch)


class Replay:
    """An iterator that can be iterated again: batches drawn so far are kept and come first. Copies are kept: the next
    batch may be written where this one was."""

    def __init__(self, iterator: Iterator):
        self._iterator = iterator
        self._drawn: list[Any] = []

    def __iter__(self) -> Iterator:
        k = 0
        while True:
            if k == len(self._drawn):
                for batch in self._iterator:
                    self._drawn.append(_copied(batch))
                    break
                else:
                    return
            yield self._drawn[k]
            k += 1
