"""`inspect`: the feature spaces of a model, before anything is merged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from typing import Any

from torch import nn

from .errors import SpaceError
from .infer import Spaces, analyse, annotate
from .rewrite import partition
from .trace import beside, bind, trace


def inspect(model: nn.Module, example_inputs: Any, forward_fn: Callable[..., Any] | None = None) -> Spaces:
    """Feature spaces of `model`: print() shows a row per space; `.explain("layer2.0.conv1")`, `.frozen`,
    `.untouched`, `.to_networkx()`, `.graph_module` (typed, see `readable()`) tell more.

    example_inputs: one batch (tensor, tuple, or dict bound to forward). The model is not changed.
        It may be on the meta device (`with torch.device("meta"): Model()`): then nothing is checked by its values.
    forward_fn: called as forward_fn(model, x, ...) instead of model(x, ...), to choose what counts as output.
    Raises TraceError when the model cannot be traced, SpaceError when inference finds no fixpoint.

    >>> import torch
    >>> [s.size for s in inspect(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 4))]
    [8]
    """
    traced = trace(model, example_inputs, forward_fn=forward_fn)
    args = beside(bind(example_inputs, signature(traced.graph_module.forward)), traced.graph_module)
    spaces = analyse(traced.graph_module, args)
    try:
        private = partition(traced.graph_module, spaces.opaque).private
    except SpaceError:  # nothing can be merged: then all of it stays per model
        private = frozenset(n.name for n in traced.graph_module.graph.nodes)
    notices = (f"traced by the {traced.rung} front end", *traced.notices)
    return replace(spaces, graph_module=annotate(traced.graph_module, spaces, private), notices=notices)
