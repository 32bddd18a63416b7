"""Spaces as text and as a networkx graph: what `fxzip.inspect` prints."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

from torch import fx

from .. import markup

if TYPE_CHECKING:
    import networkx as nx

    from .spaces import FeatureSpace, Spaces

_HEADER = ("space", "width", "structure", "parents", "produced by", "consumed by", "vectors", "notes")
_NAMES = 3  # parameters shown per cell before "+k"


def table(spaces: Spaces) -> str:
    """One row per space: name, width, structure, who produces, who consumes, what rides along."""
    rows = [_HEADER, *(_row(s) for s in spaces)]
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    return "\n".join([*lines, "", *summary(spaces)])


def table_html(spaces: Spaces) -> str:
    """The same as HTML, for notebooks."""
    return markup.table(_HEADER, map(_row, spaces)) + markup.items(summary(spaces))


def readable_lowered(spaces: Spaces) -> str:
    """The lowered graph, a line per operator: `%mm = aten.mm(%x, fc.weight [s1:8, 4]) : [2, s1:8]  # fc, net.py:41`.

    Axes are named by the spaces on them, parameters by the model's names.
    """
    frozen = {f.node: f"frozen: {f.reason}" for f in spaces.frozen}
    lines = []
    for node in spaces.lowered.graph.nodes:
        if node.op != "call_function":
            continue
        read = ", ".join(_operand(i, spaces) for i in node.all_input_nodes)
        origin = node.meta.get("origin") or ""
        notes = [origin and f"%{origin}", frozen.get(origin, ""), node.meta.get("line") or ""]
        target = str(node.target) if hasattr(node.target, "overloadpacket") else getattr(node.target, "__name__", "")
        lines.append(f"%{node.name} = {target}({read}) : {typed(node, spaces)}  # {', '.join(filter(None, notes))}")
    return "\n".join(line.rstrip(" #") for line in lines)


def _operand(node: fx.Node, spaces: Spaces) -> str:
    name = node.meta.get("parameter")
    return f"{name} {_axes(name, node, spaces)}" if name else f"%{node.name}"


def _axes(parameter: str, node: fx.Node, spaces: Spaces) -> str:
    """`[s0:64, 3, 7, 7]`: the shape of a parameter with the spaces on its axes."""
    shape: list[list[str]] = [[] for _ in node.meta["shape"]]
    for space in spaces:
        for s in space.segments:
            if s.parameter == parameter:
                size = len(s.positions)
                shape[s.axis].append(f"{space.name}:{size}" if s.blocks == 1 else f"{space.name}:{size}/{s.blocks}")
    sizes = zip(shape, node.meta["shape"], strict=True)
    return f"[{', '.join('+'.join(dict.fromkeys(held)) or str(n) for held, n in sizes)}]"


def summary(spaces: Spaces) -> list[str]:
    """Counts, free share, and what stays unmerged and why."""
    free, total = free_parameters(spaces)
    owners = sum(bool(s.segments) for s in spaces)
    lines = [
        f"{owners} spaces with parameters, {len(spaces) - owners} block spaces without; "
        f"{100 * free / max(total, 1):.2f} % of {total:,} parameters lie on a space"
    ]
    if spaces.opaque:
        lines.append(f"per model from here on: {', '.join('%' + n for n in _short(sorted(spaces.opaque), 6))}")
    lines += [str(f) for f in spaces.frozen]
    unused = [n for n in spaces.untouched if spaces.lowered.parameters[n].meta.get("kind") == "parameter"]
    if unused:
        lines.append(f"not used by the traced path, left out: {', '.join(_short(unused, 6))}")
    return [*lines, *spaces.notices]


def free_parameters(spaces: Spaces) -> tuple[int, int]:
    """(entries of parameters with at least one axis entirely or partly on a space, all used entries)."""
    nodes = {n: p for n, p in spaces.lowered.parameters.items() if p.users and p.meta.get("kind") == "parameter"}
    kept: dict[str, float] = {n: 1.0 for n in nodes}
    covered: dict[tuple[str, int], float] = {}
    for space in spaces:
        for s in space.segments:
            covered[s.parameter, s.axis] = covered.get((s.parameter, s.axis), 0) + len(s.positions) / s.blocks
    for (name, axis), count in covered.items():
        if name in kept:
            kept[name] *= 1 - min(1.0, count / nodes[name].meta["shape"][axis])
    size = {n: int(_numel(p)) for n, p in nodes.items()}
    return round(sum(size[n] * (1 - k) for n, k in kept.items())), sum(size.values())


def explain(spaces: Spaces, name: str) -> str:
    """In words: which spaces the parameters of module or parameter `name` lie on, and what is tied to them.

    Raises KeyError with near names when nothing is called so.
    """
    if any(s.name == name for s in spaces):
        return _paragraph(spaces[name])
    known = spaces.lowered.parameters
    mine = [p for p in known if p == name or p.startswith(name + ".")]
    if not mine:
        modules = {".".join(p.split(".")[:k]) for p in known for k in range(1, p.count(".") + 2)}
        near = get_close_matches(name, sorted(modules), 3)
        raise KeyError(f"no parameter or module {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    lines = [name]
    for parameter in mine:
        shape = list(known[parameter].meta["shape"])
        lines.append(f"  {parameter} {shape}")
        held = [(s, g) for s in spaces for g in s.segments if g.parameter == parameter]
        for axis, size in enumerate(shape):
            here = [f"{'/'.join(sorted(g.roles))} {s.name} ({s.structure})" for s, g in held if g.axis == axis]
            counts = [f"{h}{f' x {here.count(h)}' if here.count(h) > 1 else ''}" for h in dict.fromkeys(here)]
            if size > 1:
                lines.append(f"    axis {axis} ({size}): {', '.join(counts) or 'inert: nobody may reorder it'}")
    touched = {s.name: s for s in spaces if set(s.parameters) & set(mine)}
    return "\n".join([*lines, *(_paragraph(s) for s in touched.values())])


def to_networkx(spaces: Spaces) -> nx.DiGraph:
    """Dataflow of the lowered graph; node attributes: op, shape, origin, spaces (names in its type)."""
    import networkx as nx

    graph = nx.DiGraph()
    for node in spaces.lowered.graph.nodes:
        if node.op == "output":
            continue
        held = sorted({s for layout in spaces.layouts(node.name) for s, _ in layout.runs})
        graph.add_node(
            node.name,
            op=str(node.target),
            shape=tuple(node.meta.get("shape") or ()),
            origin=node.meta.get("origin") or "",
            spaces=tuple(held),
        )
        graph.add_edges_from((i.name, node.name) for i in node.all_input_nodes)
    return graph


def typed(node: fx.Node, spaces: Spaces) -> str:
    """`[b, s0:64, 8, 8]`: shape with the spaces on their axes."""
    if node.meta.get("shape") is None:
        return "(several results)"
    shape = [str(d) for d in node.meta["shape"]]
    for layout in spaces.layouts(node.name):
        label = "+".join(f"{s}:{p.size}" for s, p in layout.runs)
        shape[layout.axes[0]] = label if len(layout.axes) == 1 else f"({label}"
        for axis in layout.axes[1:]:
            shape[axis] = f"{shape[axis]})" if axis == layout.axes[-1] else shape[axis]
    return f"[{', '.join(shape)}]"


def _row(space: FeatureSpace) -> tuple[str, ...]:
    def who(role: str) -> str:
        names = dict.fromkeys(s.parameter.removesuffix(".weight") for s in space.segments if role in s.roles)
        return " ".join(_short(tuple(names), _NAMES))

    notes = sorted(space.nonlinear) + (["permutation only"] if space.orthogonal_only else [])
    parents = " ".join(p.space for p in space.parents)
    return (
        space.name,
        str(space.size),
        space.structure,
        parents,
        who("produce"),
        who("consume"),
        who("vector"),
        ", ".join(notes),
    )


def _paragraph(space: FeatureSpace) -> str:
    lines = [f"{space.name}: {space.size} features, structure {space.structure}"]
    if space.parents:
        lines.append(f"  blocks given by {', '.join(p.space for p in space.parents)}")
    for role in ("produce", "consume", "vector"):
        uses = list(dict.fromkeys(f"{s.parameter}[{s.axis}]" for s in space.segments if role in s.roles))
        if uses:
            lines.append(f"  {role}: {', '.join(uses)}")
    if space.nonlinear:
        lines.append(f"  only permutations commute with: {', '.join(sorted(space.nonlinear))}")
    if space.anchors:
        lines.append(f"  measured at: {', '.join('%' + a.node for a in space.anchors[:6])}")
    return "\n".join(lines)


def _short(names, most: int) -> list[str]:
    names = list(names)
    return names if len(names) <= most else [*names[:most], f"+{len(names) - most}"]


def _numel(node: fx.Node) -> int:
    total = 1
    for d in node.meta["shape"]:
        total *= d
    return total
