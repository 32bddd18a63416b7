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

from .finish import Build, Calibrate, Describe, Prepend
from .job import JOB, EveryModel, Job, Stage, give, job, start
from .stages import Average, Cap, Cut, Infer, Match, Measure, Prove, Read, Respread, Solve, Widths

__all__ = [
    "JOB", "Average", "Build", "Calibrate", "Cap", "Cut", "Describe", "EveryModel", "Infer", "Job", "Match", "Measure",
    "Prepend", "Prove", "Read", "Respread", "Solve", "Stage", "Widths", "give", "job",
    "start",
]  # fmt: skip
