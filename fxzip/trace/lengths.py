"""`len(x)` of a tensor must be a number in Python; while a model is traced, its code gets `x.shape[0]` instead."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn


@contextmanager
def symbolic_lengths(model: nn.Module, forward_fn: Callable[..., Any] | None = None) -> Iterator[None]:
    """In the block, `len` in the files that define the model's classes (and `forward_fn`) knows proxies and tensors.

    It stands in their global names, as what `torch.fx.wrap` puts there does, and is taken away afterwards.

    >>> def count(x): return len(x)
    >>> with symbolic_lengths(nn.ReLU(), count):
    ...     [n.target for n in fx.symbolic_trace(count).graph.nodes]
    ['x', 'size', 'output']
    """
    classes = {c for m in model.modules() for c in type(m).__mro__}
    places = [vars(sys.modules[c.__module__]) for c in classes if c.__module__ in sys.modules]
    functions: list[Any] = [forward_fn, getattr(forward_fn, "__func__", None)]
    places += [f.__globals__ for f in functions if hasattr(f, "__globals__")]
    mine = {id(p): p for p in places if "len" not in p and p is not vars(sys.modules["builtins"])}.values()
    for place in mine:
        place["len"] = _length
    try:
        yield
    finally:
        for place in mine:
            place.pop("len", None)


def _length(x: Any) -> Any:
    if isinstance(x, fx.Proxy):
        return x.size(0)
    if isinstance(x, Tensor) and x.dim():
        return x.shape[0]
    return len(x)
