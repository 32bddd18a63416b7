"""Moments and matchings in temporary files while layers are fitted: matrices that only the report wants whole again."""

from __future__ import annotations

import logging
from dataclasses import replace

from torch import Tensor, fx

from ..errors import InputError
from ..match import Matchings
from ..measure.moments import Moments
from ..memory import Store
from .job import Job

LARGE = 1 << 27  # bytes, below which memory is the better place

log = logging.getLogger("fxzip")


def set_aside(graph: fx.GraphModule, now: Job) -> Job:
    """`now` with both in files, if they are large and in memory; values are the same. Where there is no room for files
    they stay."""
    if now.plan is not None and now.plan.cap is not None:  # the plan has said where they are
        return now
    tensors = [m.second for m in now.moments.values()]
    tensors += [t for m in now.matchings.values() for t in (m.merge, m.unmerge)]
    if sum(t.numel() * t.element_size() for t in tensors if _here(t)) < LARGE:
        return now
    store = Store(0, sparse=True)

    def keep(tensor: Tensor) -> Tensor:
        return store.keep(tensor) if _here(tensor) else tensor

    try:
        moments = {s: m.moved(keep) for s, m in now.moments.items()}
        matchings = Matchings({s: m.moved(keep) for s, m in now.matchings.items()})
    except InputError as error:
        log.info("solve keeps moments and matchings in memory: %s", error)
        return now
    for node in graph.graph.nodes:
        here = node.meta["fxzip"]
        here["matchings"] = {s: matchings[s] for s in here["matchings"]}
    matchings.notices = now.matchings.notices
    return replace(now, moments=Moments(moments, now.moments.form, now.moments.of), matchings=matchings)


def _here(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not tensor.is_shared()
