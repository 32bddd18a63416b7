"""The stages of `merge` as torch.fx passes: run them in a PassManager, with passes of your own in between.

    graph = passes.start({"cats": a, "dogs": b}, loader)       # the first model's graph; the others go with it
    stages = [passes.Infer(), passes.Cut(), passes.Read(), passes.Measure(), passes.Match("zip"),
              passes.Average(), passes.Build(), passes.Calibrate(), passes.Describe()]
    zipped = PassManager(stages)(graph).graph_module

`merge` is these stages in a row. What they hand on is a `Job`, a value in `graph_module.meta`; `job(graph_module)`
reads it. A pass of your own may look at it (`job(g).matchings`), look at `node.meta["fxzip"]` (type, spaces and
state from `Cut` on, matchings from `Match` to `Build`), put another Job in place (`give(g, replace(job(g), ...))`),
rewrite every model's graph before `Infer` (`EveryModel`), or rewrite the merged graph after `Describe`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from .assemble import agree, assemble, calibrate, choose_widths, merged_parameters
from .describe import describe
from .errors import InputError
from .match import Matcher, Matchings, match, needs, resolve
from .measure.moments import Moments
from .prepare import Clock, Prepared, begin, calibration_batches, compare, cut_graph, infer_spaces, measure, prove
from .repair import Repair, repair_parameters
from .rewrite import Heads
from .rewrite.zipped import KEY
from .solve import Record, solve_parameters
from .solve import Solve as SolveMethod

JOB = "fxzip.job"
_LATER: Any = None  # what a later stage makes


@dataclass(frozen=True)
class Job:
    """What the stages have found so far. models: as the user gave them. batches: argument tuples on the device.
    settings: of each stage that ran, by its name."""

    prepared: Prepared
    models: tuple[nn.Module, ...]
    clock: Clock
    progress: bool
    nodes: tuple[str, ...] = ()  # of the graph that was inferred on
    batches: list[tuple] = _LATER
    moments: Moments = _LATER
    widths: Mapping[str, int] = field(default_factory=dict)
    matchings: Matchings = _LATER
    method: str = ""
    shared: Mapping[str, Tensor] = _LATER
    heads: Heads = _LATER
    solved: bool = False
    built: bool = False
    notices: tuple[str, ...] = ()
    records: tuple[Record, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict) -> Job:
        return self  # a value: a deepcopy of the graph need not copy the models


def start(
    models: Sequence[nn.Module] | Mapping[str, nn.Module],
    loader: Iterable | Mapping[str, Iterable] | None = None,
    *,
    call: str = "fxzip.passes.start",
    clock: Clock | None = None,
    progress: bool = True,
    **options: Any,
) -> fx.GraphModule:
    """Check the call and trace all models: the first one's GraphModule, with its Job.

    models, loader, and of the options example_inputs, device, calibration and forward_fn: as for `merge`.
    Raises InputError and TraceError as `merge` does.

    >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, k)) for k in (2, 3))
    >>> graph = start([a, b], [torch.randn(64, 4)], progress=False)
    >>> for stage in (Infer(), Cut(), Read(), Measure(), Match("zip"), Average(), Build(), Calibrate(), Describe()):
    ...     graph = stage(graph).graph_module
    >>> [tuple(y.shape) for y in graph(torch.randn(5, 4))]
    [(5, 2), (5, 3)]
    """
    clock = clock or Clock()
    with clock.stage("trace"):
        prepared = begin(models, loader, call=call, **options)
    given = models.values() if isinstance(models, Mapping) else models
    return give(prepared.graph_modules[0], Job(prepared, tuple(given), clock, progress))


def job(graph_module: nn.Module) -> Job:
    """The Job of a graph. Raises InputError where there is none."""
    found = getattr(graph_module, "meta", {}).get(JOB)
    if not isinstance(found, Job):
        raise InputError(
            f"fxzip.passes: this {type(graph_module).__name__} carries no Job: begin with passes.start(models, loader);"
            " a pass that returns a new GraphModule has to keep its .meta; after Describe the Job is gone"
        )
    return found


def give(graph_module: fx.GraphModule, new: Job) -> fx.GraphModule:
    """Put a Job in place; returns the graph."""
    graph_module.meta[JOB] = new
    return graph_module


class Stage(PassBase):
    """One stage. needs: fields of Job, and the stage that makes each; clock: under which name its seconds count."""

    needs: ClassVar[Mapping[str, str]] = {}
    clock: ClassVar[str] = ""

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Raises InputError when an earlier stage has not run, or the graph was changed since Infer."""
        now, here = job(graph_module), type(self).__name__
        found = {"spaces": now.prepared.spaces, "cut": now.prepared.cut} | vars(now)
        missing = [f"passes.{who}" for what, who in self.needs.items() if found[what] is None]
        if now.built and here not in ("Calibrate", "Describe"):
            raise InputError(f"passes.{here} runs before passes.Build, on the models' graph")
        if missing:
            raise InputError(f"passes.{here} needs what {' and '.join(missing)} finds: run that before")
        changed = now.nodes and not now.built and now.nodes != _names(graph_module)
        if changed or not (now.built or graph_module is now.prepared.graph_modules[0]):
            raise InputError(
                f"passes.{here}: a pass has changed the graph of the first model only, or changed it after"
                " passes.Infer; wrap it, passes.EveryModel(your_pass), and run it before passes.Infer"
            )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        now = job(graph_module)
        with now.clock.stage(self.clock):
            made, now = self.run(graph_module, now)
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}  # type: ignore[arg-type]
        text = ", ".join(f"{k}={v!r}" for k, v in shown.items())
        give(made, replace(now, settings={**now.settings, type(self).__name__: text}))
        return PassResult(made, made is not graph_module)

    def run(self, graph: fx.GraphModule, now: Job) -> tuple[fx.GraphModule, Job]:
        """The graph after this stage, and what is known by then."""
        raise NotImplementedError


@dataclass(frozen=True)
class EveryModel(PassBase):
    """A pass of yours (GraphModule -> PassResult, GraphModule or None), run on the graph of every model alike.

    Raises InputError when the graphs differ afterwards."""

    each: Callable[[fx.GraphModule], Any]

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        now = job(graph_module)
        traced = tuple(replace(t, graph_module=self._on(t.graph_module)) for t in now.prepared.traced)
        compare(now.prepared.call, traced, now.prepared.names)
        first = traced[0].graph_module
        give(first, replace(now, prepared=replace(now.prepared, traced=traced)))
        return PassResult(first, True)

    def _on(self, module: fx.GraphModule) -> fx.GraphModule:
        result = self.each(module)
        result = result.graph_module if isinstance(result, PassResult) else result
        made = module if result is None else result
        made.recompile()
        return made


@dataclass(frozen=True)
class Infer(Stage):
    """Feature spaces, from the operators. strict: refuse operators without a rule."""

    strict: bool = False
    clock: ClassVar[str] = "infer"

    def run(self, graph: fx.GraphModule, now: Job) -> tuple[fx.GraphModule, Job]:
        compare(now.prepared.call, now.prepared.traced, now.prepared.names)
        return graph, replace(now, prepared=infer_spaces(now.prepared, self.strict), nodes=_names(graph))


@dataclass(frozen=True)
class Cut(Stage):
    """What is shared and what stays per model; from here on, node.meta["fxzip"]. until: as in `merge`."""

    until: str | None = None
    clock: ClassVar[str] = "infer"
    needs: ClassVar = {"spaces": "Infer"}

    def run(self, graph: fx.GraphModule, now: Job) -> tuple[fx.GraphModule, Job]:
        return graph, replace(now, prepared=cut_graph(now.prepared, self.until))


@dataclass(frozen=True)
class Prove(Stage):
    """The numerical proof of the spaces."""

    seed: int = 0
    clock: ClassVar[str] = "verify"
    needs: ClassVar = {"spaces": "Infer"}

    def run(self, graph: fx.GraphModule, now: Job) -> tuple[fx.GraphModule, Job]:
        return graph, replace(now, prepared=prove(now.prepared, self.seed))


@dataclass(frozen=True)
class Read(Stage):
    """The first `calibration` samples of the loader; none without one."""

    calibration: int = 2048
    seed: int = 0
    clock: ClassVar[str] = "read"

    def run(self, graph: fx.GraphModule, now: Job) -> tuple[fx.GraphModule, Job]:
        return graph, replace(now, batches=calibration_batches(now.prepared, self.calibration, self.seed))


@dataclass(frozen=True)
class Measure(Stage):
    """Moments of every shared space; or those of `collect`."""

    seed: int = 0
    moments: Moments | None = field(default=None, repr=False)
    clock: ClassVar[str] = "measure"
    needs: ClassVar = {"cut": "Cut", "batches": "Read"}

    def run(self, graph: fx.GraphModule, now: Job) -> tuple[fx.GraphModule, Job]:
        found = self.moments
        return graph, replace(now, moments=measure(now.prepared, now.batches, self.seed, now.progress)
                              if found is None else found)  # fmt: skip


@dataclass(frozen=True)
class Match(Stage):
    """M and U of every shared space, by a matcher or its name; also in node.meta["fxzip"]["matchings"].

    budget: as in `merge`. A matcher of weights alone runs without `Measure`."""

    method: str | Matcher = "zip"
    budget: float | None = None
    seed: int = 0
    clock: ClassVar[str] = "match"
    needs: ClassVar = {"cut": "Cut"}

    def requires(self, graph_module: fx.GraphModule) -> None:
        super().requires(graph_module)
        if job(graph_module).moments is None and (self.budget or needs(resolve(self.method)) - {"weights"}):
            raise InputError("passes.Match needs what passes.Measure finds: run that before")

    def run(self, graph: fx.GraphModule, now: Job) -> tuple[fx.GraphModule, Job]:
        p, matcher, moments = now.prepared, resolve(self.method), now.moments or Moments({})
        widths = choose_widths(p, moments, self.budget, now.models) if self.budget is not None else {}
        found = match(p.merged_spaces(), moments, matcher, widths, len(p.names), p.weights(), self.seed)
        for node in graph.graph.nodes:
            here = node.meta["fxzip"]
            here["matchings"] = {s: found[s] for s in here["spaces"] if s in found}
        return graph, replace(
            now, moments=moments, widths=widths, matchings=found, method=now.method or matcher.name,
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
        shared, found = repair_parameters(
            p.graph_modules, p.spaces, p.cut, now.matchings, now.shared, now.batches, self.repair.shift
        )
        name = self.repair.name.rpartition("+")[2]
        return graph, replace(
            now, shared=shared, notices=(*now.notices, *found), method=f"{now.method}+{name}"
        )  # fmt: skip


@dataclass(frozen=True)
class Solve(Stage):
    """Closed-form fits of every layer. solve: its settings; its matcher does not count here. heads: see Build."""

    solve: SolveMethod = field(default_factory=SolveMethod)
    heads: str = "separate"
    seed: int = 0
    clock: ClassVar[str] = "solve"
    needs: ClassVar = {"batches": "Read", "shared": "Average"}

    def run(self, graph: fx.GraphModule, now: Job) -> tuple[fx.GraphModule, Job]:
        p = now.prepared
        resized = assemble(p, now.shared, now.heads, now.models, self.heads) if now.widths else None
        settings = replace(self.solve.settings, seed=self.seed)
        found = solve_parameters(
            p.graph_modules, p.spaces, p.cut, now.matchings, now.shared, now.heads, now.batches, settings,
            now.progress, resized,
        )  # fmt: skip
        return graph, replace(
            now, shared=found.shared, heads=found.heads, records=found.records, solved=True, method=self.solve.name,
            notices=(*now.notices, *found.notices),
        )  # fmt: skip


@dataclass(frozen=True)
class Build(Stage):
    """One graph of all models. heads: "separate" or "average"."""

    heads: str = "separate"
    clock: ClassVar[str] = "rewrite"
    needs: ClassVar = {"shared": "Average"}

    def run(self, graph: fx.GraphModule, now: Job) -> tuple[fx.GraphModule, Job]:
        zipped = assemble(now.prepared, now.shared, now.heads, now.models, self.heads)
        for node in zipped.graph.nodes:  # M and U of all spaces are much larger than the network
            if "matchings" in node.meta.get("fxzip", {}):
                node.meta["fxzip"] = {k: v for k, v in node.meta["fxzip"].items() if k != "matchings"}
        return zipped, replace(now, built=True)


@dataclass(frozen=True)
class Calibrate(Stage):
    """Batch-norm statistics of the merged network, where solve has not set them."""

    clock: ClassVar[str] = "calibrate"
    needs: ClassVar = {"batches": "Read"}

    def run(self, graph: fx.GraphModule, now: Job) -> tuple[fx.GraphModule, Job]:
        if now.solved:
            return graph, now
        found = calibrate(graph, now.batches, agree(now.prepared, now.matchings, now.moments))
        return graph, replace(now, notices=(*now.notices, *found))


@dataclass(frozen=True)
class Describe(Stage):
    """The last: onto the models' device, with the Report; the Job is forgotten."""

    clock: ClassVar[str] = "describe"

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        now = job(graph_module)
        if not now.built:
            raise InputError("passes.Describe needs what passes.Build makes: run that before")
        tensors = (t for m in now.models for t in (*m.parameters(), *m.buffers()))
        graph_module.to(next((t.device for t in tensors), torch.device("cpu")))
        with now.clock.stage(self.clock):
            made = describe(
                now.prepared, graph_module, now.method, now.matchings, now.moments, now.records, now.notices,
                now.settings,
            )  # fmt: skip
        graph_module.meta[KEY]["report"] = made.with_(seconds=dict(now.clock.seconds))
        del graph_module.meta[JOB]
        return PassResult(graph_module, False)


def _names(graph_module: fx.GraphModule) -> tuple[str, ...]:
    return tuple(n.name for n in graph_module.graph.nodes)
