"""Views: functions of the inputs that leave the right outputs as they are, such as mirror images."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import InputError
from ..trace import rows

View = Callable[..., Any]
FEW = 4  # samples that views are tried on


@torch.no_grad()
def seen(view: View, args: tuple) -> tuple:
    """The arguments as `view` shows them."""
    shown = view(*args)
    return tuple(shown) if isinstance(shown, (tuple, list)) else (shown,)


def taken(chunks: Sequence[tuple], index: Tensor, size: int) -> tuple:
    """The samples `index` of all chunks together; what has no row for each sample is the same in all."""

    def take(first: Any, *others: Any) -> Any:
        of = (first, *others)
        same = len(of) > 1 and first is of[1]
        if same or not (isinstance(first, Tensor) and first.dim() and len(first) == size):
            return first
        return torch.stack([of[k // size][k % size] for k in index.tolist()])

    return tree_map(take, chunks[0], *chunks[1:])


def check_views(views: Sequence[View], args: tuple) -> None:
    """Raises InputError that lists every view which cannot be taken, on a few samples. No RNG is left changed."""
    wrong = []
    few = rows(args, FEW)
    for k, view in enumerate(views):
        said = _wrong(view, few)
        wrong += [f"views[{k}] {said}"] if said else []
    if wrong:
        raise InputError.listing("Distill", wrong)


def _wrong(view: View, args: tuple) -> str:
    """What is wrong with a view; "" for nothing."""
    given = _copied(args)
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=_devices(args)):
            before = _drawn_from(args)
            shown, again, one = seen(view, given), seen(view, _copied(args)), seen(view, rows(_copied(args), 1))
            drew = _drawn_from(args) != before
    except Exception as error:
        return f"fails on samples of the first batch: {type(error).__name__}: {error}"
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
    have, want = (", ".join(_form(x) for x in tree_leaves(t)) for t in (shown, args))
    if not _alike(given, args):
        return "writes to its inputs: it must return new tensors"
    if have != want:
        return f"makes {have} of {want}: it must leave shapes as they are"
    if drew or not _alike(shown, again):
        return "draws at random: it must be the same every time"
    if not _alike(rows(shown, 1), one, 1e-3):
        return "shows a sample otherwise when others are beside it: it must take each by itself"
    return ""


def _copied(args: tuple) -> tuple:
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args)


def _drawn_from(args: tuple) -> bytes:
    """The states of all that a function may draw from."""
    tensors = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in _devices(args))]
    return pickle.dumps((random.getstate(), np.random.get_state(), [t.numpy() for t in tensors]))


def _devices(args: tuple) -> list[torch.device]:
    return list({x.device for x in tree_leaves(args) if isinstance(x, Tensor) and x.is_cuda})


def _form(x: Any) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" if isinstance(x, Tensor) else repr(x)


def _alike(a: Any, b: Any, tolerance: float = 0.0) -> bool:
    left, right = tree_leaves(a), tree_leaves(b)
    return len(left) == len(right) and all(
        x.shape == y.shape and torch.allclose(x.nan_to_num(), y.nan_to_num(), tolerance, tolerance)
        if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y
        for x, y in zip(left, right, strict=True)
    )  # fmt: skip
