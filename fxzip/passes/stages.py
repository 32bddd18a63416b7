"""The stages of `merge` on the models' graphs, in their order."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import ClassVar

from torch import fx

from ..assemble import agree, assemble, check_widths, choose_widths, merged_parameters
from ..calibration import calibration_batches, from_stems, measure, refuse_others
from ..distill import Distill
from ..errors import InputError
from ..match import Matcher, Matching, match, needs, resolve
from ..measure.moments import Moments
from ..memory import Store, parsed
from ..options import wrong_options
from ..planning import make_plan
from ..prepare import compare, cut_graph, infer_spaces, prove
from ..repair import Repair, repair_parameters
from ..solve import Solve as SolveMethod
from ..solve import solve_parameters
from .aside import set_aside
from .job import Job, Stage, job, node_names

MANY = 8  # names in a notice

log = logging.getLogger("fxzip")


@dataclass(frozen=True)
class Infer(Stage):
    """Feature spaces, from the operators. strict: refuse operators without a rule."""

    strict: bool = False
    clock: ClassVar[str] = "infer"

    def run(self, graph: fx.GraphModule, now: Job) -> tuple[fx.GraphModule, Job]:
        compare(now.prepared.call, now.prepared.traced, now.prepared.names)
        found = infer_spaces(now.prepared, self.strict)
        graph = found.graph_modules[0]  # another, where models of other widths were padded
        return graph, replace(now, prepared=found, nodes=node_names(graph))


@dataclass(frozen=True)
class Cut(Stage):
    """What is shared and what stays per model; from here on, node.meta["fxzip"]. until: as in `merge`."""

    until: str | None = None
    clock: ClassVar[str] = "infer"
    needs: ClassVar = {"spaces": "Infer"}

    def run(self, graph: fx.GraphModule, now: Job) -> tuple[fx.GraphModule, Job]:
        found = cut_graph(now.prepared, self.until)
        graph = found.graph_modules[0]  # another, where padded layers turn out to stay per model
        return graph, replace(now, prepared=found, nodes=node_names(graph))


@dataclass(frozen=True)
class Prove(Stage):
    """The numerical proof of the spaces. strict: a failure stops; otherwise the report says so."""

    seed: int = 0
    strict: bool = True
    clock: ClassVar[str] = "verify"
    needs: ClassVar = {"spaces": "Infer"}

    def run(self, graph: fx.GraphModule, now: Job) -> tuple[fx.GraphModule, Job]:
        return graph, replace(now, prepared=prove(now.prepared, self.seed, self.strict))


@dataclass(frozen=True)
class Read(Stage):
    """The first `calibration` samples of the loader; none without one."""

    calibration: int = 2048
    seed: int = 0
    clock: ClassVar[str] = "read"

    def run(self, graph: fx.GraphModule, now: Job) -> tuple[fx.GraphModule, Job]:
        inputs = calibration_batches(now.prepared, self.calibration, self.seed, now.processes)
        return graph, replace(now, inputs=inputs, batches=from_stems(now.prepared, inputs))


@dataclass(frozen=True)
class Cap(Stage):
    """What the stages after it may hold. memory: as in `merge`; the rest says what those stages will be. Logs the plan
    (INFO). Raises InputError where the cap is too small, or where a `Distill` cannot take the batches."""

    memory: int | str | None = field(default=None, repr=False)
    method: str | Matcher = field(default="zip", repr=False)
    solve: SolveMethod | Distill | None = field(default=None, repr=False)
    measures: bool = field(default=True, repr=False)
    resume: bool = field(default=False, repr=False)
    clock: ClassVar[str] = "plan"
    matters: ClassVar[bool] = False
    needs: ClassVar = {"cut": "Cut", "batches": "Read"}

    def run(self, graph: fx.GraphModule, now: Job) -> tuple[fx.GraphModule, Job]:
        now.processes.same("memory", cap := parsed(self.memory))
        if isinstance(self.solve, Distill):
            self.solve.check(now.batches, now.prepared.stems is not None)
        if cap is None and not log.isEnabledFor(logging.INFO):
            return graph, now
        matcher = resolve(self.method)
        found = make_plan(
            now.prepared, now.batches, cap, method=self.solve.name if self.solve else matcher.name, matcher=matcher,
            solver=self.solve, measures=self.measures, resume=self.resume,
            processes=now.processes,
        )  # fmt: skip
        log.info("%s", found)
        return graph, replace(now, plan=found)


@dataclass(frozen=True)
class Measure(Stage):
    """Moments of every shared space; or those of `collect`. resume: a folder, as in `merge`."""

    seed: int = 0
    moments: Moments | None = field(default=None, repr=False)
    resume: str | Path | None = field(default=None, repr=False)
    clock: ClassVar[str] = "measure"
    needs: ClassVar = {"cut": "Cut", "batches": "Read"}

    def run(self, graph: fx.GraphModule, now: Job) -> tuple[fx.GraphModule, Job]:
        found = self.moments
        if found is not None:
            refuse_others(now.prepared, found)
        else:
            found = measure(now.prepared, now.batches, self.seed, now.progress, self.resume, now.processes, now.plan)
        return graph, replace(now, moments=found)


@dataclass(frozen=True)
class Widths(Stage):
    """Widths of shared spaces, before `Match`. budget: as in `merge`; a number runs after `Measure`, widths as they are
    anywhere after `Cut`. Raises InputError with every problem of given widths, or where no width can change."""

    budget: float | Mapping[str, int] = 1.0
    round_to: int = 8
    clock: ClassVar[str] = "match"
    needs: ClassVar = {"cut": "Cut"}

    def requires(self, graph_module: fx.GraphModule) -> None:
        super().requires(graph_module)
        if problems := wrong_options({"budget": self.budget, "round_to": self.round_to}):
            raise InputError.listing("passes.Widths", problems)
        if job(graph_module).matchings is not None:
            raise InputError("passes.Widths runs before passes.Match, which needs them")
        if job(graph_module).moments is None and not isinstance(self.budget, Mapping):
            raise InputError("passes.Widths needs what passes.Measure finds, or widths by space: run that before")

    def run(self, graph: fx.GraphModule, now: Job) -> tuple[fx.GraphModule, Job]:
        if isinstance(self.budget, Mapping):
            check_widths(now.prepared, self.budget, now.models)
            return graph, replace(now, widths=dict(self.budget))
        found = choose_widths(now.prepared, now.moments, self.budget, now.models, self.round_to)
        kept = [s.name for s in now.prepared.merged_spaces() if s.name not in found and self.budget != 1]
        if not kept:
            return graph, replace(now, widths=found)
        more = f" and {len(kept) - MANY} more" if len(kept) > MANY else ""
        notice = f"budget={self.budget:g}: {', '.join(kept[:MANY])}{more} cannot change width, and keep the models'"
        return graph, replace(now, widths=found, notices=(*now.notices, notice))


@dataclass(frozen=True)
class Match(Stage):
    """M and U of every shared space, by a matcher or its name, at the models' widths or those of `Widths`; also in
    node.meta["fxzip"]["matchings"]. A matcher of weights alone runs without `Measure`."""

    method: str | Matcher = "zip"
    seed: int = field(default=0, kw_only=True)  # not where the budget was
    clock: ClassVar[str] = "match"
    needs: ClassVar = {"cut": "Cut"}

    def requires(self, graph_module: fx.GraphModule) -> None:
        super().requires(graph_module)
        if job(graph_module).moments is None and needs(resolve(self.method)) - {"weights"}:
            raise InputError("passes.Match needs what passes.Measure finds: run that before")

    def run(self, graph: fx.GraphModule, now: Job) -> tuple[fx.GraphModule, Job]:
        p, matcher, moments = now.prepared, resolve(self.method), now.moments or Moments({})
        reading = {"reading": p.reading(moments)} if "readers" in needs(matcher) else {}
        store = Store(0 if now.plan and now.plan.spills else inf, sparse=True)

        def keep(matching: Matching) -> Matching:
            return matching.moved(store.keep)

        found = match(p.merged_spaces(), moments, matcher, now.widths, len(p.names), p.weights(),
                      self.seed, p.shares, p.real, keep, **reading)  # fmt: skip
        found.update({s: keep(found[s].expanded(own, p.spaces[s].size)) for s, own in p.real.items() if s in found})
        for node in graph.graph.nodes:
            here = node.meta["fxzip"]
            here["matchings"] = {s: found[s] for s in here["spaces"] if s in found}
        return graph, replace(
            now, moments=moments, matchings=found, method=matcher.name,
            notices=(*now.notices, *found.notices),
        )  # fmt: skip


@dataclass(frozen=True)
class Average(Stage):
    """The shared parameters, the mean of M W U over the models; and what every model keeps."""

    clock: ClassVar[str] = "rewrite"
    needs: ClassVar = {"matchings": "Match"}

    def run(self, graph: fx.GraphModule, now: Job) -> tuple[fx.GraphModule, Job]:
        shared, heads = merged_parameters(now.prepared, now.matchings)
        return graph, replace(now, shared=shared, heads=heads)


@dataclass(frozen=True)
class Respread(Stage):
    """REPAIR and RESCALE. repair: as in `merge(method=...)`; its matcher does not count here."""

    repair: Repair = field(default_factory=Repair)
    clock: ClassVar[str] = "calibrate"
    needs: ClassVar = {"batches": "Read", "shared": "Average"}

    def run(self, graph: fx.GraphModule, now: Job) -> tuple[fx.GraphModule, Job]:
        p = now.prepared
        name = self.repair.name.rpartition("+")[2]
        if agree(p, now.measured_matchings, now.moments):  # the norms keep the models' own statistics, see Calibrate
            return graph, replace(now, method=f"{now.method}+{name}")
        shared, found = repair_parameters(
            p.graph_modules, p.spaces, p.cut, now.matchings, now.shared, now.batches, self.repair.shift,
            p.shares,
        )
        return graph, replace(
            now, shared=shared, notices=(*now.notices, *found), method=f"{now.method}+{name}"
        )  # fmt: skip


@dataclass(frozen=True)
class Solve(Stage):
    """Closed-form fits of every layer, and what follows them if it is a `Distill`. solve: its settings; its matcher
    does not count here. heads: see Build."""

    solve: SolveMethod | Distill = field(default_factory=SolveMethod)
    heads: str = "separate"
    seed: int = 0
    clock: ClassVar[str] = "solve"
    needs: ClassVar = {"batches": "Read", "shared": "Average"}

    def run(self, graph: fx.GraphModule, now: Job) -> tuple[fx.GraphModule, Job]:
        p, now = now.prepared, set_aside(graph, now)
        resized = assemble(p, now.shared, now.heads, now.models, self.heads) if now.widths else None
        after = replace(self.solve, seed=self.seed) if isinstance(self.solve, Distill) else None
        if after:
            after.check(now.batches, p.stems is not None)
        settings = replace(self.solve.settings, seed=self.seed)
        found = solve_parameters(
            p.graph_modules, p.spaces, p.cut, now.matchings, now.shared, now.heads, now.batches, settings,
            now.progress, resized, now.processes, p.shares, now.plan.activations if now.plan else None, after,
            p.foreign, after.solve_samples if after else None,
        )  # fmt: skip
        return graph, replace(
            now, shared=found.shared, heads=found.heads, records=found.records, solved=True, method=self.solve.name,
            notices=(*now.notices, *found.notices),
        )  # fmt: skip
