"""Calibration inputs: what of a loader is read, as positional arguments, the same for every stage."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from inspect import Signature
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from ..errors import InputError
from ..trace import batch_size, bind, plain_batch, rows
from ..trace.guards import seeded


def read_batches(
    loader: Iterable | Mapping[str, Iterable], signature: Signature, count: int, device: torch.device, seed: int = 0
) -> list[tuple]:
    """The first `count` samples as positional-argument tuples on `device`; labels are dropped unseen.

    A dict of loaders is read in turn, a batch each, so that tasks are balanced. Inputs are held in memory:
    every stage sees the same samples, and a generator is read once. Batches are copied unless they are in a list: a
    loader may write all into one buffer. Shuffling loaders draw from `seed`, whether by torch, numpy or Python; the
    random states are as they were. Raises InputError when there is no batch or one does not fit the forward.
    """
    found: list[tuple] = []
    seen = 0
    kept = isinstance(loader, (list, tuple))
    with seeded(seed):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        source = _in_turn(loader) if isinstance(loader, Mapping) and _is_tasks(loader) else loader
        iterator = _watched(source)
        while seen < count:
            batch = next(iterator, _END)
            if batch is _END:
                break
            args = _bound(batch, signature, len(found))
            size = max(batch_size(args), 1)
            args = rows(args, min(size, count - seen)) if size > count - seen else args
            found.append(tree_map(lambda x: x.to(device, copy=not kept) if isinstance(x, Tensor) else x, args))
            seen += min(size, count - seen)
    if not found:
        raise InputError("the loader yields no batch; pass an iterable of input batches")
    return found


_END = object()


def _watched(loader: Iterable) -> Iterator[Any]:
    """The batches of `loader`; what it raises comes out as an InputError that says at which batch."""
    read = 0
    try:
        for batch in loader:
            yield batch
            read += 1
    except InputError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"the loader fails at batch {read} (counted from 0): {reason}") from error


def _bound(batch: Any, signature: Signature, index: int) -> tuple:
    try:
        args = bind(batch, signature)
        plain_batch(args)
    except InputError as error:
        raise InputError(f"batch {index} of the loader (counted from 0): {error}") from error
    return args


def other_forms(batches: list[tuple]) -> list[int]:
    """The first batch of each form: dtypes, and shapes without the batch axis.

    >>> other_forms([(torch.ones(2, 3),), (torch.ones(5, 3),), (torch.ones(2, 4),)])
    [0, 2]
    """
    forms = [
        tuple((x.shape[1:], x.dtype) if isinstance(x, Tensor) else None for x in tree_flatten(b)[0]) for b in batches
    ]
    return [k for k, form in enumerate(forms) if form not in forms[:k]]


def _is_tasks(loader: Any) -> bool:
    """A dict of loaders, as opposed to a batch that is a dict (whose values are tensors)."""
    return not any(isinstance(v, Tensor) for v in loader.values())


def _in_turn(loaders: Mapping[str, Iterable]) -> Iterator[Any]:
    """One batch of every loader in turn, until all are used up."""
    iterators = [iter(v) for v in loaders.values()]
    pending = len(iterators)
    turns = cycle(iter(i).__next__ for i in iterators)
    while pending:
        try:
            for take in turns:
                yield take()
        except StopIteration:
            pending -= 1
            turns = cycle(islice(turns, pending))
