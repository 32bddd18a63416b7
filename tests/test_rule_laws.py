"""Rules that only move entries, on labels alone: a label must be where the operator moves the entries it labels.

The operator itself moves an array of labels; what comes out is compared with what the rule says, entry by entry. Two
labels agree when the rule relates them (a copy and its original, a feature and its marginal). No graph, no network.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from moves import FREE, MOVES, NOTHING, Draw, Shape
from torch import Tensor

from fxzip.infer.labels import Group, LabelledType, label_of, tag_of
from fxzip.infer.relations import Relations
from fxzip.infer.rules import OutSpec, Refusal, Value, apply
from fxzip.infer.rules.registry import rule, values_in

aten = torch.ops.aten
DRAWS = 60


class Notes:
    """The engine's, without an engine."""

    def __init__(self) -> None:
        self.relations = Relations()
        self.relations.fresh([1])  # the label NOTHING
        self.kinds: list[str] = []

    def role(self, labels: np.ndarray, role: str) -> None: ...

    def nonlinear(self, groups: Iterable[Group], kind: str) -> None:
        self.kinds.append(kind)


def some_labels(draw: Draw, notes: Notes, shape: list[int]) -> LabelledType:
    """Some axes labelled, alone or two together; never those of size 1."""
    axes = [a for a in draw.rng.permutation(len(shape)) if shape[a] > 1]
    groups = []
    while axes:
        taken, axes = (axes[:2], axes[2:]) if draw(True, False, False) else (axes[:1], axes[1:])
        if draw(True, True, False):
            mine = tuple(sorted(int(a) for a in taken))
            groups.append(Group(mine, notes.relations.fresh([shape[a] for a in mine])))
    return LabelledType(tuple(shape), tuple(groups))


@pytest.mark.parametrize("make", MOVES, ids=lambda f: f.__name__)
def test_labels_go_where_their_entries_go(make):
    taken = 0
    for seed in range(DRAWS):
        draw = Draw(seed)
        op, args, kwargs = make(draw)
        notes = Notes()
        types: list[LabelledType] = []
        results = _results(op, args, kwargs, lambda s: torch.full(list(s), NOTHING))
        out = [OutSpec(tuple(r.shape), r.dtype) for r in results]
        found = apply(notes, op, _values(args, notes, draw, types), kwargs, out)
        if isinstance(found, Refusal):
            continue
        taken, said = taken + 1, Said(notes)
        for group in [g for t in types for g in t.groups]:
            queue = iter(types)
            moved = _results(op, args, kwargs, lambda _, q=queue, g=group: _entries(next(q), g))
            for labelled, entries in zip(found, moved, strict=True):
                problem = _disagrees(said, labelled, entries.long().numpy())
                assert not problem, f"seed {seed}: {op} of {args}, {[_axes(t) for t in types]}: {problem}"
        for labelled in found:
            axes = [a for g in labelled.groups for a in g.axes]
            assert len(set(axes)) == len(axes), f"seed {seed}: {op} of {args}: groups {_axes(labelled)} overlap"
            assert all(labelled.shape[a] > 1 for a in axes), f"seed {seed}: {op} of {args}: labels along size 1"
        inert = [(k, a) for k, t in enumerate(types) for a in range(len(t.shape)) if t.group_of(a) is None]
        for k, axis in inert:
            numbers = iter(range(len(types)))
            moved = _results(op, args, kwargs, lambda s, n=numbers, k=k, a=axis: _places(s, a, next(n) == k))
            for labelled, entries in zip(found, moved, strict=True):
                problem = _reorders(said, labelled, entries.long().numpy())
                assert not problem, f"seed {seed}: {op} of {args}, {[_axes(t) for t in types]}: {problem}"
        homes = {kind for _, _, kind in notes.relations.homes}
        kinds = {int(k) for edges in (notes.relations.one, notes.relations.many) for e in edges for k in e[2]}
        own = {k for k in kinds if k < 1 << 32}  # others are hashes
        assert own <= set(range(1, notes.relations.types())) - homes, f"seed {seed}: {op} of {args}: kinds not its own"
        assert make not in FREE or not said.pinned, f"seed {seed}: {op} of {args} pins features"
        for labelled in types:
            for group in labelled.groups:
                own = {said.one(int(x)) for x in group.labels.ravel()}
                assert len(own) == group.labels.size, f"seed {seed}: {op} of {args} makes two features of a tensor one"
    assert taken > DRAWS // 2


def _axes(labelled: LabelledType) -> list:
    return [g.axes for g in labelled.groups]


def _results(op: Any, args: list, kwargs: dict, tensor: Callable[[Shape], Tensor]) -> list[Tensor]:
    def made(x: Any) -> Any:
        if isinstance(x, Shape):
            return tensor(x).double()  # some operators take no integers
        return [made(y) for y in x] if isinstance(x, list) else x

    result = op(*[made(a) for a in args], **kwargs)
    return list(result) if isinstance(result, (list, tuple)) else [result]


def _values(args: list, notes: Notes, draw: Draw, types: list[LabelledType]) -> list:
    def made(x: Any) -> Any:
        if isinstance(x, Shape):
            types.append(some_labels(draw, notes, x))
            return Value(types[-1], torch.float64)
        if isinstance(x, Tensor):
            return Value(LabelledType(tuple(x.shape)), x.dtype, const=x)
        return [made(y) for y in x] if isinstance(x, list) else x

    return [made(a) for a in args]


def _entries(labelled: LabelledType, group: Group) -> Tensor:
    """A tensor whose entries say which label of the group they carry, if it is one of this operand."""
    if not any(group is g for g in labelled.groups):
        return torch.full(labelled.shape, NOTHING)
    spread = group.aligned(range(len(labelled.shape)))
    return torch.from_numpy(np.broadcast_to(spread, labelled.shape).copy())


def _places(shape: list[int], axis: int, mine: bool) -> Tensor:
    """A tensor whose entries say where along `axis` they are, from 1 on."""
    index = torch.arange(1, shape[axis] + 1) if mine else torch.tensor([NOTHING])
    sizes = [shape[axis] if mine and a == axis else 1 for a in range(len(shape))]
    return index.reshape(sizes).expand(list(shape)).clone()


def _reorders(told: Said, labelled: LabelledType, places: np.ndarray) -> str:
    """Whether features of one result may change places with one another where the operand's axis had no labels: then
    entries at different places must carry different tags, or labels of their own that say so."""
    still = told.pinned | told.derived
    for group in labelled.groups:
        front = [np.moveaxis(x, group.axes, range(len(group.axes))) for x in (places, *_spread(group, places))]
        along = [x.reshape(int(np.prod(x.shape[: len(group.axes)])), -1).T.tolist() for x in front]
        for rows in zip(*along, strict=True):  # the other axes stand still
            at: dict[int, int] = {}
            for place, label, tag in zip(*rows, strict=True):
                if place != NOTHING and label not in still and at.setdefault(tag, place) != place:
                    return f"axes {group.axes} have labels that may change places {at[tag]} and {place}"
    return ""


def _spread(group: Group, like: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels and tags of a group for every entry of an array."""
    whole = np.broadcast_to(group.aligned(range(like.ndim)), like.shape)
    return label_of(whole), tag_of(whole)


def _disagrees(said: Said, labelled: LabelledType, entries: np.ndarray) -> str:
    """How the type of a result contradicts the entries that the operator put there; "" if it does not."""
    if not entries.size:
        return ""
    related = {int(x): said.related(int(x)) for x in np.unique(entries) if x != NOTHING}

    def apart(x: int, y: int) -> bool:
        """Two features that may not lie along an axis without labels."""
        return x != y and NOTHING not in (x, y) and not {x, y} & said.pinned and not related[x] & related[y]

    for axis in (a for a in range(entries.ndim) if labelled.group_of(a) is None):
        first = np.broadcast_to(np.take(entries, [0], axis), entries.shape)
        if any(apart(*pair) for pair in {*zip(first.ravel().tolist(), entries.ravel().tolist(), strict=True)}):
            return f"axis {axis} has no labels, but its entries differ"
    for group in labelled.groups:
        spread, _ = _spread(group, entries)
        for label, is_ in {*zip(spread.ravel().tolist(), entries.ravel().tolist(), strict=True)}:
            about = said.related(label) & related.keys()
            if is_ != NOTHING and about and not about & related[is_]:
                return f"label {label} stands for {sorted(about)} where the operator puts {is_}"
    return ""


class Said:
    """What the rule said about labels."""

    def __init__(self, notes: Notes) -> None:
        r = notes.relations
        self.pinned = set(chain.from_iterable(p.tolist() for p in r.pinned))
        self.derived = set(chain.from_iterable(new.tolist() for new, _ in r.derived))
        self.same: dict[int, set[int]] = defaultdict(set)
        up, down = defaultdict(set), defaultdict(set)
        for edges, there, back in ((r.one, self.same, self.same), (r.many, up, down)):
            for u, v, _ in edges:
                for a, b in zip(label_of(u).ravel().tolist(), label_of(v).ravel().tolist(), strict=True):
                    there[a].add(b)
                    back[b].add(a)
        self.ways = [{k: self.same.get(k, set()) | w.get(k, set()) for k in {*self.same, *w}} for w in (up, down)]

    def one(self, label: int) -> int:
        """One number for all labels that are one-to-one."""
        return min(_closure({label}, self.same))

    def related(self, label: int) -> set[int]:
        """The label, what is one-to-one with it, what it belongs to, and what belongs to it."""
        return _closure({label}, self.ways[0]) | _closure({label}, self.ways[1])


def _closure(start: set[int], edges: dict[int, set[int]]) -> set[int]:
    found, todo = set(start), list(start)
    while todo:
        for other in edges.get(todo.pop(), ()):
            if other not in found:
                found.add(other)
                todo.append(other)
    return found


def test_tensors_are_found_in_lists_of_lists():
    a, b = Value(LabelledType(()), torch.int64), Value(LabelledType((2,)), torch.int64)
    assert values_in([a, [b, (1, a)], None]) == [a, b, a]


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (3, 2), (2, 8)])
@pytest.mark.parametrize("axis", [0, 1])
def test_an_inert_axis_that_was_flattened_in_comes_out_again(shape, axis):
    notes = Notes()
    before = LabelledType(shape, (Group((axis,), notes.relations.fresh([shape[axis]])),))
    flat = notes.relations.reshape(before, (shape[0] * shape[1],))
    back = notes.relations.reshape(flat, shape)
    assert _axes(flat) == [(0,)] and tag_of(flat.groups[0].labels).max() == shape[1 - axis] - 1
    assert _axes(back) == [(axis,)] and np.array_equal(back.groups[0].labels, before.groups[0].labels)


def test_an_axis_that_only_lends_a_factor_stays_inert():
    """(4, f) -> (2, 2 f): the first axis of the result is no feature."""
    notes = Notes()
    before = LabelledType((4, 6), (Group((1,), notes.relations.fresh([6])),))
    assert _axes(notes.relations.reshape(before, (2, 12))) == [(1,)]


SCALARS = [
    (aten.sum.dim_IntList, [[0]]), (aten.amax.default, [[-1]]), (aten.cumsum.default, [0]), (aten.sort.default, [0]),
    (aten._softmax.default, [0, False]), (aten.argmax.default, [0]), (aten.squeeze.default, []), (aten.t.default, []),
    (aten.index_select.default, [0, torch.zeros(1, dtype=torch.int64)]), (aten.flip.default, [[]]),
    (aten.gather.default, [0, torch.zeros((), dtype=torch.int64)]), (aten.expand.default, [[2]]),
]  # fmt: skip


@pytest.mark.parametrize("op, more", SCALARS, ids=lambda x: str(x) if not isinstance(x, list) else "")
def test_scalars_are_taken(op, more):
    """PyTorch lets them pass for tensors of one axis."""
    results = _results(op, [Shape([]), *more], {}, lambda s: torch.ones(list(s)))
    out = [OutSpec(tuple(r.shape), r.dtype) for r in results]
    found = apply(Notes(), op, _values([Shape([]), *more], Notes(), Draw(0), []), {}, out)
    assert not isinstance(found, Refusal)
    free = [(0,)] if op is aten.expand.default else []
    assert [_axes(t) for t in found] == [free for _ in out]


X, INDEX = Shape([4, 6]), torch.zeros(2, 3, dtype=torch.int64)
SIXTH = [Shape([1, 2, 3, 3, 3, 3]), Shape([2, 2, 1, 1, 1, 1]), None, [1], [0], [1], False, [0], 1]
REFUSED = {
    "an index of (2, 3) covers part of a tensor of (4, 6)": (aten.gather.default, [X, 1, INDEX]),
    "an index of (3, 5) covers part of a tensor of (4, 6)": (aten.index_add.default, [X, 0, INDEX[0], Shape([3, 5])]),
    "an index of (1, 3) covers part of a tensor of (4, 6)": (aten.scatter.value, [X, 1, INDEX[:1], 0.0]),
    "an index of (1, 4, 3) covers part of a tensor of (2, 4, 6)": (
        aten.gather.default,
        [Shape([2, 4, 6]), 2, torch.zeros(1, 4, 3, dtype=torch.int64)],
    ),
    "no rule for prims.transpose.default": (torch.ops.prims.transpose.default, [X, [1, 0]]),
    "add does not broadcast [(4, 2), (4, 1)] to [(4, 6)]": (aten.add.Tensor, [Shape([4, 2]), Shape([4, 1])]),
    "indexing with a mask and other indices at once": (aten.index.Tensor, [X, [INDEX[0] > 0, INDEX[0]]]),
    "dropout is active": (aten.native_dropout.default, [X, 0.5, True]),
    "rrelu is random in training mode": (aten.rrelu_with_noise_functional.default, [X, X, 0.1, 0.3, True]),
    "unfold of a scalar": (aten.unfold.default, [Shape([]), 0, 1, 1]),
    "no rule for aten.diagonal.default": (aten.diagonal.default, [X]),
    "no rule for aten.bernoulli.default": (aten.bernoulli.default, [X]),
    "convolution of (1, 2, 3, 3, 3, 3) with a weight of (2, 2, 1, 1, 1, 1)": (aten.convolution.default, SIXTH),
}  # fmt: skip


def test_an_operator_has_one_rule():
    with pytest.raises(ValueError, match="two rules for mm"):
        rule("mm")(lambda ctx, out, **_: [])


@pytest.mark.parametrize("shape, taken", [((4, 6), True), ((0,), True), ((4, 1), False)])
def test_every_result_of_an_element_wise_operator_has_its_shape_or_is_empty(shape, taken):
    out = [OutSpec((4, 6), torch.float32), OutSpec(shape, torch.float32)]
    found = apply(Notes(), aten.log_sigmoid_forward.default, _values([X], Notes(), Draw(0), []), {}, out)
    assert isinstance(found, list) == taken


@pytest.mark.parametrize("reason", REFUSED)
def test_what_no_rule_covers_is_refused_with_the_reason(reason):
    op, args = REFUSED[reason]
    notes = Notes()
    values = _values(args, notes, Draw(0), [])
    found = apply(notes, op, values, {}, [OutSpec((4, 6), torch.float32)])
    assert isinstance(found, Refusal) and reason in found.reason
