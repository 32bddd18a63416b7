"""Solve: closed-form fits of every merge point on the merged network's own inputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..allocator import retained
from ..errors import InputError
from ..infer import Spaces
from ..match import Matcher, Matching, Suited, Zip
from ..measure import Programs
from ..memory import Store
from ..processes import ALONE, Processes
from ..rewrite import Heads, Partition
from ..trace import Lowered, batch_size, describe, lower, state_of
from .fit import Settings
from .lanes import Chunks, Lane
from .needs import CHUNK, TOGETHER, FitNeed, SolveNeeds, chunk_size, solve_needs
from .sequence import Pass, Record

After = Callable[[Pass, Sequence[tuple], Mapping[str, Sequence[Callable[[Tensor], Tensor]]], bool], str]
MANY = 8  # times the room for activations, from which on none stay in memory

__all__ = [
    "CHUNK", "FitNeed", "Record", "Settings", "Solve", "SolveNeeds", "Solved", "chunk_size", "solve_needs",
    "solve_parameters",
]  # fmt: skip


@dataclass(frozen=True)
class Solve:
    """method="solve": match, merge, then fit every merge point in closed form (fxzip; see CONTRIBUTING, "Solve").

    matcher: gives M, U and the weights the ridge pulls towards; None: `Suited()`, which selects features where it is
        known what an error in them costs, and zips the others; for three models and more with alpha=1.0, as a feature
        that all of them share makes a group of more than two, which alpha < 1 would hold back. settings: see
        `Settings`.
    """

    matcher: Matcher | None = None
    settings: Settings = field(default_factory=Settings)
    name: ClassVar[str] = "solve"
    paper: ClassVar[str] = "fxzip"
    correspondence: ClassVar[str] = "free"

    def matcher_for(self, models: int) -> Matcher:
        """The matcher for this many models."""
        return self.matcher or (Suited() if models == 2 else Suited(otherwise=Zip(alpha=1.0, beta=1.0)))


@dataclass(frozen=True)
class Solved:
    """shared: name -> tensor; heads: private parameters; records: one per fit; peak: bytes of activations held;
    notices: what the user should know."""

    shared: Mapping[str, Tensor]
    heads: Heads
    records: tuple[Record, ...]
    peak: int
    notices: tuple[str, ...] = ()


def solve_parameters(
    graph_modules: Sequence[fx.GraphModule],
    spaces: Spaces,
    cut: Partition,
    matchings: Mapping[str, Matching],
    shared: Mapping[str, Tensor],
    heads: Heads,
    batches: Sequence[tuple],
    settings: Settings | None = None,
    progress: bool = True,
    resized: fx.GraphModule | None = None,
    processes: Processes = ALONE,
    shares: Sequence[float] | None = None,
    memory: float | None = None,
    after: After | None = None,
    foreign: Sequence[Collection[str]] = (),
    fitted: int | None = None,
) -> Solved:
    """Fit shared and private parameters to the parents, in topological order, in closed form.

    shared, heads: the zipped parameters, as `merge_parameters` and `head_parameters` make them; the starting
    point that the ridge pulls towards. batches: positional-argument tuples; labels are not needed. Gradient-free
    and deterministic. The inputs are not modified. resized: the zipped GraphModule, where widths have changed: it
    has the right shapes. processes: every rank holds its share of the chunks, and all fit to the sums.
    shares: what every model counts where values that are no features are averaged (default: all alike). memory: bytes
    of activations that do not go to files, if other than `settings.memory`; the result does not depend on it.
    after: goes on from the fitted pass, on all chunks, and says what it did. foreign: per model, the FX nodes of
    `cut.private` that only others have, of graphs that were joined; what it has for them is left as it is. fitted: so
    many samples, about, the fits see, from all over; None: all.
    """
    every, notices = _chunks(batches, chunk_size(spaces.lowered)), ()
    chunks = _spread(every, ceil(fitted / max(batch_size(every[0]), 1))) if fitted else every
    together = max(1, TOGETHER // max(batch_size(chunks[0]), 1))
    if (parts := ceil(len(chunks) / together)) < processes.world:
        notices = (f"solve: {parts} chunks of {together * batch_size(chunks[0])} samples do not go round"
                   f" {processes.world} processes, so every process solved on all of them",)  # fmt: skip
        processes = ALONE
    share = Chunks(len(chunks), processes, together)
    chunks = [c for k, c in enumerate(chunks) if share.mine(k)]
    programs = Programs(graph_modules, spaces)
    settings = settings or Settings()
    room = settings.memory if memory is None else memory
    if memory is None and _activations(spaces.lowered, share, chunks[0], len(graph_modules), settings) > MANY * room:
        room = 0  # what stays between all that comes and goes leaves gaps, and saves little
    store = Store(room)
    parents = [_lane(programs, i, dict(programs.states[i]), chunks[0], store) for i in range(len(graph_modules))]
    state = _state(graph_modules[0], shared, spaces)
    merged = (
        _lane(programs, 0, state, chunks[0], store)
        if resized is None
        else _resized_lane(resized, spaces, state, chunks[0], store)
    )
    private = [
        _lane(programs, i, _state(m, heads.states[i], spaces), chunks[0], store) for i, m in enumerate(graph_modules)
    ]
    origin = {n.name: n.meta.get("origin") for n in spaces.lowered.graph.nodes}
    is_private = frozenset(n for n, o in origin.items() if o in cut.private)
    absent = [frozenset(n for n, o in origin.items() if o in of) for of in foreign]
    unmerged = {v.name: ops for name, ops in heads.unmerge.items() for v in spaces.lowered.values[name]}
    for lane, part in zip(parents, shares or [1 / len(parents)] * len(parents), strict=True):
        lane.absorbed, lane.share = heads.absorbed, part
    for i, lane in enumerate(private):
        lane.fallback = _through_unmerge(merged, unmerged, i)
    for chunk in chunks:
        tensors = [x for x in tree_leaves(chunk) if isinstance(x, Tensor)]
        for lane in (*parents, merged):
            for node, value in zip(lane.lowered.inputs, tensors, strict=True):
                lane.values.setdefault(lane.names[node], []).append(value)
    steps = Pass(parents, merged, private, is_private, spaces, matchings, settings, share, absent)
    with torch.no_grad(), retained(memory is None):
        steps.run(progress)
        if after is not None:
            notices += (after(steps, every, unmerged, progress),)
    if store.mapped and memory is None:
        notices += (
            f"solve kept {store.mapped / 1e9:.1f} GB of activations in temporary files: they would take over "
            f"{settings.memory / 1e9:.1f} GB of memory; memory= allows more",
        )
    own = tuple({n: lane.state[n] for n in s} for lane, s in zip(private, heads.states, strict=True))
    return Solved(
        {n: merged.state[n] for n in shared}, replace(heads, states=own), tuple(steps.records), store.most, notices
    )


def _activations(lowered: Lowered, chunks: Chunks, chunk: tuple, models: int, settings: Settings) -> int:
    """Bytes of all networks' values on this rank's samples, at most."""
    batch = next((int(i.meta["shape"][0]) for i in lowered.inputs if i.meta["shape"]), 1)
    size = max(batch_size(chunk), 1)
    return solve_needs(lowered, batch, chunks.own * size, size, models, settings).activations


def _chunks(batches: Sequence[tuple], most: int = CHUNK) -> list[tuple]:
    """All samples in chunks of one size, `most` if there are so many; what does not fill a chunk is left out."""
    total = sum(max(batch_size(b), 1) for b in batches)
    size = min(most, total)
    leaves, spec = [tree_flatten(b)[0] for b in batches], tree_flatten(batches[0])[1]
    shapes = {
        tuple(tuple(x.shape[1:]) if isinstance(x, Tensor) else None for x in of): b
        for of, b in zip(leaves, batches, strict=True)
    }
    if len(shapes) > 1:
        found = " and ".join(map(describe, shapes.values()))
        raise InputError(
            f"method 'solve' fits on samples of one shape, the loader has {found}: crop, resize or pad them, or take"
            " another method"
        )
    whole = [_whole(column, batches) for column in zip(*leaves, strict=True)]
    return [
        tree_unflatten([x[k * size : (k + 1) * size] if rows else x for x, rows in whole], spec)
        for k in range(total // size)
    ]


def _spread(chunks: list[tuple], count: int) -> list[tuple]:
    """So many of the chunks, evenly spaced, as loaders may go task by task."""
    return [chunks[k * len(chunks) // count] for k in range(count)] if count < len(chunks) else chunks


def _whole(column: Sequence[Any], batches: Sequence[tuple]) -> tuple[Any, bool]:
    """(One argument's value over all batches, whether it has a row for each sample.)"""
    sized = zip(column, batches, strict=True)
    if all(isinstance(x, Tensor) and x.dim() and len(x) == batch_size(b) for x, b in sized):
        return torch.cat(list(column)), True
    first = column[0]
    if not all(torch.equal(x, first) if isinstance(x, Tensor) else x == first for x in column):
        raise InputError(
            f"method 'solve' fits on all samples together, and {describe(first)}, an argument without a row for each"
            " sample, differs between batches: repeat it for each sample, or take another method"
        )
    return first, False


def _state(model: fx.GraphModule, own: Mapping[str, Tensor], spaces: Spaces) -> dict[str, Tensor]:
    """`own`, and the model's tensors for all else. One that is tied to an own one is left out: `Lane.parameter` goes by
    any name of a tied tensor, and what one part merged another may have kept."""
    tied = spaces.lowered.tied
    taken = {tied.get(n, n) for n in own}
    return {n: t for n, t in state_of(model).items() if tied.get(n, n) not in taken} | dict(own)


def _lane(programs: Programs, model: int, state: dict[str, Tensor], args: tuple, store: Store) -> Lane:
    lowered, twin = programs.lowered(model, args)
    by_name = {n.name: n for n in lowered.graph.nodes}
    return Lane(lowered, {name: by_name[other] for name, other in twin.items()}, state, store)


def _resized_lane(zipped: fx.GraphModule, spaces: Spaces, state: dict[str, Tensor], args: tuple, store: Store) -> Lane:
    """The shared part at its new widths. Nodes correspond by FX origin and by their order within it."""
    lowered = lower(zipped, args)
    own, analysed = _by_origin(lowered), _by_origin(spaces.lowered)
    nodes = {a.name: b for key in analysed if key in own for a, b in zip(analysed[key], own[key], strict=False)}
    nodes |= {a.name: b for a, b in zip(spaces.lowered.inputs, lowered.inputs, strict=True)}
    return Lane(lowered, nodes, state, store)


def _by_origin(lowered: Lowered) -> dict[tuple, list[fx.Node]]:
    found: dict[tuple, list[fx.Node]] = {}
    for node in lowered.graph.nodes:
        if node.op == "call_function":
            found.setdefault((node.meta.get("origin"), str(node.target)), []).append(node)
    return found


def _through_unmerge(merged: Lane, unmerged: Mapping[str, Sequence], model: int):
    """What a private lane reads at the boundary: the shared value, through U where it is explicit."""

    def read(name: str, chunk: int):
        value = merged.value(name, chunk)
        return unmerged[name][model](value) if name in unmerged else value

    return read
