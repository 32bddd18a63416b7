"""What the stages hand on, and what a stage is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from ..allocator import retained, spared
from ..errors import InputError
from ..match import Matchings
from ..measure.moments import Moments
from ..planning import Plan
from ..prepare import begin, compare
from ..prepared import Clock, Prepared
from ..processes import ALONE, Processes
from ..rewrite import Heads
from ..solve import Record
from ..trace import own

JOB = "fxzip.job"
_LATER: Any = None  # what a later stage makes


@dataclass(frozen=True)
class Job:
    """What the stages have found so far. models: see `Checked`. batches: argument tuples on the device; inputs: the
    same as the models take them, where stems stay per model.
    settings: of each stage that ran, by its name. processes: who shares the work. plan: from `Cap`."""

    prepared: Prepared
    models: tuple[nn.Module, ...]
    clock: Clock
    progress: bool
    nodes: tuple[str, ...] = ()  # of the graph that was inferred on
    batches: list[tuple] = _LATER
    inputs: list[tuple] = _LATER
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
    processes: Processes = ALONE
    plan: Plan | None = None

    @property
    def measured_matchings(self) -> Matchings:
        """As the moments are: of models whose widths differ, over the features that each has."""
        real = self.prepared.real
        return Matchings({s: m.narrowed(real[s]) if s in real else m for s, m in self.matchings.items()})

    def __deepcopy__(self, memo: dict) -> Job:
        return self  # a value: a deepcopy of the graph need not copy the models


def start(
    models: Sequence[nn.Module] | Mapping[str, nn.Module],
    loader: Iterable | Mapping[str, Iterable] | None = None,
    *,
    call: str = "fxzip.passes.start",
    clock: Clock | None = None,
    progress: bool = True,
    distributed: Any = False,
    copies: bool = True,
    **options: Any,
) -> fx.GraphModule:
    """Check the call and trace all models: the first one's GraphModule, with its Job.

    models, loader, distributed, and of the options example_inputs, device, calibration, heads, since (which needs
    `Prepend` after `Calibrate`) and forward_fn: as for `merge`. copies: of all tensors; False saves the memory of the
    models once over, and a pass of yours that writes to a tensor writes to a model's then (`EveryModel` copies before).
    Raises InputError and TraceError as `merge` does.

    >>> import torch; from fxzip.passes import *
    >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, k)) for k in (2, 3))
    >>> graph = start([a, b], [torch.randn(64, 4)], progress=False)
    >>> for stage in (Infer(), Cut(), Read(), Measure(), Match("zip"), Average(), Build(), Calibrate(), Describe()):
    ...     graph = stage(graph).graph_module
    >>> [tuple(y.shape) for y in graph(torch.randn(5, 4))]
    [(5, 2), (5, 3)]
    """
    clock = clock or Clock()
    with clock.stage("trace"):
        prepared = begin(models, loader, call=call, copies=copies, **options)
    processes = Processes.of(distributed)
    shown = progress and processes.rank == 0
    return give(prepared.graph_modules[0], Job(prepared, prepared.models, clock, shown, processes=processes))


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
    """One stage. needs: fields of Job, and the stage that makes each; clock: under which name its seconds count;
    matters: to the result, so that the report names it."""

    needs: ClassVar[Mapping[str, str]] = {}
    clock: ClassVar[str] = ""
    matters: ClassVar[bool] = True

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        self.requires(graph_module)
        return self.call(graph_module)

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Raises InputError when an earlier stage has not run, or the graph was changed since Infer."""
        now, here = job(graph_module), type(self).__name__
        found = {"spaces": now.prepared.spaces, "cut": now.prepared.cut} | vars(now)
        missing = [f"passes.{who}" for what, who in self.needs.items() if found[what] is None]
        if now.built and here not in ("Calibrate", "Prepend", "Describe"):
            raise InputError(f"passes.{here} runs before passes.Build, on the models' graph")
        if missing:
            raise InputError(f"passes.{here} needs what {' and '.join(missing)} finds: run that before")
        changed = now.nodes and not now.built and now.nodes != node_names(graph_module)
        if changed or not (now.built or graph_module is now.prepared.graph_modules[0]):
            raise InputError(
                f"passes.{here}: a pass has changed the graph of the first model only, or changed it after"
                " passes.Infer; wrap it, passes.EveryModel(your_pass), and run it before passes.Infer"
            )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        now = job(graph_module)
        capped = now.plan is not None and now.plan.cap is not None
        with now.clock.stage(self.clock), retained(False), spared(capped):  # what it frees goes back
            made, now = self.run(graph_module, now)
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}  # type: ignore[arg-type]
        text = ", ".join(f"{k}={v!r}" for k, v in shown.items())
        if self.matters:
            now = replace(now, settings={**now.settings, type(self).__name__: text})
        give(made, now)
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
        if now.prepared.tails:
            raise InputError("passes.EveryModel: these models end differently, and their graphs are joined already")
        traced = tuple(replace(t, graph_module=self._on(t.graph_module)) for t in now.prepared.traced)
        compare(now.prepared.call, traced, now.prepared.names)
        first = traced[0].graph_module
        give(first, replace(now, prepared=replace(now.prepared, traced=traced)))
        return PassResult(first, True)

    def _on(self, module: fx.GraphModule) -> fx.GraphModule:
        own(module)  # it may be written to
        result = self.each(module)
        result = result.graph_module if isinstance(result, PassResult) else result
        made = module if result is None else result
        made.recompile()
        return made


def node_names(graph_module: fx.GraphModule) -> tuple[str, ...]:
    return tuple(n.name for n in graph_module.graph.nodes)
