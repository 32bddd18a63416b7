"""Feature spaces from ATen operators: labels, relations, solver, rules; see `infer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from ..errors import TraceError
from ..trace import rows, shapes_only, to_meta
from ..trace.lower import Lowered, corresponding, lower
from .annotate import annotate, readable, resize
from .engine import Inference, tensor_nodes
from .families import read_spaces
from .spaces import Anchor, FeatureSpace, Frozen, Layout, Parent, Segment, Spaces

__all__ = [
    "Anchor", "FeatureSpace", "Frozen", "Layout", "Parent", "Segment", "Spaces", "analyse", "annotate",
    "counted_outputs", "infer", "readable", "resize",
]  # fmt: skip

_LARGE = 5_000_000  # parameters, from which on running three samples takes longer than importing what shapes need


def infer(lowered: Lowered, outputs: Callable[[Any], Any] | None = None) -> Spaces:
    """The feature spaces of a lowered graph.

    outputs: picks what counts as output from the model's output pytree (of lowered nodes); default see
    `counted_outputs`. Counted outputs are inert. Raises SpaceError when inference finds no fixpoint
    or contradicts itself.

    >>> from torch import nn, ones; from fxzip.trace import lower
    >>> gm = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)))
    >>> [(s.name, s.size, s.parameters) for s in infer(lower(gm, (ones(1, 3),)))]
    [('s0', 8, ('0.weight', '0.bias', '2.weight'))]
    """
    chosen = outputs(lowered.outputs) if outputs else counted_outputs(lowered.outputs)
    inference = Inference(lowered)
    return read_spaces(inference, inference.run(tensor_nodes(chosen)))


def analyse(graph_module: fx.GraphModule, args: tuple) -> Spaces:
    """`infer` at the smallest batch that is typical: one sample, or two where the graph at one is another.

    Some ops take a short cut at batch size 1 (recurrent layers drop an axis); calibration then could not be
    matched with the analysed graph node by node. Of large models the graph at three is made from shapes alone;
    where that fails (values are read) or gives another graph, three samples are run.
    """
    one = lower(graph_module, rows(args, 1))
    three = rows(args, 3)
    large = sum(p.numel() for p in graph_module.parameters()) > _LARGE
    typical = large and _same_graph(one, shapes_only(graph_module), to_meta(three))
    typical = typical or _same_graph(one, graph_module, three)
    return infer(one if typical else lower(graph_module, rows(args, 2)))


def _same_graph(one: Lowered, graph_module: fx.GraphModule, args: tuple) -> bool:
    try:
        corresponding(one, lower(graph_module, args))
    except TraceError:
        return False
    return True


def counted_outputs(outputs: Any) -> Any:
    """What a caller looks at: `logits` if there is such a key, else every tensor of the output."""
    if hasattr(outputs, "keys") and "logits" in outputs:
        return outputs["logits"]
    return outputs
