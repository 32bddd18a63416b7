"""Figures (matplotlib, the `report` extra) of spaces and of merges; each returns a `matplotlib.figure.Figure`.

Of the frontier, of the line between two networks and of the plane through them: `.plot()` of what `fxzip.frontier`,
`fxzip.landscape.line` and `fxzip.landscape.plane` return.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from .drawing import drawing
from .errors import InputError
from .evaluate import Accuracy, Cost
from .infer import Spaces
from .report import Report, SpaceRow, report

__all__ = ["accuracies", "correlations", "graph", "layers", "similarity", "spaces"]


def spaces(found: Spaces) -> Any:
    """Width of every space by depth, and how many parameter axes are tied to it.

    >>> import torch, fxzip
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> spaces(fxzip.inspect(net, torch.ones(1, 4))).axes[0].get_ylabel()  # doctest: +SKIP
    'features'
    """
    _some(found.spaces, "plot.spaces", "the model has no feature space")
    figure, axes = drawing("plot.spaces", 8, 4)
    names = [s.name for s in found]
    axes.bar(names, [s.size for s in found], color=[_colour(k) for k in range(len(names))])
    for k, s in enumerate(found):
        axes.annotate(str(len(s.segments)), (k, s.size), (0, 2), textcoords="offset points", ha="center", fontsize=7)
    axes.set_ylabel("features")
    axes.set_xlabel("space, by depth (above: tied parameter axes)")
    _thin(axes, names)
    return figure


def graph(found: Spaces) -> Any:
    """The dataflow of the lowered graph, a dot per operator, coloured by its first space; grey has none. The longest
    way through it is a straight line, every other branch has a row of its own beside it."""
    import networkx as nx

    flow = found.to_networkx()
    data = {n.name for n in found.lowered.inputs}
    for node in nx.topological_sort(flow):
        if any(i in data for i in flow.predecessors(node)):
            data.add(node)
    flow.remove_nodes_from([n for n in flow if n not in data])
    _some(flow, "plot.graph", "the graph has no operators")
    place = _rows(flow)
    xs, ys = zip(*place.values(), strict=True)
    figure, axes = drawing("plot.graph", min(24, max(8, 0.14 * max(xs))), 0.4 * (max(ys) - min(ys) + 2))
    names = [s.name for s in found]
    held = [flow.nodes[n]["spaces"] for n in flow]
    colours = [_colour(names.index(h[0])) if h else "0.75" for h in held]
    nx.draw_networkx_nodes(flow, place, ax=axes, node_color=colours, node_size=30)
    # what skips nodes of its own row goes round them, the farther the flatter
    bends = {(a, b): place[b][0] - place[a][0] for a, b in flow.edges if place[a][1] == place[b][1]}
    for bend in sorted({1, *bends.values()}):
        edges = [e for e in flow.edges if bends.get(e, 1) == bend]
        style = f"arc3,rad={-min(0.4, 3 / bend) if bend > 1 else 0}"
        nx.draw_networkx_edges(flow, place, edges, ax=axes, node_size=30, width=0.6, edge_color="0.6", arrowsize=5,
                               connectionstyle=style)  # fmt: skip
    axes.set_ylim(min(ys) - 1, max(ys) + 1)
    axes.set_axis_off()
    return figure


def similarity(zipped: fx.GraphModule | Report, space: str) -> Any:
    """Correlations of the first two models' features on one space: in their own order, and as merged.

    Raises InputError for an unknown space, and where the method did not measure them."""
    found = _report(zipped)
    row = next((s for s in found.spaces if s.name == space), None)
    if row is None:
        names = ", ".join(s.name for s in found.spaces)
        raise InputError(f"plot.similarity: no merged space {space!r}; there are {names}")
    if row.own is None or row.matched is None:
        raise InputError(f"plot.similarity: {found.method} measured no activations on {space}")
    figure, axes = drawing("plot.similarity", 9, 4, columns=2)
    for one, map, title in zip(axes, (row.own, row.matched), ("own order", "as merged, best first"), strict=True):
        drawn = one.imshow(map.array(), vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        one.set_title(f"{space}, {title}: {map.side} of {map.total}", fontsize=10)
        one.set_xlabel(str(found.tasks[1]))
        one.set_ylabel(str(found.tasks[0]))
    figure.colorbar(drawn, ax=list(axes), label="correlation", shrink=0.8)
    return figure


def correlations(zipped: fx.GraphModule | Report) -> Any:
    """Mean correlation of what is merged, per space by depth, against plain averaging."""
    rows = [s for s in _report(zipped).spaces if _known(s)]
    _some(rows, "plot.correlations", "this method measured no correlations")
    figure, axes = drawing("plot.correlations", 8, 4)
    names = [s.name for s in rows]
    for values, label, style in (([s.quality for s in rows], "as matched", "C2o-"),
                                 ([s.baseline for s in rows], "in the models' own order", "C1s--")):  # fmt: skip
        axes.plot(names, [math.nan if v is None else v for v in values], style, label=label, markersize=4)
    axes.set_xlabel("space, by depth")
    axes.set_ylabel("mean correlation")
    axes.legend(frameon=False)
    _thin(axes, names)
    return figure


def layers(zipped: fx.GraphModule | Report) -> Any:
    """Relative squared error of every fitted layer, before and after solve; one without error is at the bottom."""
    rows = _report(zipped).layers
    _some(rows, "plot.layers", 'this merge fitted no layers (method="solve" does)')
    figure, axes = drawing("plot.layers", max(6, 0.25 * len(rows)), 4.5)
    names = [f"{r.node} ({r.task})" if r.task else r.node for r in rows]
    least = min((e for r in rows for e in (r.before, r.after) if e and e > 1e-6), default=1e-6) / 10  # rounding aside
    before, after = [max(r.before or 0, least) for r in rows], [max(r.after or 0, least) for r in rows]  # a log axis
    axes.vlines(names, after, before, color="0.8", zorder=1)
    axes.scatter(names, before, facecolors="none", edgecolors="C1", label="before solve", zorder=2)
    axes.scatter(names, after, color="C2", label="after solve", zorder=2)
    axes.set_yscale("log")
    axes.set_ylabel("relative squared error")
    axes.tick_params(axis="x", rotation=90, labelsize=7)
    axes.legend(frameon=False)
    return figure


def accuracies(found: Mapping[str, Accuracy], costs: Mapping[str, Cost] | None = None) -> Any:
    """Accuracy of several networks, per task and joint (percent); beside that, with `costs` of the same names, the mean
    over tasks and the joint accuracy against FLOPs, in units of the cheapest network's.

    Raises InputError without networks, where they have other numbers of tasks, or a cost is missing.

    >>> figure = accuracies({"zip": Accuracy((90.0, 80.0), 85.0, 60.0)})  # doctest: +SKIP
    """
    _some(found, "plot.accuracies", "there is no network")
    counts = {name: len(a.per_task) for name, a in found.items()}
    if len(set(counts.values())) > 1:
        raise InputError(f"plot.accuracies: the networks have other numbers of tasks: {counts}")
    missing = [name for name in found if costs is not None and name not in costs]
    if missing:
        raise InputError(f"plot.accuracies: no cost of {', '.join(missing)}")
    figure, axes = drawing("plot.accuracies", 6 if costs is None else 11, 4, 1 if costs is None else 2)
    left, *right = [axes] if costs is None else axes
    tasks = max(counts.values())
    rows = [*((f"task {k}", [a.per_task[k] for a in found.values()]) for k in range(tasks)),
            ("joint", [a.joint for a in found.values()])]  # fmt: skip
    wide = 0.8 / len(rows)
    for k, (name, values) in enumerate(rows):
        at = [x + (k - tasks / 2) * wide for x in range(len(found))]
        left.bar(at, values, wide, label=name, color="0.6" if name == "joint" else _colour(k))
    left.set_xticks(range(len(found)), list(found), rotation=30 if len(found) > 4 else 0)
    left.set_ylabel("accuracy, %")
    left.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=min(len(rows), 6), frameon=False)
    if costs is not None:
        _by_cost(right[0], found, [costs[name].flops for name in found])
    return figure


def _by_cost(axes: Any, found: Mapping[str, Accuracy], flops: Sequence[int]) -> None:
    xs = [f / max(min(flops), 1) for f in flops]
    mean, joint = [a.mean for a in found.values()], [a.joint for a in found.values()]
    for label, marker, colour, ys in (("mean over tasks", "o", _colour(0), mean), ("joint", "s", "0.6", joint)):
        axes.plot(xs, ys, marker, label=label, color=colour)
        for x, y, name in zip(xs, ys, found, strict=True):
            axes.annotate(name, (x, y), (5, 3), textcoords="offset points", fontsize=7)
    axes.set_xlabel("FLOPs, times those of the cheapest")
    axes.margins(0.2, 0.1)
    axes.legend(fontsize=8)


def _rows(flow: Any) -> dict[str, tuple[int, int]]:
    """Node -> (depth, row). The longest path is row 0; of what is left the longest path is next, on the row nearest
    to it that is free from where it forks off to where it joins; and so on."""
    import networkx as nx

    depth = {node: k for k, layer in enumerate(nx.topological_generations(flow)) for node in layer}
    place: dict[str, tuple[int, int]] = {}
    taken: dict[int, list[tuple[int, int]]] = {}
    left = flow.copy()
    while left:
        path = nx.dag_longest_path(left)
        left.remove_nodes_from(path)
        fork = max((depth[n] for n in flow.predecessors(path[0])), default=-1)
        join = min((depth[n] for n in flow.successors(path[-1])), default=depth[path[-1]] + 1)
        row = next(r for k in itertools.count() for r in (k, -k)
                   if all(join <= a or b <= fork for a, b in taken.get(r, ())))  # fmt: skip
        taken.setdefault(row, []).append((fork, join))
        place |= {n: (depth[n], row) for n in path}
    return place


def _report(zipped: fx.GraphModule | Report) -> Report:
    return zipped if isinstance(zipped, Report) else report(zipped)


def _known(row: SpaceRow) -> bool:
    return row.quality is not None and not math.isnan(row.quality)


def _some(rows: Any, call: str, why: str) -> None:
    if not len(rows):
        raise InputError(f"{call}: nothing to draw, {why}")


def _thin(axes: Any, names: Sequence[str]) -> None:
    """At most thirty labels."""
    step = max(1, math.ceil(len(names) / 30))
    axes.set_xticks(range(0, len(names), step), [names[k] for k in range(0, len(names), step)])


def _colour(index: int) -> tuple[float, float, float]:
    """The colours of the HTML report: neighbours differ by the golden angle."""
    from colorsys import hls_to_rgb

    return hls_to_rgb((205 + index * 137.508) % 360 / 360, 0.65, 0.55)
