"""One merge point: rows from the lanes, ridge least squares, parameters written back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..allocator import relieve
from ..errors import InputError
from ..infer import Spaces
from ..match import Matching
from .affine import MOVES, Link, packet, undo
from .design import design_of, pick
from .folding import Point, folded, other, write_back
from .lanes import Chunks, Lane
from .mixing import Mixer, mixer
from .refine import Kept, refine
from .ridge import Gram, ridge
from .slots import Slot, argument, arguments

BLOCK = 2_048  # design rows that are multiplied at once, where there are so many: sums in float64 cost per block


@dataclass(frozen=True)
class Settings:
    """lam: ridge, relative to each input's energy. rows: design rows per column, and `least` in all unless that is more
    than `plenty` per column. sweeps: re-targetings through the next non-linearity (0: plain least squares), fewer where
    rows are few or a fit is close without. memory: bytes of activations held at once; more goes to temporary files
    (where TMPDIR says). feedback: aim behind additions, and repair there what the other branch has lost."""

    lam: float = 1e-3
    rows: int = 10
    least: int = 32_768
    plenty: int = 100
    sweeps: int = 3
    memory: float = 1e9
    seed: int = 0
    feedback: bool = True

    def __post_init__(self) -> None:
        least = {"lam": 0, "rows": 1, "least": 1, "plenty": 1, "sweeps": 0, "memory": 0}
        wrong = [n for n, low in least.items() if not getattr(self, n) >= low]
        if wrong:
            raise InputError.listing(
                "Settings", [f"{n} must be at least {least[n]}, got {getattr(self, n)!r}" for n in wrong]
            )


Mix = Callable[[Sequence[Tensor]], Tensor]
Outcome = tuple[float, float]  # relative squared error against the target, before and after


@dataclass(frozen=True)
class Parts:
    """What a fit writes to, and how parents' values become its target."""

    weight: Slot
    bias: Slot | None
    mix: Mix


def parts_of(point: Point, spaces: Spaces, matchings: Mapping[str, Matching]) -> Parts | None:
    """None where a contraction cannot be fitted: the weight or the bias is used elsewhere too, is computed or complex,
    or no matched space is visible."""
    node = point.lane.nodes[point.name]
    design = design_of(node)
    assert design is not None  # `Pass` asks first
    weight = Slot.of(point.lane, argument(node, design.weight))
    bias = Slot.of(point.lane, argument(node, design.bias)) if design.bias else None
    tied = bias is None and argument(node, design.bias) is not None  # it would stay, and no longer fit the weight
    if weight is None or tied or isinstance(argument(node, "padding"), str) or node.meta["dtype"].is_complex:
        return None
    mix = _mixer(point, spaces, matchings)
    return None if mix is None else Parts(weight, bias, mix)


def solve_point(
    point: Point,
    parts: Parts,
    settings: Settings,
    chunks: Chunks,
    dynamic: Mapping[str, fx.Node],
    generator: torch.Generator,
) -> Outcome:
    """Fit the weights of one contraction in `point.lane`, whose parents have their values at `point.last`."""
    node = point.lane.nodes[point.name]
    design, weight, bias, mix = design_of(node), parts.weight, parts.bias, parts.mix
    assert design is not None
    intercept = bias is not None or point.normed
    groups, each = int(argument(node, "groups") or 1), 0
    bend = nonlinearity(point.last, point.links, dynamic) if settings.sweeps else None

    def values(j: int) -> dict[str, Any]:
        return {n: _value(v, point.lane, j, dynamic) for n, v in arguments(node).items()}

    matrix, seen = design.matrix(point.lane.static(argument(node, design.weight)), groups), design.seen(arguments(node))
    fitting = matrix.shape[-1] if seen is None else len(seen)  # columns; rows have all of them at first
    count = min(wanted_rows(settings, len(matrix), n) for n in (fitting, matrix.shape[-1])) // chunks.total + 1
    others = design.rows(values(0), 1, torch.Generator()).of if chunks.own < chunks.total else 0

    def drawn() -> Iterator[tuple[Kept, bool]]:
        nonlocal each
        for k, j in enumerate(chunks):
            if j is None:  # draw as the rank that has it does: all chunks have one shape
                pick(others, count, generator, torch.device("cpu"))
                continue
            rows = design.rows(values(j), count, generator)
            each = len(rows.x)  # of every chunk
            wanted, full = _target(point, mix, j, dynamic, rows.y)
            x, target = _single(rows.x if seen is None else rows.x[..., seen]), _single(wanted)
            x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], -1) if intercept else x
            yield (x, target, target if bend is None else _single(full)), chunks.ends(k)

    gram, kept = Gram(), []
    for x, target, full in _joined(drawn()):
        gram.add(x, target)
        if bend is not None:
            kept.append(point.lane.store.keep((x, target, full)))
    gram.reduce(chunks.processes)
    whole = folded(point, design, weight, bias, groups, intercept)
    fitted = slice(None) if seen is None else torch.cat([seen, torch.arange(matrix.shape[-1], whole.shape[-1])])
    start = whole[..., fitted]
    relieve()  # rows and values that went make room for what takes most
    if bend is None:
        fit = ridge(gram, start, settings.lam)
    else:
        fit = refine(gram, start, settings.lam, settings.sweeps, kept, bend, chunks.processes, each)
    statistics = _statistics(fit.weights, gram) if point.normed else None
    whole[..., fitted] = fit.weights
    write_back(point, design, weight, bias, whole, statistics, intercept)
    return fit.before, fit.after


def _joined(rows: Iterable[tuple[Kept, bool]]) -> Iterator[Kept]:
    """The same rows, up to the end of chunks that are dealt together, or `BLOCK` of them."""
    block: list[Kept] = []
    for part, ends in rows:
        block.append(part)
        if ends or sum(len(x) for x, _, _ in block) >= BLOCK:
            yield block[0] if len(block) == 1 else tuple(map(torch.cat, zip(*block, strict=True)))  # type: ignore[misc]
            block.clear()


def _single(x: Tensor) -> Tensor:
    """At least float32: sums of products overflow in half precision, and tolerances vanish."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _value(given: Any, lane: Lane, chunk: int, dynamic: Mapping[str, fx.Node]) -> Any:
    return lane.operand(given, chunk, dynamic) if isinstance(given, fx.Node) else given


def wanted_rows(settings: Settings, groups: int, columns: int) -> int:
    """Design rows of one fit, of all chunks together; their float32 take `settings.memory` at most."""
    most = max(int(settings.memory / 4 / (groups * columns)), columns)
    return min(max(settings.rows * columns, min(settings.least, settings.plenty * columns)), most)


# -- targets ----------------------------------------------------------------------------------------


def _mixer(point: Point, spaces: Spaces, matchings: Mapping[str, Matching]):
    return mixer_at(point.last, point.parents, point.shared, spaces, matchings)


def mixer_at(name: str, parents: Sequence[Lane], shared: bool, spaces: Spaces, matchings: Mapping[str, Matching]):
    layouts = spaces.layouts(name)
    visible = {s for k in layouts for s, _ in k.runs}
    if not shared:  # a head's own coordinates, unless merged features only pass through here
        return None if visible & parents[0].absorbed else lambda values: values[0]
    if not mixable(name, parents[0], spaces):
        return None
    shape = parents[0].nodes[name].meta["shape"]
    found: Mixer | None = mixer(layouts, shape, matchings, [p.share for p in parents], f"%{name}")
    return found


def mixable(name: str, parent: Lane, spaces: Spaces) -> bool:
    """Whether the parents' values can be mixed at this node: on the data, too, the axes of features hold nothing else
    (a reshape may put heads and batch into one)."""
    analysed = next(n for n in spaces.lowered.graph.nodes if n.name == name).meta["shape"]
    here = parent.nodes[name].meta["shape"]
    return all(here[a] == analysed[a] for k in spaces.layouts(name) for a in k.axes)


def _target(
    point: Point, mix: Mix, chunk: int, dynamic: Mapping[str, fx.Node], drawn: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """(target of the contraction's own output, the value wanted at `last`), rows [r, g, o]. drawn: takes these from a
    value in the contraction's layout."""
    lane, values = point.lane, [p.value(point.last, chunk) for p in point.parents]
    others = {k: lane.operand(other(lane, k), chunk, dynamic) for k in point.links if k.kind in ("add", "subtract")}
    features = 1 if packet(lane.nodes[point.name]) == "convolution" else values[0].dim() - 1
    whole = torch.Size(lane.nodes[point.last].meta["shape"])
    plain = all(k.kind != "move" for k in point.links) and all(t.shape == whole for t in (*values, *others.values()))
    if isinstance(mix, Mixer) and mix.axes == (features,) and plain:  # mix what is drawn, not all there is
        groups = drawn(values[0]).shape[1]
        rows = [drawn(v).flatten(1) for v in values]
        values, mix = rows, replace(mix, axes=(1,))
        others = {k: drawn(o).flatten(1) for k, o in others.items()}
        drawn = lambda t: t.unflatten(1, (groups, -1))  # noqa: E731
    target = full = mix(values)
    for link in reversed(point.links):
        here, shape = lane.nodes[link.node.name], tuple(lane.nodes[link.source.name].meta["shape"])
        own = Link(link.kind, here, link.source)
        if link not in others:
            full = undo(own, full, shape, None)
        target = undo(own, target, shape, others.get(link))
    return drawn(target), drawn(full)


def nonlinearity(
    last: str, links: Sequence[Link], dynamic: Mapping[str, fx.Node]
) -> Callable[[Tensor], Tensor] | None:
    """The element-wise op of one tensor that alone reads the value at `last`, if there is one and it gives numbers. Who
    gets an output reads it, too."""
    readers = [u for u in dynamic[last].users if u.name in dynamic or u.op == "output"]
    if len(readers) != 1 or any(k.kind == "scalar" for k in links):
        return None
    node = readers[0]
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    if (
        not pointwise
        or not node.meta["dtype"].is_floating_point  # a comparison
        or packet(node) in MOVES
        or len(node.all_input_nodes) != 1
        or node.args[0] is not dynamic[last]
    ):
        return None
    return lambda x: node.target(x, *node.args[1:], **node.kwargs)  # type: ignore[operator]


def _statistics(solution: Tensor, gram: Gram) -> tuple[Tensor, Tensor]:
    """Mean and variance [g * o] of what a contraction makes of its input, without the shift."""
    matrix = solution[..., :-1]
    mean_x = gram.second[..., -1, :-1]  # [g, p]: the last column is the constant 1, and a ridge has left means
    mean = (matrix @ mean_x.unsqueeze(-1)).flatten()
    return mean, ((matrix @ gram.second[..., :-1, :-1]) * matrix).sum(-1).flatten() - mean**2
