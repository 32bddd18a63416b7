"""What distilling goes for: the parents' outputs, and what all fits aimed at.

With views, outputs are to be the mean of what the parents give for an input and for its views (as in Radosavovic et
al., "Data Distillation: Towards Omni-Supervised Learning", CVPR 2018); features those of the view that is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from ..solve.lanes import Lane
from ..solve.sequence import Pass
from ..trace import batch_size, run
from .network import Layer, Place
from .views import View, seen, taken

SAME = 1e-2  # of how far samples' outputs are apart: what one may be off among other samples


@dataclass(frozen=True)
class Aim:
    """One value and what it is to be. share: what its relative squared error counts. feature: not an output."""

    place: Place
    mix: Callable[[Sequence[Tensor]], Tensor]  # of the values of the parents that it is made of
    share: float
    feature: bool = False


def output_aims(steps: Pass) -> list[Aim]:
    """Every model's own outputs that depend on inputs; of shared ones nothing is known beyond the features."""
    nodes = steps.spaces.lowered.graph.output_node().all_input_nodes
    mine = [n for n in nodes if n.name in steps.is_private and n.name in steps.dynamic]
    names = [n.name for n in mine if n.meta["dtype"].is_floating_point]
    places = [(name, model) for name in names for model in steps.owners(name)]
    return [Aim(p, _own, 1 / len(places)) for p in places]


def feature_aims(steps: Pass, layers: Mapping[Place, Layer], share: float, views: bool = False) -> list[Aim]:
    """What the fits aim at, each once. Of private layers too: their outputs alone say little of single positions, on
    which the curvature of a convolution rests. With views, not of a model's last layers: outputs say what those are to
    be, which is not what the model makes of the view that is seen."""
    nodes = steps.spaces.lowered.graph.output_node().all_input_nodes
    made = {n.name for n in nodes} | (_ends(steps.dynamic, layers) if views else set())
    aimed = {(k.point.last, model): k.parts.mix if model is None else _own for (_, model), k in layers.items()}
    found = {place: mix for place, mix in aimed.items() if place[1] is None or place[0] not in made}
    lasts = {last for last, _ in found}
    return [
        Aim(place, mix, share / len(lasts) / len(steps.owners(place[0])), feature=True)
        for place, mix in found.items() if share
    ]  # fmt: skip


def _ends(dynamic: Mapping[str, fx.Node], layers: Mapping[Place, Layer]) -> set[str]:
    """What layers aim at where no other layer comes behind."""
    before: set[str] = set()  # all that some layer reads, through whatever is between
    fitted = {name for name, _ in layers}
    for name, node in reversed(list(dynamic.items())):
        if name in fitted or name in before:
            before.update(n.name for n in node.all_input_nodes)
    return {k.point.last for k in layers.values()} - before


def _own(values: Sequence[Tensor]) -> Tensor:
    return values[0]


def targets(
    aims: Sequence[Aim], parents: Sequence[Lane], args: tuple, others: Sequence[tuple] = (),
    outputs: Sequence[Tensor] | None = None,
) -> list[Tensor]:  # fmt: skip
    """What every aim is to be on these arguments. others: the same samples, seen otherwise. outputs: what those are to
    be, where that is known."""
    if outputs is not None:
        features, known = iter(_targets([a for a in aims if a.feature], parents, args)), iter(outputs)
        return [next(features if a.feature else known) for a in aims]
    found = _targets(aims, parents, args)
    made = [k for k, a in enumerate(aims) if not a.feature]
    for other in others:
        for k, value in zip(made, _targets([aims[k] for k in made], parents, other), strict=True):
            found[k] = found[k] + value
    for k in made if others else ():
        found[k] = found[k] / (1 + len(others))
    return found


def kept_outputs(
    aims: Sequence[Aim], parents: Sequence[Lane], chunks: Sequence[tuple], views: Sequence[View]
) -> list[Tensor] | None:
    """What outputs are to be on all samples, [samples, ...] each, so that steps need not run the models on every view.
    None where it saves nothing, takes more memory than the inputs do, or rows are not samples."""
    made = [a for a in aims if not a.feature]

    def means(args: tuple) -> list[Tensor]:
        return targets(made, parents, args, [seen(v, args) for v in views])

    if not (views and made):
        return None
    few, size = [means(c) for c in chunks[:2]], batch_size(chunks[0])
    first = few[0]
    room = sum(x.nbytes for x in tree_leaves(chunks[0]) if isinstance(x, Tensor))
    if sum(t.nbytes for t in first) > room or any(not t.dim() or len(t) != size for t in first):
        return None
    mixed = torch.arange(size * len(few)).roll(size // 2 + 1)[:size]  # the last of one chunk, the first of another
    for *each, t in zip(*few, means(taken(chunks[: len(few)], mixed, size)), strict=True):
        alone = torch.cat(each)[mixed]
        if not (alone - t).norm() <= SAME * (alone - alone.mean(0)).norm():
            return None
    return [torch.cat(every) for every in zip(*few, *map(means, chunks[2:]), strict=True)]


def _targets(aims: Sequence[Aim], parents: Sequence[Lane], args: tuple) -> list[Tensor]:
    if not aims:
        return []
    found: list[dict[str, Tensor]] = []
    for model, lane in enumerate(parents):
        names = {a.place[0] for a in aims if a.place[1] in (None, model)}
        nodes = {lane.nodes[n]: n for n in sorted(names)}
        values: dict[str, Tensor] = {}
        run(lane.lowered, lane.state, args, wanted=list(nodes),
            sink=lambda n, v, values=values, nodes=nodes: values.__setitem__(nodes[n], v))  # fmt: skip
        found.append(values)
    return [a.mix([v[a.place[0]] for k, v in enumerate(found) if a.place[1] in (None, k)]) for a in aims]
