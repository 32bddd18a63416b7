"""Rules by ATen op: see `registry`. Importing this package registers all of them."""

from __future__ import annotations

from . import contract, conv, index, join, norm, pointwise, reduce, shape, spatial  # noqa: F401  (register rules)
from .context import Context, Notes, OutSpec, Refusal, Refuse, Value
from .registry import apply, bind, blocks, names, propagates_linear, rule

__all__ = [
    "Context", "Notes", "OutSpec", "Refusal", "Refuse", "Value",
    "apply", "bind", "blocks", "names", "propagates_linear", "rule",
]  # fmt: skip
