"""U_i moved into the private weights that consume a space, so that the merged features need no op to be read.

Whether that is exact depends on what lies between, so it is tried: the private part is run on random merged features
both ways, and only an equal result is accepted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from .axes import AxisMap, apply, axis_map
from .parameters import tied_names
from .unmerge import Unmerge

if TYPE_CHECKING:
    from ..infer.spaces import Spaces
    from ..match import Matching

TOLERANCE = 1e-3  # of the largest output
_UNITS = 8  # of rounding, in half precision; a wrong absorption is off by the size of the features themselves


@dataclass(frozen=True)
class Value:
    """A boundary value with features: its axes and, per model, the map z -> f_i of the flattened axes."""

    axes: tuple[int, ...]
    spaces: frozenset[str]
    maps: tuple[AxisMap, ...]
    trivial: bool


def consumed_only(values: Mapping[str, Value], spaces: Spaces, private: Collection[str]) -> set[str]:
    """Boundary spaces that every private parameter in them consumes (a tied one may also produce). One read in blocks
    is not among them: blocks move with what they make."""
    held = {s for v in values.values() for s in v.spaces}
    first_name = tied_names(spaces)
    keys = {first_name.get(n, n) for n in private}
    return {
        s.name
        for s in spaces
        if s.name in held and all("consume" in g.roles and g.blocks == 1 for g in s.segments if g.parameter in keys)
    }


def groups(values: Mapping[str, Value]) -> list[set[str]]:
    """Spaces that share a boundary value are absorbed together or not at all."""
    import networkx as nx

    graph = nx.Graph()
    for value in values.values():
        if not value.trivial:
            first, *rest = sorted(value.spaces)
            graph.add_node(first)
            graph.add_edges_from((first, s) for s in rest)
    return [set(c) for c in nx.connected_components(graph)]


def absorb(
    state: Mapping[str, Tensor],
    spaces: Spaces,
    matchings: Mapping[str, Matching],
    absorbed: Collection[str],
    i: int,
) -> dict[str, Tensor]:
    """`state` with W x_axis U_i^T on every axis that consumes an absorbed space."""
    axes: dict[tuple[str, int], list] = {}
    first_name = tied_names(spaces)
    aliases: dict[str, list[str]] = {}
    for name in state:
        aliases.setdefault(first_name.get(name, name), []).append(name)
    for space in spaces:
        for segment in space.segments if space.name in absorbed else ():
            piece = (space.name, segment.positions, matchings[space.name].blocks_unmerge(i))
            for name in aliases.get(segment.parameter, ()):
                axes.setdefault((name, segment.axis), []).append(piece)
    result = dict(state)
    for (name, axis), pieces in axes.items():
        w = result[name]
        length = w.shape[axis] + sum(len(p) - u.shape[0] for _, p, u in pieces)  # of model 0
        step = axis_map(pieces, length, f"{name}[axis {axis}]", flip=True)
        exactly = w.to("cpu", torch.complex128 if w.is_complex() else torch.float64)
        result[name] = apply(exactly, axis, step).contiguous().to(w.device, w.dtype)
    return result


def exact(
    networks: Sequence[fx.GraphModule],
    kept: Sequence[Mapping[str, Tensor]],
    captured: Mapping[str, Any],
    values: Mapping[str, Value],
    spaces: Spaces,
    matchings: Mapping[str, Matching],
    group: set[str],
) -> bool:
    """Whether absorbing `group` leaves every model's private part unchanged, on random features."""
    for i, network in enumerate(networks):
        generator = torch.Generator().manual_seed(i)
        plain, merged = {}, {}
        for name, value in captured.items():
            plain[name] = merged[name] = value
            if name in values and values[name].spaces & group:
                merged[name] = _random(value, values[name], i, generator)
                plain[name] = Unmerge(values[name].axes, values[name].maps[i], value.dtype)(merged[name].cpu())
                plain[name] = plain[name].to(value.device)
        state = absorb(kept[i], spaces, matchings, group, i)
        try:
            got, want = _run(network, state, merged), _run(network, kept[i], plain)
        except (RuntimeError, ValueError, TypeError):  # say, a norm that insists on the old width
            return False
        if len(got) != len(want) or not all(close(a, b, _UNITS) for a, b in zip(got, want, strict=True)):
            return False
    return True


def _random(value: Tensor, held: Value, i: int, generator: torch.Generator) -> Tensor:
    """Normal features in the shape of `value`, at the merged width. It holds numbers, see `numbers`."""
    shape = list(value.shape)
    if len(held.axes) == 1:
        shape[held.axes[0]] = held.maps[i].length_in
    drawn = torch.complex64 if value.is_complex() else torch.float32
    return torch.randn(shape, generator=generator, dtype=drawn).to(value.device, value.dtype)


def _run(network: fx.GraphModule, state: Mapping[str, Tensor], values: Mapping[str, Any]) -> list[Any]:
    args = tuple(copied(values[n.name]) for n in network.graph.nodes if n.op == "placeholder")
    copies = {n: t.clone() for n, t in state.items()}
    with torch.no_grad():
        return tree_leaves(torch.func.functional_call(network, copies, args, tie_weights=False))


def close(got: Any, want: Any, units: int = 0) -> bool:
    """Equal up to TOLERANCE of the largest number that is wanted, or up to `units` of rounding of its dtype where that
    is more. Indices, truth values and what is no tensor are equal, or not."""
    if not isinstance(got, Tensor) or not isinstance(want, Tensor):
        return type(got) is type(want) and got == want
    if got.shape != want.shape or not numbers(want):
        return torch.equal(got, want)
    scale = max(1e-12, float(want.abs().max())) if want.numel() else 1.0
    tolerance = max(TOLERANCE, units * torch.finfo(want.dtype).eps)
    return bool(((got - want).abs() <= tolerance * scale).all())


def numbers(value: Tensor) -> bool:
    """Whether `value` is no index and no truth value: sums of such have a meaning."""
    return value.is_floating_point() or value.is_complex()


def copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
