"""Relations between labels. An op merges nothing; it emits typed edges, and the solver draws conclusions.

    one_to_one    these two labels are the same feature in two roles
    many_to_one   this label belongs to that one (o[h, d] -> m[h], a "marginal")
    mark          this label is distinguished: pinned to its index, or a member of slice k

Types are numbers; every emitting op instance has its own, so that nothing is confused that was not
emitted by the same statement. Statements are memoised: saying a thing twice adds no edge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from itertools import chain, combinations, product
from math import prod

import numpy as np

from .hashing import U64, mix, pair
from .labels import TAG_SHIFT, Group, LabelledType, Name, label_of, tag_of

_JOINT = 1 << 18  # labels of one group that overlapping ones are joined to, at most
Edges = tuple[np.ndarray, np.ndarray, np.ndarray]  # from, to, type


class Relations:
    """A growing set of labels, edges and marks. Only inference writes to it."""

    def __init__(self) -> None:
        self.size = 0
        self.homes: list[tuple[int, int, int]] = []  # first label, count, type
        self.one: list[Edges] = []
        self.many: list[Edges] = []
        self.marks: list[tuple[np.ndarray, np.ndarray]] = []
        self.opaque: list[np.ndarray] = []  # labels pinned by an output or by an op without a rule
        self.pinned: list[np.ndarray] = []  # labels pinned to an index for any reason
        self.ordered: list[np.ndarray] = []  # those among them that keep an order of their own
        self.placed: dict[Hashable, np.ndarray] = {}  # labels whose index is a place, the same in all models
        self.derived: list[tuple[np.ndarray, np.ndarray]] = []  # labels that stand for others: (new, source)
        self._next_type = 1
        self._memo: dict[Hashable, object] = {}

    # -- emitting ---------------------------------------------------------------------------------

    def types(self, k: int = 1) -> int:
        """Reserve k fresh edge types; returns the first."""
        first = self._next_type
        self._next_type += k
        return first

    def once(self, key: Hashable) -> bool:
        """True the first time `key` is seen."""
        if key in self._memo:
            return False
        self._memo[key] = True
        return True

    def fresh(self, shape: Sequence[int]) -> np.ndarray:
        """New labels, unrelated to any other, of one home."""
        count = int(np.prod(shape))
        labels = np.arange(self.size, self.size + count, dtype=np.int64).reshape(tuple(shape))
        self.homes.append((self.size, count, self.types()))
        self.size += count
        return labels

    def one_to_one(self, u: np.ndarray, v: np.ndarray, kind: int | np.ndarray) -> None:
        a, b, t = _edges(u, v, kind)
        proper = a != b
        if proper.any():
            self.one.append((a[proper], b[proper], t[proper]))

    def many_to_one(self, u: np.ndarray, v: np.ndarray, kind: int | np.ndarray) -> None:
        self.many.append(_edges(u, v, kind))

    def mark(self, labels: np.ndarray, key: int | np.ndarray) -> None:
        keys = np.broadcast_to(np.asarray(key, np.int64), labels.shape).ravel().astype(U64)
        tags = tag_of(labels).ravel()
        if tags.any():
            keys = pair(keys, tags.astype(U64))
        self.marks.append((label_of(labels).ravel(), keys))

    # -- statements about groups ------------------------------------------------------------------

    def pin(self, group: Group, axis: Name, placed: bool = False) -> None:
        """Nobody may reorder `axis` of this group. placed: its indices are places (pixels, tokens, offsets)."""
        p = group.axes.index(axis)
        key = ("pin", group.labels.tobytes(), group.labels.shape, p)
        if not placed:
            self.ordered.append(label_of(group.labels).ravel())
        elif key not in self.placed:
            self.placed[key] = label_of(group.labels).ravel()
        if not self.once(key):
            return
        self.pinned.append(label_of(group.labels).ravel())
        n = group.labels.shape[p]
        index = np.arange(n).reshape([n if i == p else 1 for i in range(group.labels.ndim)])
        self.mark(group.labels, self.types(n) + index)

    def pin_all(self, labelled: LabelledType, opaque: bool = False) -> None:
        """Pin every labelled axis. opaque: the indices mean something else in every model (an output,
        an op without a rule), so nothing pinned this way can be shared between models."""
        for group in labelled.groups:
            if opaque:
                self.opaque.append(np.unique(label_of(group.labels)))
            for axis in group.axes:
                self.pin(group, axis)

    def marginal(self, group: Group, keep: Collection[Name]) -> Group:
        """The group over the axes in `keep` only; every label belongs to its marginal label."""
        kept = tuple(a for a in group.axes if a in keep)
        if kept == group.axes:
            return group
        axes, labels = group
        position = tuple(axes.index(a) for a in kept)
        key = ("marginal", labels.tobytes(), labels.shape, position)
        known = self._memo.get(key)
        if isinstance(known, np.ndarray):
            return Group(kept, known)
        shape = [labels.shape[p] for p in position]
        reduced = self._tagged_marginal(labels, position)
        if reduced is None:
            reduced = self.fresh(shape)
        self._memo[key] = reduced
        view = reduced.reshape([labels.shape[p] if p in position else 1 for p in range(labels.ndim)])
        self.many_to_one(labels, np.broadcast_to(view, labels.shape), self.types())
        return Group(kept, reduced)

    def _tagged_marginal(self, labels: np.ndarray, position: tuple[int, ...]) -> np.ndarray | None:
        """Rows with identical labels, and a tag constant along what is dropped, share a marginal label."""
        if not tag_of(labels).any():
            return None
        rest = [p for p in range(labels.ndim) if p not in position]
        shape = [labels.shape[p] for p in position]
        rows = labels.transpose([*position, *rest]).reshape(int(np.prod(shape)), -1)
        tags = tag_of(rows)
        if not (tags == tags[:, :1]).all():
            return None
        digest = np.zeros(len(rows), U64)
        for column in label_of(rows).T:
            digest = pair(digest, column.astype(U64))
        _, inverse = np.unique(digest, return_inverse=True)
        if inverse.max() + 1 == len(rows):
            return None
        return (self.fresh([int(inverse.max()) + 1])[inverse] | (tags[:, 0] << TAG_SHIFT)).reshape(shape)

    def relate(self, a: Group, b: Group) -> None:
        """Along the axes they have in common, a and b run over the same index set."""
        common = [x for x in a.axes if x in b.axes]
        if not common or (a.axes == b.axes and np.array_equal(a.labels, b.labels)):
            return
        shared = (tuple(a.axes.index(x) for x in common), tuple(b.axes.index(x) for x in common))
        if not self.once(("relate", a.labels.tobytes(), b.labels.tobytes(), a.labels.shape, b.labels.shape, shared)):
            return
        if len(common) < len(a.axes) and len(common) < len(b.axes):
            a, b = self.marginal(a, common), self.marginal(b, common)
        if len(a.axes) == len(b.axes):
            self.one_to_one(a.labels, b.aligned(a.axes), self.types())
            return
        big, small = (a, b) if len(a.axes) > len(b.axes) else (b, a)
        self.many_to_one(big.labels, np.broadcast_to(small.aligned(big.axes), big.labels.shape), self.types())

    def mixed(self, group: Group, axes: Collection[Name]) -> None:
        """An op mixes along `axes` symmetrically and treats the group's other axes as batch."""
        rest = [a for a in group.axes if a not in axes]
        if rest and len(rest) < len(group.axes):
            self.marginal(group, rest)

    def join(self, names: Sequence[Name], sizes: Mapping[Name, int], groups: Sequence[Group]) -> Group:
        """One joint group over `names`, from groups, which may overlap, and inert names."""
        names = tuple(names)
        shape = tuple(sizes[n] for n in names)
        labelled = set(chain.from_iterable(g.axes for g in groups))
        if len(groups) == 1 and labelled == set(names):
            return Group(names, np.ascontiguousarray(groups[0].aligned(names)))
        key = ("join", shape, tuple((tuple(names.index(x) for x in g.axes), g.labels.tobytes()) for g in groups))
        known = self._memo.get(key)
        if not isinstance(known, np.ndarray):
            known = self._joined(names, shape, labelled, groups)
            self._memo[key] = known
        return Group(names, known)

    def _joined(self, names: tuple, shape: tuple[int, ...], labelled: set, groups: Sequence[Group]) -> np.ndarray:
        still = [shape[i] if n not in labelled else 1 for i, n in enumerate(names)]
        count = int(np.prod(still))
        index = np.broadcast_to(np.arange(count).reshape(still), shape)  # position along the inert names
        if len(groups) == 1:  # tagged labels instead of new ones
            source = np.broadcast_to(groups[0].aligned(names), shape)
            tags = np.unique(tag_of(source) * count + index, return_inverse=True)[1].reshape(shape)
            return label_of(source) | (tags << TAG_SHIFT)
        joined = self.fresh(shape)
        for group in groups:
            kind = self.types(count)
            source = np.broadcast_to(group.aligned(names), shape)
            self.many_to_one(joined, source, kind + index)
            self.derived.append((joined.ravel(), label_of(source).ravel()))
        return joined

    def copies(self, labels: np.ndarray) -> np.ndarray:
        """New labels, each the same feature as the old one in a role of its own (`cat([x, x])`)."""
        new = self.fresh(labels.shape)
        self.one_to_one(new, labels, self.types())
        self.derived.append((new.ravel(), label_of(labels).ravel()))
        return new

    # -- einsum -----------------------------------------------------------------------------------

    def einsum(
        self,
        operands: Sequence[tuple[LabelledType, Sequence[Name | None]]],
        out: Collection[Name],
        pin: Collection[Name] = (),
    ) -> list[Group]:
        """Relate operands along the names they share; -> disjoint groups over the names in `out`.

        A name that some operand has without labels (and with more than one index) is pinned on the others.
        """
        named: list[list[Group]] = []
        still = dict.fromkeys(pin, False)  # -> whether its index is a place
        for labelled, names in operands:
            present = [n for i, n in enumerate(names) if n is not None and labelled.shape[i] > 1]
            repeated = [n for n, c in Counter(present).items() if c > 1]
            if repeated:
                raise ValueError(f"einsum takes a diagonal along {repeated}")
            groups = [g.renamed(names) for g in labelled.groups]
            named.append(groups)
            for name in set(present) - set(chain.from_iterable(g.axes for g in groups)):
                still[name] = still.get(name, False) or not labelled.foreign
        for group in chain.from_iterable(named):
            for name in filter(still.__contains__, group.axes):
                self.pin(group, name, placed=still[name])
        for i, groups in enumerate(named):
            within = combinations(groups, 2)  # of a weight in blocks: (g, o) and (g, c)
            for a, b in chain(within, product(chain.from_iterable(named[:i]), groups)):
                self.relate(a, b)
        kept = [[n for n in g.axes if n in out and n not in still] for g in chain.from_iterable(named)]
        return self._cover([self.marginal(g, k) for g, k in zip(chain.from_iterable(named), kept, strict=True) if k])

    def _cover(self, candidates: Sequence[Group]) -> list[Group]:
        """Disjoint groups over all names of the candidates, as joint as any of them."""
        distinct = {frozenset(g.axes): g for g in reversed(candidates)}
        final: list[Group] = []
        for group in sorted(distinct.values(), key=lambda g: len(g.axes)):
            names = set(group.axes)
            inside = [f for f in final if set(f.axes) <= names]
            if inside and set(chain.from_iterable(f.axes for f in inside)) == names:
                continue
            crossing = [f for f in final if set(f.axes) & names and not set(f.axes) <= names]
            sizes = {n: s for g in (*crossing, group) for n, s in zip(g.axes, g.labels.shape, strict=True)}
            if crossing and prod(sizes.values()) > _JOINT:
                final = self._split_crossing(final, crossing, group)
                continue
            # Keys and values of linear attention, (h, d) and (h, e), make (h, d, e), on which d and e have another
            # order for every h.
            joint = self.join(list(sizes), sizes, [*crossing, group]) if crossing else group
            final = [f for f in final if not set(f.axes) <= set(joint.axes)] + [joint]
        return final

    def _split_crossing(self, final: list[Group], crossing: list[Group], group: Group) -> list[Group]:
        """Overlapping, not nested, and too many together: cut the overlap out of both, which leaves less to permute."""
        final = [f for f in final if not any(f is c for c in crossing)]
        for f in crossing:
            final.append(self.marginal(f, [x for x in f.axes if x in group.axes]))
            final.append(self.marginal(f, [x for x in f.axes if x not in group.axes]))
        for f in list(final):
            overlap = [x for x in f.axes if x in group.axes]
            if overlap:
                self.relate(self.marginal(group, overlap), f)
        rest = [x for x in group.axes if not any(x in f.axes for f in final)]
        return [*final, self.marginal(group, rest)] if rest else final

    def reshape(self, labelled: LabelledType, shape: Sequence[int]) -> LabelledType:
        """The type after a row-major reshape to `shape`."""
        from .reshape import reshape  # the arithmetic of splitting and joining axes has its own file

        return reshape(self, labelled, tuple(int(d) for d in shape))


def _edges(u: np.ndarray, v: np.ndarray, kind: int | np.ndarray) -> Edges:
    """Flat edges between untagged labels; parallel edges that differ in tags become one, of combined type."""
    kinds = np.broadcast_to(np.asarray(kind, np.int64), u.shape).ravel().astype(U64)
    u, v = np.broadcast_to(u, u.shape).ravel(), np.broadcast_to(v, u.shape).ravel()
    tags_u, tags_v = tag_of(u), tag_of(v)
    if not tags_u.any() and not tags_v.any():
        return u, v, kinds
    kinds = pair(kinds, pair(tags_u.astype(U64), tags_v.astype(U64)))
    u, v = label_of(u), label_of(v)
    _, first, inverse = np.unique(pair(u.astype(U64), v.astype(U64)), return_index=True, return_inverse=True)
    total = np.zeros(len(first), U64)
    np.add.at(total, inverse, mix(kinds))
    return u[first], v[first], mix(total)
