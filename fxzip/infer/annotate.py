"""What inference knows, on the graph itself: `node.meta["fxzip"]` of every FX node."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

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
