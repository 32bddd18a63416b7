"""The user's data, read once; and the moments of the merged spaces on it."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .allocator import retained
from .errors import InputError
from .measure import Checkpoint, Programs, collect_moments, fingerprint, form_of, other_forms, read_batches
from .measure.moments import Moments, SpaceMoments
from .memory import Store
from .planning import Plan
from .prepared import Prepared
from .processes import ALONE, Processes
from .trace import describe, rows, state_of
from .version import installed


def measure(
    prepared: Prepared,
    batches: list[tuple],
    seed: int,
    progress: bool,
    resume: str | Path | None = None,
    processes: Processes = ALONE,
    plan: Plan | None = None,
) -> Moments:
    """Moments of the merged spaces over `batches`. resume: a folder that keeps them while they grow, of several
    processes one inside for each, and of several passes. plan: in which passes, and whether to files."""
    programs = plan.programs if plan else Programs(prepared.graph_modules, prepared.spaces)
    passes = plan.passes if plan and plan.spills else (None,)
    store = Store(0 if plan and plan.spills else inf, sparse=True)

    def keep(name: str, moments: SpaceMoments) -> SpaceMoments:
        own = moments.restrict(prepared.real[name]) if name in prepared.real else moments
        return own.moved(store.keep)

    found: dict[str, SpaceMoments] = {}
    for k, names in enumerate(passes):
        part = (k, len(passes), names) if len(passes) > 1 else None
        with processes.alike():
            checkpoint = resume and _checkpoint(resume, prepared, programs, batches, seed, processes, part)
        with retained(not (plan and plan.cap)):
            found |= collect_moments(
                programs, prepared.merged_spaces(), batches, samples(batches), seed=seed, progress=progress,
                checkpoint=checkpoint or None, processes=processes, only=names, keep=keep,
            )  # fmt: skip
    return Moments(found, form_of(prepared.stems.args if prepared.stems else prepared.args))


def identities(prepared: Prepared) -> tuple[str, ...]:
    """Of every model, what is another one where a value is."""
    states = ({k: v for k, v in m.state_dict().items() if isinstance(v, Tensor)} for m in prepared.models)
    return tuple(fingerprint([state], []) for state in states)


def refuse_others(prepared: Prepared, moments: Moments) -> None:
    """Raises InputError for moments of other models than these, or of these in another order."""
    if moments.of and moments.of != (here := identities(prepared)):
        same = sorted(moments.of) == sorted(here)
        why = "these models in another order" if same else "other models, or other weights"
        raise InputError(f"{prepared.call}: moments= were collected from {why}: collect them anew")


def samples(batches: Sequence[tuple]) -> int:
    """In all of them."""
    return sum(max((x.shape[0] for x in b if isinstance(x, Tensor) and x.dim()), default=1) for b in batches)


def _checkpoint(
    folder: str | Path, prepared: Prepared, programs: Programs, batches: list[tuple], seed: int, processes: Processes,
    part: tuple | None,
) -> Checkpoint:  # fmt: skip
    """part: (which pass, of how many, over which spaces), where there are several."""
    spaces = prepared.merged_spaces()
    rows: list[Any] = [(s.name, s.size, [(a.node, a.axes, a.weight) for a in s.anchors]) for s in spaces]
    rows += [str(prepared.spaces.lowered.graph)]  # other code may have the same weights
    rows += [installed(), torch.__version__]  # and measure otherwise
    if processes.world > 1:
        folder, rows = Path(folder) / f"rank{processes.rank}of{processes.world}", [*rows, processes.world]
    if part:
        folder, rows = Path(folder) / f"pass{part[0] + 1}of{part[1]}", [*rows, part]
    return Checkpoint(folder, fingerprint(programs.states, batches, seed, rows))


def from_stems(prepared: Prepared, batches: Sequence[tuple]) -> list[tuple]:
    """Batches as the graphs take them: with private stems the values that these compute."""
    return [prepared.stems.before(b) for b in batches] if prepared.stems else list(batches)


def calibration_batches(prepared: Prepared, count: int, seed: int, processes: Processes = ALONE) -> list[tuple]:
    """All batches as the models take them, the same in every process; none without a loader."""
    with processes.alike():
        batches = _read(prepared, count, seed)
    if processes.world > 1:
        modules = (*prepared.graph_modules, *(prepared.stems.parts if prepared.stems else ()))
        processes.same("models", fingerprint([state_of(m) for m in modules], []))
        processes.same("batches", fingerprint([], batches, count, seed))
    return batches


def _read(prepared: Prepared, count: int, seed: int) -> list[tuple]:
    if prepared.loader is None:
        return []
    whole = prepared.stems.own[0].graph_module if prepared.stems else prepared.graph_modules[0]
    batches = read_batches(prepared.loader, signature(whole.forward), count, prepared.device, seed)
    first, *others = other_forms(batches)
    for k in others:
        reason = _fails(whole, batches[k])
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
