"""The plan of a merge: what it will need and do, in bytes, from shapes, before it starts."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

from torch import Tensor
from torch.utils._pytree import tree_leaves

from .distill import Distill, distill_needs
from .errors import InputError
from .infer import FeatureSpace
from .match import Matcher, needs
from .match.blocks import families
from .measure import Needs, Programs
from .measure import needs as measuring_needs
from .memory import shown
from .prepared import Prepared
from .processes import ALONE, Processes
from .rewrite import owned
from .solve import Solve, SolveNeeds, chunk_size, solve_needs
from .trace import batch_size

# Second moments, 8 Sn^2 bytes, that matching a space of Sn features takes the memory of, M and U included
_COPIES = {
    "average": 2.6, "permute": 3.2, "zip": 3.6, "transport": 4.2, "cca": 10.5, "select": 6.5, "suited": 6.5,
    "unmerge": 4.6,
}  # fmt: skip
_OTHER = 6.0
_REWRITE = 5  # float64 copies of a parameter, while it is merged


@dataclass(frozen=True)
class Plan:
    """What a merge will need and do. All numbers are bytes, estimated from shapes.

    cap: `memory=`, for all but models, inputs and result, which are there in any case, and the proof. measuring: None
    where nothing is measured. moments, matchings: of all spaces together. matching: (spaces matched together, bytes
    that takes). solving: None for other methods. rewriting: (a parameter, bytes that merging it takes). distilling:
    what steps after solve take.

    >>> print(Plan("zip", 2, None, 10**9, 10**6, 6 * 10**8))
    zip of 2 models, no cap
      there in any case  models 1GB, calibration inputs 1MB, result about 600MB
    """

    method: str
    count: int
    cap: int | None
    models: int
    inputs: int
    result: int
    measuring: Needs | None = None
    moments: int = 0
    matchings: int = 0
    matching: tuple[tuple[tuple[str, ...], int], ...] = ()
    solving: SolveNeeds | None = None
    rewriting: tuple[str, int] = ("", 0)
    distilling: int = 0
    programs: Programs = field(default=None, repr=False)  # type: ignore[assignment]

    @property
    def least(self) -> int:
        """The smallest cap that would do: what the space, parameter or fit that takes most takes alone."""
        return max((size for _, size, _ in self._alone()), default=0)

    @property
    def whole(self) -> int:
        """What it takes at once with no cap, beyond solve's activations."""
        later = max(self._matching, self.rewriting[1], self.solving.work if self.solving else 0, self.distilling)
        measured = self.measuring.of(self.measuring.spaces) if self.measuring else 0
        return max(measured, self.moments + self.matchings + later)

    @property
    def spills(self) -> bool:
        """Whether moments and matchings go to temporary files."""
        return self.cap is not None and self.whole > self.cap

    @property
    def passes(self) -> tuple[tuple[str, ...], ...]:
        """Names of the spaces that are measured in each pass over the batches."""
        if self.measuring is None:
            return ()
        return self.measuring.passes(self.cap if self.cap is not None and self.spills else float("inf"))

    @property
    def activations(self) -> float | None:
        """Bytes of solve's activations that stay in memory; None: `Settings.memory` says."""
        if self.cap is None or self.solving is None:
            return None
        held = 0 if self.spills else self.moments + self.matchings
        return max(self.cap - held - self.solving.work, 0)

    @property
    def files(self) -> int:
        """Bytes of temporary files, at most."""
        beyond = self.solving.activations - self.activations if self.solving and self.activations is not None else 0
        return int(self.moments + self.matchings if self.spills else 0) + max(int(beyond), 0)

    def problem(self) -> str:
        """Why the cap cannot be held; "" if it can."""
        if self.cap is None or self.least <= self.cap:
            return ""
        what, size, hint = max(self._alone(), key=lambda each: each[1])
        return (
            f"memory={shown(self.cap)} is too little: {what} takes {shown(size)}, and the least that would do is"
            f" memory={shown(self.least)!r}{hint}"
        )

    @property
    def _matching(self) -> int:
        return max((size for _, size in self.matching), default=0)

    def _alone(self) -> Iterator[tuple[str, int, str]]:
        """(what, bytes, what else would help) of everything that cannot be divided."""
        if self.measuring:
            shorter = "; smaller batches need less"
            for s in self.measuring.spaces:
                batch = f", of which the activations of a batch {shown(self.measuring.forward)}"
                size = self.measuring.of([s])
                yield f"measuring {s.name} ({s.features} features of {self.count} models{batch})", size, shorter
        for names, size in self.matching:
            yield f"matching {' and '.join(names)} by {self.method!r}", size, "; until= leaves out wide late layers"
        yield f"merging {self.rewriting[0]}", self.rewriting[1], ""
        if self.solving:
            fit = self.solving.largest
            yield (f"solving (%{fit.node} has {fit.columns} columns, a value of a chunk {shown(self.solving.value)})",
                   self.solving.work, "; method='zip' does not solve")  # fmt: skip

    def __str__(self) -> str:
        return "\n".join([f"{self.method} of {self.count} models, "
                          + ("no cap" if self.cap is None else f"memory={shown(self.cap)}"),
                          *(f"  {name:<17}  {text}" for name, text in self._lines())])  # fmt: skip

    def _lines(self) -> Iterator[tuple[str, str]]:
        yield "there in any case", (f"models {shown(self.models)}, calibration inputs {shown(self.inputs)},"
                                    f" result about {shown(self.result)}")  # fmt: skip
        if self.measuring and self.measuring.spaces:
            most = max(self.measuring.spaces, key=lambda s: s.sums)
            times = "1 pass" if len(self.passes) == 1 else f"{len(self.passes)} passes"
            many = f"{len(self.measuring.spaces)} space{'s' * (len(self.measuring.spaces) > 1)}"
            yield "measure", (f"{many} in {times}: moments {shown(self.moments)}, of"
                              f" {most.name} {shown(most.sums)} ({most.features} features); rows of a batch"
                              f" {shown(sum(s.rows for s in self.measuring.spaces))}, activations"
                              f" {shown(self.measuring.forward)}")  # fmt: skip
        if self.matching:
            yield "match", f"matrices {shown(self.matchings)}, at work {shown(self._matching)}"
        if self.solving and self.solving.fits:
            fit = self.solving.largest
            yield "solve", (f"{len(self.solving.fits)} fits, the largest {shown(fit.size)} (%{fit.node},"
                            f" {fit.columns} columns); activations {shown(self.solving.activations)}")  # fmt: skip
        if self.cap is not None:
            yield "temporary files", (f"at most {shown(self.files)}" if self.files else "none") + (
                f", in {tempfile.gettempdir()} ({shown(shutil.disk_usage(tempfile.gettempdir()).free)} free)"
                if self.files else "")  # fmt: skip
        if self.distilling:
            yield "distill", f"curvature, and derivatives of a batch: about {shown(self.distilling)}"
        elif self.matching or self.measuring:
            yield "memory=", f"{shown(self.least)} at least, {shown(max(self.whole, self.least))} without files"


def make_plan(
    p: Prepared,
    batches: Sequence[tuple],
    cap: int | None,
    *,
    method: str = "collect",
    matcher: Matcher | None = None,
    solver: Solve | Distill | None = None,
    measures: bool = True,
    resume: bool = False,
    processes: Processes = ALONE,
) -> Plan:
    """matcher: None where nothing is matched; solver: where there is solving; measures: whether there is measuring.
    Models are lowered at the shapes of the batches, which runs each once. Raises InputError where the cap is too small.
    """
    spaces = p.merged_spaces()
    programs, count = Programs(p.graph_modules, p.spaces), len(p.names)
    total = sum(max(batch_size(b), 1) for b in batches)
    squares = {s.name: 8 * (count * s.size) ** 2 for s in spaces}
    widths = {s.name: 16 * count * s.size**2 for s in spaces}  # of M and U
    own = {n: t for n, t in p.graph_modules[0].named_parameters()}
    shared = [own[n] for n in owned(p.graph_modules[0], p.cut.shared) if n in own]
    models = sum(sum(_size(t) for t in (*m.parameters(), *m.buffers())) for m in p.graph_modules)
    name, largest = max(((n, t.numel()) for n, t in own.items()), key=lambda x: x[1], default=("", 0))
    solving = None
    if solver is not None and batches:
        graph, size = programs.lowered(0, batches[0])[0], max(batch_size(batches[0]), 1)
        fitted = solver.solve_samples if isinstance(solver, Distill) else None
        held = processes.count(total) if processes.world > 1 else min(fitted or total, total)
        solving = solve_needs(graph, size, held, chunk_size(graph), count, solver.settings, p.copies)
    inputs = sum(_size(x) for x in tree_leaves(list(batches)) if isinstance(x, Tensor))
    copies = 0
    if isinstance(solver, Distill):
        one = models // count  # of which the merged network has about as much
        copies += (models + one) // 2 + one if solver.precision else 0
        copies += 2 * inputs if solver.views else 0  # at most: what outputs are to be, and its parts
    plan = Plan(
        method, count, cap, models, inputs,
        models - (count - 1) * sum(_size(t) for t in shared),
        measuring_needs(programs, spaces, batches, total, int(resume)) if measures and batches else None,
        sum(squares.values()) if measures else 0,
        sum(widths.values()) if matcher else 0,
        tuple(_matching(matcher, spaces, squares, widths, count)) if matcher else (),
        solving,
        (name, 8 * _REWRITE * largest) if matcher else ("", 0),
        distill_needs(solving, copies) if solving and isinstance(solver, Distill) else 0,
        programs,
    )  # fmt: skip
    if problem := plan.problem():
        raise InputError(f"{p.call}: {problem}")
    return plan


def _matching(
    matcher: Matcher, spaces: Sequence[FeatureSpace], squares: dict[str, int], widths: dict[str, int], count: int
) -> Iterator[tuple[tuple[str, ...], int]]:
    """(spaces that are matched together, bytes that takes). Matchers of weights hold the matrices of all spaces."""
    copies = _COPIES.get(matcher.name, _OTHER)
    every = sum(widths.values()) if "weights" in needs(matcher) else 0
    for names in ([s.name for s in family] for family in families(spaces)):
        beside = sum(widths[n] for n in names) // count if len(names) > 1 else 0  # scores of pairs, own and children's
        yield tuple(names), int(copies * max(squares[n] for n in names)) + beside + every


def _size(tensor: Tensor) -> int:
    return prod(tensor.shape) * tensor.element_size()
