"""One merge point: rows from the lanes, ridge least squares, parameters written back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..infer import Spaces
from ..match import Matching
from .affine import BATCH_NORMS, MOVES, Link, packet, undo
from .design import DESIGNS, Design
from .lanes import Lane
from .mixing import Mixer, mixer
from .refine import refine
from .ridge import Gram, ridge

NORMS = BATCH_NORMS | {"native_layer_norm", "native_group_norm"}


@dataclass(frozen=True)
class Settings:
    """lam: ridge, relative to each input's energy. rows: design rows per column, at least `least` in all."""

    lam: float = 1e-3
    rows: int = 10
    least: int = 32_768
    sweeps: int = 8  # of the refinement below; 0 switches it off
    seed: int = 0


@dataclass(frozen=True)
class Point:
    """A contraction `name` whose target is taken at `last`; links lead from one to the other.

    parents: the lanes whose values at `last` are the target (all N, or the one model that owns a head).
    """

    name: str
    last: str
    links: Sequence[Link]
    lane: Lane
    parents: Sequence[Lane]
    shared: bool


Outcome = tuple[int, int, float, float]  # columns, rows, error before, error after


def solve_point(
    point: Point, spaces: Spaces, matchings: Mapping[str, Matching], settings: Settings, chunks: int,
    dynamic: Mapping[str, fx.Node], generator: torch.Generator,
) -> Outcome | None:
    """Fit the weights of one contraction in `point.lane`. None (and nothing written) where it cannot be fitted:
    the weight is used elsewhere too or is computed, the op is transposed, or no matched space is visible."""
    node = point.lane.nodes[point.name]
    design = DESIGNS[packet(node)]
    weight = _Slot.of(point.lane, argument(node, design.weight))
    bias = _Slot.of(point.lane, argument(node, design.bias)) if design.bias else None
    if weight is None or argument(node, "transposed") or isinstance(argument(node, "padding"), str):
        return None
    mix = _mixer(point, spaces, matchings)
    if mix is None:
        return None
    folds = [k for k in point.links if k.kind in ("norm", "scale")]
    intercept = bias is not None or any(k.kind == "norm" for k in folds)
    groups = int(argument(node, "groups") or 1)
    gram, kept = Gram(), []
    bend = _nonlinearity(point, dynamic) if settings.sweeps else None
    for j in range(chunks):
        given = {n: _value(v, point.lane, j, dynamic) for n, v in arguments(node).items()}
        count = _rows(settings, design.matrix(given[design.weight], groups), chunks)
        rows = design.rows(given, count, generator)
        wanted, full = _target(point, mix, j, dynamic)
        target = rows.y(wanted)
        x = torch.cat([rows.x, rows.x.new_ones(*rows.x.shape[:2], 1)], -1) if intercept else rows.x
        gram.add(x, target)
        if bend is not None:
            kept.append((x, target, rows.y(full)))
    start = _start(point, design, weight, bias, groups, intercept)
    fit = refine(gram, start, settings.lam, settings.sweeps, kept, bend) if bend else ridge(gram, start, settings.lam)
    _write(point, design, weight, bias, fit.weights, gram, intercept)
    return gram.second.shape[-1], gram.rows, fit.before, fit.after  # type: ignore[union-attr]


def solve_norm(
    node: fx.Node, first: str, lane: Lane, parents: Sequence[Lane], shared: bool, spaces: Spaces,
    matchings: Mapping[str, Matching], settings: Settings, chunks: int, dynamic: Mapping[str, fx.Node],
) -> Outcome | None:
    """Scale and shift of a norm, per feature, towards the parents' outputs; batch statistics are set first."""
    op = lane.nodes[node.name]
    scale, shift = (_Slot.of(lane, argument(op, n)) for n in ("weight", "bias"))
    mix = _mix(first, parents, shared, spaces, matchings)
    if scale is None or shift is None or mix is None or len(lane.state[scale.name].shape) != 1:
        return None
    if packet(op) in BATCH_NORMS:
        _set_statistics(op, lane, chunks, dynamic)
    size = lane.state[scale.name].shape[0]
    sums = torch.zeros(5, size, dtype=torch.float64, device=lane.state[scale.name].device)
    count = 0
    given = {scale.name: torch.ones_like(lane.state[scale.name]), shift.name: torch.zeros_like(lane.state[shift.name])}
    for j in range(chunks):
        plain = lane.apply(op, lambda n, j=j: _plain(lane, n, j, dynamic, given))[0]
        target = mix([p.value(first, j) for p in parents])
        axis = -1 if packet(op) == "native_layer_norm" else 1
        x, t = (v.movedim(axis, 0).reshape(size, -1).double() for v in (plain, target))
        sums += torch.stack([x.sum(1), t.sum(1), (x * x).sum(1), (x * t).sum(1), (t * t).sum(1)])
        count += x.shape[1]
    mx, mt, xx, xt, tt = sums / count
    old = lane.state[scale.name].double()
    var, cov = xx - mx * mx, xt - mx * mt
    gamma = (cov + settings.lam * var * old) / ((1 + settings.lam) * var).clamp(min=1e-12)
    beta = mt - gamma * mx
    before = float((tt - 2 * old * xt + old * old * xx).sum() / tt.sum().clamp(min=1e-300))
    after = float((tt - mt * mt - 2 * gamma * cov + gamma * gamma * var).sum() / tt.sum().clamp(min=1e-300))
    lane.write(scale.name, gamma)
    lane.write(shift.name, beta)
    return 2, count, before, max(after, 0.0)


# -- operands ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Slot:
    """Where an operand made from one parameter by data movement lives: operand == parameter.flatten()[index]."""

    name: str
    index: Tensor  # int64, shape of the operand

    @classmethod
    def of(cls, lane: Lane, node: Any) -> _Slot | None:
        """None when the operand is not moved from exactly one parameter that nothing else uses."""
        if not isinstance(node, fx.Node):
            return None
        sources, stack = set(), [node]
        while stack:
            current = stack.pop()
            if len(current.users) != 1 or "const" in current.meta:
                return None
            if "parameter" in current.meta:
                sources.add(current)
            stack.extend(current.all_input_nodes)
        if len(sources) != 1:
            return None
        name = lane.parameter(sources.pop())
        tensor = lane.state[name]
        numbered = torch.arange(tensor.numel(), device=tensor.device).reshape(tensor.shape)
        try:
            index = lane.static(node, {name: numbered})
        except RuntimeError:  # an op that does not take integers is no data movement
            return None
        moved = index.dtype == torch.int64 and len(index.unique()) == index.numel()
        return cls(name, index) if moved and torch.equal(lane.static(node), tensor.flatten()[index]) else None

    def write(self, lane: Lane, value: Tensor) -> None:
        flat = lane.state[self.name].flatten().clone()
        flat[self.index.flatten()] = value.flatten().to(flat)
        lane.write(self.name, flat.reshape(lane.state[self.name].shape))


def argument(node: fx.Node, name: str | None) -> Any:
    """An argument of an ATen op by its schema name; None if absent."""
    return arguments(node).get(name) if name else None


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an ATen op by schema name, defaults filled in."""
    found = {}
    for i, a in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        given = node.args[i] if i < len(node.args) else node.kwargs.get(a.name)
        found[a.name] = a.default_value if given is None and a.has_default_value() else given
    return found


def _value(given: Any, lane: Lane, chunk: int, dynamic: Mapping[str, fx.Node]) -> Any:
    return lane.operand(given, chunk, dynamic) if isinstance(given, fx.Node) else given


def _plain(lane: Lane, node: fx.Node, chunk: int, dynamic: Mapping[str, fx.Node], given: Mapping[str, Tensor]) -> Any:
    if "parameter" in node.meta and "const" not in node.meta and lane.parameter(node) in given:
        return given[lane.parameter(node)]
    return lane.operand(node, chunk, dynamic)


def _rows(settings: Settings, matrix: Tensor, chunks: int) -> int:
    return max(settings.rows * matrix.shape[-1], settings.least) // chunks + 1


# -- targets ----------------------------------------------------------------------------------------


def _mixer(point: Point, spaces: Spaces, matchings: Mapping[str, Matching]):
    return _mix(point.last, point.parents, point.shared, spaces, matchings)


def _mix(name: str, parents: Sequence[Lane], shared: bool, spaces: Spaces, matchings: Mapping[str, Matching]):
    if not shared:
        return lambda values: values[0]
    value = parents[0].values[name][0]
    found: Mixer | None = mixer(spaces.layouts(name), value.shape, matchings, len(parents), f"%{name}")
    return found


def _target(point: Point, mix, chunk: int, dynamic: Mapping[str, fx.Node]) -> tuple[Tensor, Tensor]:
    """(target of the contraction's own output, the value wanted at `last`), both in the contraction's layout."""
    lane = point.lane
    target = full = mix([p.values[point.last][chunk] for p in point.parents])
    for link in reversed(point.links):
        here = lane.nodes[link.node.name]
        shape = tuple(lane.nodes[link.source.name].meta["shape"])
        other = None
        if link.kind in ("add", "subtract"):
            second = next(a for a in here.args if isinstance(a, fx.Node) and a.name != link.source.name)
            other = lane.operand(second, chunk, dynamic)
        else:
            full = undo(Link(link.kind, here, link.source), full, shape, None)
        target = undo(Link(link.kind, here, link.source), target, shape, other)
    return target, full


def _nonlinearity(point: Point, dynamic: Mapping[str, fx.Node]) -> Callable[[Tensor], Tensor] | None:
    """The element-wise op of one tensor that alone reads the value at `last`, if there is one."""
    readers = [u for u in dynamic[point.last].users if u.name in dynamic]
    if len(readers) != 1 or any(k.kind == "scalar" for k in point.links):
        return None
    node = readers[0]
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    if not pointwise or packet(node) in MOVES or len(node.all_input_nodes) != 1 or node.args[0] is not dynamic[point.last]:
        return None
    return lambda x: node.target(x, *node.args[1:], **node.kwargs)  # type: ignore[operator]


# -- weights ----------------------------------------------------------------------------------------


def _start(point: Point, design: Design, weight: _Slot, bias: _Slot | None, groups: int, intercept: bool) -> Tensor:
    """W0 [g, o, p(+1)] in float64: the zipped weights with norm and scale folded in."""
    lane = point.lane
    matrix = design.matrix(lane.state[weight.name].flatten()[weight.index], groups).double()
    g, o, _ = matrix.shape
    shift = lane.state[bias.name].flatten()[bias.index].double() if bias else matrix.new_zeros(g * o)
    for link in point.links:
        if link.kind == "norm":
            gamma, beta, mean, var = (lane.static(a) for a in _norm(lane, link).args[1:5])
            scale = (gamma / torch.sqrt(var + _norm(lane, link).args[7])).double()
            matrix, shift = matrix * scale.reshape(g, o, 1), (shift - mean) * scale + beta
        elif link.kind == "scale" and link.other is not None:
            scale = lane.static(lane.nodes[link.other.name]).double().flatten()
            matrix, shift = matrix * scale.reshape(g, o, 1), shift * scale
    return torch.cat([matrix, shift.reshape(g, o, 1)], -1) if intercept else matrix


def _norm(lane: Lane, link: Link) -> fx.Node:
    return lane.nodes[link.other.name]  # type: ignore[union-attr]


def _write(
    point: Point, design: Design, weight: _Slot, bias: _Slot | None, solution: Tensor, gram: Gram, intercept: bool
) -> None:
    """Weights, bias and folded norms into the lane: a folded norm gets the exact statistics of its new input."""
    lane = point.lane
    matrix = solution[..., :-1] if intercept else solution  # [g, o, p]
    shift = solution[..., -1].flatten() if intercept else None  # [g * o]
    weight.write(lane, design.operand(matrix.to(lane.state[weight.name].dtype), weight.index.shape))
    norm = next((k for k in point.links if k.kind == "norm"), None)
    if norm is not None:
        s = gram.second / gram.rows  # type: ignore[operator]
        mean_x = s[..., -1, :-1]  # [g, p]: the last column is the constant 1
        mean = (matrix @ mean_x.unsqueeze(-1)).flatten()
        var = ((matrix @ s[..., :-1, :-1]) * matrix).sum(-1).flatten() - mean**2
        op = _norm(lane, norm)
        names = [lane.parameter(a) for a in op.args[1:5]]  # type: ignore[arg-type]
        var = var.clamp(min=1e-8)
        for name, value in zip(names, (torch.sqrt(var + op.args[7]), shift + mean, mean, var), strict=True):
            lane.write(name, value)
        shift = torch.zeros_like(mean)
    for link in point.links:
        if link.kind == "scale" and link.other is not None:
            name = lane.parameter(lane.nodes[link.other.name])
            lane.write(name, torch.ones_like(lane.state[name]))
    if bias is not None and shift is not None:
        bias.write(lane, shift)


def _set_statistics(op: fx.Node, lane: Lane, chunks: int, dynamic: Mapping[str, fx.Node]) -> None:
    """Running mean and variance of a batch norm: those of what it reads in the merged network."""
    total = square = torch.zeros((), dtype=torch.float64)
    count = 0
    for j in range(chunks):
        x = lane.operand(op.args[0], j, dynamic).movedim(1, 0).flatten(1).double()  # type: ignore[arg-type]
        total, square, count = total + x.sum(1), square + (x * x).sum(1), count + x.shape[1]
    mean = total / count
    lane.write(lane.parameter(op.args[3]), mean)  # type: ignore[arg-type]
    lane.write(lane.parameter(op.args[4]), (square / count - mean**2).clamp(min=1e-8))  # type: ignore[arg-type]
