"""The stages of `merge` that make one graph and finish it, in their order."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from ..assemble import agree, assemble, calibrate
from ..comparable import compare_heads
from ..describe import describe
from ..errors import InputError, MergeWarning
from ..infer import resize
from ..rewrite import prepend
from ..rewrite.zipped import KEY
from ..sanity import doubts, measured, refuse_broken
from ..trace import rows
from .job import JOB, Job, Stage, job


@dataclass(frozen=True)
class Build(Stage):
    """One graph of all models. heads: "separate", "concat", "joint" or "average"."""

    heads: str = "separate"
    clock: ClassVar[str] = "rewrite"
    needs: ClassVar = {"shared": "Average"}

    def run(self, graph: fx.GraphModule, now: Job) -> tuple[fx.GraphModule, Job]:
        zipped = assemble(now.prepared, now.shared, now.heads, now.models, self.heads)
        for node in zipped.graph.nodes:  # M and U of all spaces are much larger than the network
            if "matchings" in node.meta.get("fxzip", {}):
                node.meta["fxzip"] = {k: v for k, v in node.meta["fxzip"].items() if k != "matchings"}
        widths = {s: (m.sizes[0], m.width) for s, m in now.matchings.items()}
        resize(zipped, rows(now.prepared.args, 1), widths)
        return zipped, replace(now, built=True, shared={})  # the graph has its own


@dataclass(frozen=True)
class Calibrate(Stage):
    """Batch-norm statistics of the merged network, where solve has not set them; and what compares its heads."""

    clock: ClassVar[str] = "calibrate"
    needs: ClassVar = {"batches": "Read"}

    def run(self, graph: fx.GraphModule, now: Job) -> tuple[fx.GraphModule, Job]:
        now.processes.first(*graph.state_dict().values())  # ranks on unlike machines may differ in the last bit
        found: list[str] = []
        if not now.solved:
            same = agree(now.prepared, now.measured_matchings, now.moments)
            found = calibrate(graph, now.batches, same, now.processes)
        compare_heads(graph, now.batches, now.processes)
        return graph, replace(now, notices=(*now.notices, *found))


@dataclass(frozen=True)
class Prepend(Stage):
    """The models' own stems before the merged network, where there are any (`since=`)."""

    clock: ClassVar[str] = "rewrite"
    matters: ClassVar[bool] = False

    def requires(self, graph_module: fx.GraphModule) -> None:
        super().requires(graph_module)
        if not job(graph_module).built:
            raise InputError("passes.Prepend needs what passes.Build makes: run that before")

    def run(self, graph: fx.GraphModule, now: Job) -> tuple[fx.GraphModule, Job]:
        p = now.prepared
        if p.stems is None:
            return graph, now
        whole = replace(p, traced=p.stems.own, args=p.stems.args, unpadded=(), tails=None, stems=None)
        return prepend(graph, p.stems, p.names), replace(now, prepared=whole, batches=now.inputs)


@dataclass(frozen=True)
class Describe(Stage):
    """The last: onto the models' device, with the Report and its doubts; the Job is forgotten.

    evaluate: as in `merge`. Warns (MergeWarning) where the outcome is likely to disappoint; raises InputError when
    the result is not finite."""

    evaluate: Callable[[nn.Module, str], float] | None = field(default=None, repr=False)
    clock: ClassVar[str] = "describe"

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        now = job(graph_module)
        if not now.built:
            raise InputError("passes.Describe needs what passes.Build makes: run that before")
        if now.prepared.stems:
            raise InputError("passes.Describe: the models keep their own stems (since=): run passes.Prepend before")
        tensors = (t for m in now.models for t in (*m.parameters(), *m.buffers()))
        graph_module.to(next((t.device for t in tensors), torch.device("cpu")))
        refuse_broken(graph_module)
        p = now.prepared
        with now.clock.stage(self.clock):
            own = now.measured_matchings
            made = describe(p, graph_module, now.method, own, now.moments, now.records, now.notices, now.settings)
            given = list(now.models)
            figures, losses = measured(graph_module, p.names, given, self.evaluate) if self.evaluate else ([], [])
            doubtful = doubts(p.verification, made.shared, own, now.moments, p.names, p.own,
                              now.batches or [])  # fmt: skip
        for text in (*doubtful, *losses):
            warnings.warn(text, MergeWarning, stacklevel=4)
        made = made.with_(notices=(*doubtful, *losses, *made.notices, *figures), seconds=dict(now.clock.seconds))
        graph_module.meta[KEY]["report"] = made
        del graph_module.meta[JOB]
        return PassResult(graph_module, False)
