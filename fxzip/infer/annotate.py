"""What inference knows, on the graph itself: `node.meta["fxzip"]` of every FX node."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, fx

from ..trace import watched
from .show import typed
from .spaces import Spaces


def annotate(graph_module: fx.GraphModule, spaces: Spaces, private: Collection[str] = ()) -> fx.GraphModule:
    """Write a dict into `meta["fxzip"]` of every node of the graph that `spaces` were inferred on; returns it.

    type: `[1, s0:64, 8, 8]`, shape and spaces of its first tensor, "" for other values. spaces: their names.
    state: "merged", "per model" (in `private`), or "frozen: why". The graph is changed in its meta only.
    """
    frozen = {f.node: f"frozen: {f.reason}" for f in spaces.frozen}
    by_name = {n.name: n for n in spaces.lowered.graph.nodes}
    for node in graph_module.graph.nodes:
        values = spaces.lowered.values.get(node.name, ())
        state = frozen.get(node.name) or ("per model" if node.name in private or node.op == "output" else "merged")
        node.meta["fxzip"] = {
            "type": typed(by_name[values[0].name], spaces) if values else "",
            "spaces": tuple(dict.fromkeys(s for v in values for k in spaces.layouts(v.name) for s, _ in k.runs)),
            "state": state,
        }
    return graph_module


def resize(graph_module: fx.GraphModule, args: tuple, widths: Mapping[str, tuple[int, int]]) -> None:
    """Bring the types that `annotate` wrote to the sizes of `graph_module` itself, which is run on `args`, one example.

    A merged network has heads of several sizes and a budget's widths. widths: space -> (a model's, the merged one's).
    """

    def see(node: fx.Node, value: Any) -> None:
        notes = node.meta.get("fxzip") or {}
        if isinstance(value, Tensor) and notes.get("type"):
            node.meta["fxzip"] = {**notes, "type": resized(notes["type"], tuple(value.shape), widths)}

    watched(graph_module, args, see)


def resized(text: str, shape: tuple[int, ...], widths: Mapping[str, tuple[int, int]]) -> str:
    """A labelled type at another shape: axes without a space get their size, spaces the width that fits.

    >>> resized("[1, s0:64, 8]", (1, 96, 4), {"s0": (64, 96)}), resized("[1, s0:64]", (1, 64), {"s0": (64, 96)})
    ('[1, s0:96, 4]', '[1, s0:64]')
    """
    dims = text[1:-1].split(", ")
    if text[0] != "[" or len(dims) != len(shape):
        return text
    for k, dim in enumerate(dims):
        if ":" in dim:
            end = next(j for j in range(k, len(dims)) if dim[0] != "(" or dims[j][-1] == ")")
            dims[k] = _relabelled(dim, math.prod(shape[k : end + 1]), widths)
        else:
            dims[k] = dim.replace(dim.rstrip(")"), str(shape[k]))
    return f"[{', '.join(dims)}]"


def _relabelled(dim: str, size: int, widths: Mapping[str, tuple[int, int]]) -> str:
    """`s0:64+s1:8` with merged widths, unless the axis has the models'."""
    parts = [(name, int(own), *widths.get(name, (0, 0))) for name, own in re.findall(r"(\w+):(\d+)", dim)]
    if sum(own for _, own, _, _ in parts) == size:
        return dim
    merged = "+".join(f"{name}:{new if own == model else own}" for name, own, model, new in parts)
    return f"{'(' * (dim[0] == '(')}{merged}{')' * (dim[-1] == ')')}"


def readable(graph_module: fx.GraphModule) -> str:
    """One line per node: `%layer1_0_conv1 = call_module layer1.0.conv1(%x) : [1, s1:64, 8, 8]  # merged`."""
    lines = []
    for node in graph_module.graph.nodes:
        notes = node.meta.get("fxzip") or {}
        operands = ", ".join(f"%{n.name}" for n in node.all_input_nodes)
        target = getattr(node.target, "__name__", None) or str(node.target)
        shape = f" : {notes['type']}" if notes.get("type") else ""
        lines.append(f"%{node.name} = {node.op} {target}({operands}){shape}  # {notes.get('state', '')}".rstrip(" #"))
    return "\n".join(lines)
