"""What solving takes, in bytes, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType

from torch import fx

from ..measure import peak, size_of
from ..trace import Lowered
from .design import design_of
from .fit import BLOCK, Settings, wanted_rows
from .lanes import dynamic_nodes
from .slots import argument

CHUNK, PIECE = 128, 1 << 25  # samples that run at once, at most, and bytes of one value of theirs, where more than one
TOGETHER = 32  # samples that ranks are dealt at once, at least: sums in float64, one per chunk, cost more than products
_GRAMS, _CROSSES = 3.5, 9  # float64 copies of [p, p] and of [o, p] that a fit has at once, by measurement
_DESIGNS, _TARGETS = 4, 5  # float32 copies of design rows and of target rows


@dataclass(frozen=True)
class FitNeed:
    """Bytes for the fit of one node with `columns` inputs and `outputs`, in every group, beyond the activations.
    copies: so many models have a layer of their own there; 1 where it is shared."""

    node: str
    columns: int
    size: int
    outputs: int = 0
    groups: int = 1
    copies: int = 1


@dataclass(frozen=True)
class SolveNeeds:
    """fits: of all contractions with weights. activations: of all networks on all samples, at most; what has no room
    is in files. value: the largest of one network on one chunk of samples. values: the merged network's together,
    and every model's where they are its own."""

    fits: tuple[FitNeed, ...]
    activations: int
    value: int
    values: int = 0

    @property
    def largest(self) -> FitNeed:
        """The fit that takes most; of none, an empty one."""
        return max(self.fits, key=lambda f: f.size, default=FitNeed("", 0, 0))

    @property
    def work(self) -> int:
        """Beyond activations that may go to files: a fit, or a value that is just made and the rows of its input."""
        return self.largest.size + 2 * self.value


def chunk_size(lowered: Lowered) -> int:
    """How many samples run at once: a power of two. lowered: of one model, at any number of samples."""
    samples = next((int(i.meta["shape"][0]) for i in lowered.inputs if i.meta["shape"]), 1)
    values = (size_of(n) for n in dynamic_nodes(lowered).values() if n.op == "call_function")
    fitting = PIECE * samples // max([1, *values])
    return 1 << (max(1, min(CHUNK, fitting)).bit_length() - 1)


def solve_needs(
    lowered: Lowered, batch: int, samples: int, chunk: int, models: int, settings: Settings,
    copies: Mapping[str, int] = MappingProxyType({}),
) -> SolveNeeds:  # fmt: skip
    """lowered: of one model, at batches of `batch`. chunk: samples that run at once, of `samples` in all. copies: of FX
    nodes that models keep, how many have one."""
    dynamic = dynamic_nodes(lowered)
    chunk = min(chunk, samples)
    lanes = models + 1
    live = peak(lowered, lambda node: node.name in dynamic) * samples // batch * lanes
    fits = [_fit(n, batch, samples, chunk, settings) for n in dynamic.values() if _contracts(n, dynamic)]
    fits = [replace(f, copies=copies.get(f.node, 1)) for f in fits]
    values = {n: size_of(n) * chunk // batch for n in dynamic.values() if n.op == "call_function"}
    every = sum(size * copies.get(n.meta.get("origin") or n.name, 1) for n, size in values.items())
    return SolveNeeds(tuple(fits), live, max(values.values(), default=0), every)


def _contracts(node: fx.Node, dynamic: dict[str, fx.Node]) -> bool:
    design = design_of(node)
    weight = argument(node, design.weight) if design else None
    return isinstance(weight, fx.Node) and weight.name not in dynamic


def _fit(node: fx.Node, batch: int, samples: int, chunk: int, settings: Settings) -> FitNeed:
    design = design_of(node)
    assert design is not None
    shape: Sequence[int] = argument(node, design.weight).meta["shape"]  # type: ignore[union-attr]
    outputs = _outputs(node, shape, design.weight)
    groups = int(argument(node, "groups") or 1)
    columns, each = prod(shape) // max(outputs, 1), max(outputs // groups, 1)
    there = prod(node.meta["shape"]) // max(outputs, 1) * chunk // batch
    count = wanted_rows(settings, groups, columns)
    rows = min(count // (samples // chunk) + 1, there)
    rows = min(rows * max(1, min(TOGETHER, samples) // chunk), rows + BLOCK)  # of chunks that are added together
    gram = int(8 * groups * (_GRAMS * columns**2 + _CROSSES * columns * each))
    design_rows = 4 * groups * rows * (_DESIGNS * columns + _TARGETS * each)
    return FitNeed(node.meta.get("origin") or node.name, columns, gram + design_rows, each, groups)


def _outputs(node: fx.Node, shape: Sequence[int], weight: str) -> int:
    if argument(node, "transposed"):
        return shape[1] * argument(node, "groups")
    return shape[0] if weight == "weight" else shape[-1]  # [o, i, ...]; a matrix product has [p, o]
