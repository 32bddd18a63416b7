"""The user's data, read once; and the moments of the merged spaces on it."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .errors import InputError
from .measure import Checkpoint, Programs, collect_moments, fingerprint, form_of, other_forms, read_batches
from .measure.moments import Moments
from .prepare import Prepared
from .processes import ALONE, Processes
from .trace import describe, rows, state_of


def measure(
    prepared: Prepared,
    batches: list[tuple],
    seed: int,
    progress: bool,
    resume: str | Path | None = None,
    processes: Processes = ALONE,
) -> Moments:
    """Moments of the merged spaces over `batches`. resume: a folder that keeps them while they grow, of several
    processes one inside for each."""
    programs = Programs(prepared.graph_modules, prepared.spaces)
    checkpoint = None
    if resume is not None:
        rows = [(s.name, s.size, [(a.node, a.axes, a.weight) for a in s.anchors]) for s in prepared.merged_spaces()]
        if processes.world > 1:
            resume, rows = Path(resume) / f"rank{processes.rank}of{processes.world}", [*rows, processes.world]
        checkpoint = Checkpoint(resume, fingerprint(programs.states, batches, seed, rows))
    count = sum(max((x.shape[0] for x in b if isinstance(x, Tensor) and x.dim()), default=1) for b in batches)
    found = collect_moments(
        programs, prepared.merged_spaces(), batches, count, seed=seed, progress=progress, checkpoint=checkpoint,
        processes=processes,
    )  # fmt: skip
    own = {n: m.restrict(prepared.real[n]) if n in prepared.real else m for n, m in found.items()}
    return replace(found, spaces=own, form=form_of(prepared.args))


def calibration_batches(prepared: Prepared, count: int, seed: int, processes: Processes = ALONE) -> list[tuple]:
    """All batches, the same in every process; none without a loader."""
    with processes.alike():
        batches = _read(prepared, count, seed)
    if processes.world > 1:
        processes.same("models", fingerprint([state_of(m) for m in prepared.graph_modules], []))
        processes.same("batches", fingerprint([], batches, count, seed))
    return batches


def _read(prepared: Prepared, count: int, seed: int) -> list[tuple]:
    if prepared.loader is None:
        return []
    parameters = signature(prepared.graph_modules[0].forward)
    batches = read_batches(prepared.loader, parameters, count, prepared.device, seed)
    first, *others = other_forms(batches)
    for k in others:
        reason = _fails(prepared.graph_modules[0], batches[k])
        if reason:
            raise InputError(
                f"batch {k} of the loader (counted from 0) is {describe(batches[k])}, batch {first}"
                f" {describe(batches[first])}: the model fails on it: {reason}"
            )
    return batches


def _fails(module: nn.Module, args: tuple) -> str:
    """Why one sample does not run, in a line; "" if it does."""
    try:
        with torch.no_grad():
            module(*tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, rows(args, 1)))
    except Exception as error:  # whatever the model raises
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""
