"""What distilling goes for: the parents' outputs, and what all fits aimed at.

With views, outputs are to be the mean of what the parents give for an input and for its views (as in Radosavovic et
al., "Data Distillation: Towards Omni-Supervised Learning", CVPR 2018); features those of the view that is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import InputError
from ..solve.lanes import Lane
from ..solve.sequence import Pass
from ..trace import run
from .network import Layer, Place

View = Callable[..., Any]


@dataclass(frozen=True)
class Aim:
    """One value and what it is to be. share: what its relative squared error counts. feature: not an output."""

    place: Place
    mix: Callable[[Sequence[Tensor]], Tensor]  # of the values of the parents that it is made of
    share: float
    feature: bool = False


def output_aims(steps: Pass) -> list[Aim]:
    """Every model's own outputs; of shared ones nothing is known beyond the features."""
    nodes = steps.spaces.lowered.graph.output_node().all_input_nodes
    names = [n.name for n in nodes if n.name in steps.is_private and n.meta["dtype"].is_floating_point]
    places = [(name, model) for name in names for model in range(len(steps.private))]
    return [Aim(p, _own, 1 / len(places)) for p in places]


def feature_aims(steps: Pass, layers: Mapping[Place, Layer], share: float) -> list[Aim]:
    """What the fits aim at, each once. Of private layers too: their outputs alone say little of single positions, on
    which the curvature of a convolution rests."""
    nodes = steps.spaces.lowered.graph.output_node().all_input_nodes
    made = {(n.name, model) for n in nodes for model in range(len(steps.private))}
    aimed = {(k.point.last, model): k.parts.mix if model is None else _own for (_, model), k in layers.items()}
    found = {place: mix for place, mix in aimed.items() if place not in made}
    lasts = {last for last, _ in found}
    return [
        Aim(place, mix, share / len(lasts) / (1 if place[1] is None else len(steps.private)), feature=True)
        for place, mix in found.items() if share
    ]  # fmt: skip


def _own(values: Sequence[Tensor]) -> Tensor:
    return values[0]


def targets(aims: Sequence[Aim], parents: Sequence[Lane], args: tuple, others: Sequence[tuple] = ()) -> list[Tensor]:
    """What every aim is to be on these arguments. others: the same samples, seen otherwise."""
    found = _targets(aims, parents, args)
    made = [k for k, a in enumerate(aims) if not a.feature]
    for other in others:
        for k, value in zip(made, _targets([aims[k] for k in made], parents, other), strict=True):
            found[k] = found[k] + value
    for k in made if others else ():
        found[k] = found[k] / (1 + len(others))
    return found


def _targets(aims: Sequence[Aim], parents: Sequence[Lane], args: tuple) -> list[Tensor]:
    found: list[dict[str, Tensor]] = []
    for model, lane in enumerate(parents):
        names = {a.place[0] for a in aims if a.place[1] in (None, model)}
        nodes = {lane.nodes[n]: n for n in sorted(names)}
        values: dict[str, Tensor] = {}
        run(lane.lowered, lane.state, args, wanted=list(nodes),
            sink=lambda n, v, values=values, nodes=nodes: values.__setitem__(nodes[n], v))  # fmt: skip
        found.append(values)
    return [a.mix([v[a.place[0]] for k, v in enumerate(found) if a.place[1] in (None, k)]) for a in aims]


@torch.no_grad()
def seen(view: View, args: tuple) -> tuple:
    """The arguments as `view` shows them."""
    shown = view(*args)
    return tuple(shown) if isinstance(shown, (tuple, list)) else (shown,)


def check_views(views: Sequence[View], args: tuple) -> None:
    """Raises InputError that lists every view which cannot be taken, on the first batch. The RNG stays as it was."""
    wrong = []
    for k, view in enumerate(views):
        given = _copied(args)
        with torch.random.fork_rng(devices=_devices(args)):
            try:
                first, second = seen(view, given), seen(view, _copied(args))
            except Exception as error:
                wrong.append(f"views[{k}] fails on the first batch: {type(error).__name__}: {error}")
                continue
        if not _alike(given, args):
            wrong.append(f"views[{k}] writes to its inputs: it must return new tensors")
        elif (have := list(map(_form, tree_leaves(first)))) != (want := list(map(_form, tree_leaves(args)))):
            wrong.append(f"views[{k}] makes {', '.join(have)} of {', '.join(want)}: it must leave shapes as they are")
        elif not _alike(first, second):
            wrong.append(f"views[{k}] is not the same twice: it must not draw at random")
    if wrong:
        raise InputError.listing("Distill", wrong)


def _copied(args: tuple) -> tuple:
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args)


def _form(x: Any) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" if isinstance(x, Tensor) else repr(x)


def _alike(a: Any, b: Any) -> bool:
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


def _devices(args: tuple) -> list[torch.device]:
    return [x.device for x in tree_leaves(args) if isinstance(x, Tensor) and x.is_cuda]
