"""`merge`, the pipeline: trace -> infer -> measure -> match -> (solve) -> rewrite -> calibrate -> report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from . import passes
from .calibration import calibration_batches, from_stems, identities, measure
from .check import check_merge
from .distill import Distill
from .errors import InputError
from .match import MATCHERS, Matcher, needs, resolve, widens
from .measure import invent
from .measure.moments import Moments
from .memory import parsed
from .nested import apart
from .options import wrong_options, wrong_weights
from .planning import Plan, make_plan
from .prepare import prepare
from .prepared import Clock
from .processes import Processes
from .repair import Repair, split
from .solve import Solve

METHODS = (*(m.name for m in MATCHERS), Solve.name)


def merge(
    models: Sequence[nn.Module] | Mapping[str, nn.Module],
    loader: Iterable | Mapping[str, Iterable] | None = None,
    *,
    method: str | Matcher | Solve | Distill | Repair = "solve",
    until: str | None = None,
    since: str | None = None,
    budget: float | Mapping[str, int] | None = None,
    round_to: int = 8,
    heads: str = "separate",
    model_weights: Sequence[float] | Mapping[str, float] | None = None,
    example_inputs: Any = None,
    calibration: int = 2048,
    moments: Moments | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    verify: bool | str = True,
    strict: bool = False,
    progress: bool = True,
    forward_fn: Callable[..., Any] | None = None,
    evaluate: Callable[[nn.Module, str], float] | None = None,
    resume: str | Path | None = None,
    memory: int | str | None = None,
    distributed: Any = False,
) -> fx.GraphModule:
    """Merge N networks of one architecture into one; gradient-free, label-free, deterministic.

    models: list, or dict task name -> module. They are not changed. Layers that make the outputs (heads) stay
        per model and may differ in width; everything before them is shared, at the widths of the widest model. A
        merged network is taken for its tasks ("old_a", "old_b" of {"old": ...}).
    loader: any iterable of batches (tensor; tuple or list, labels ignored; dict bound to forward), or a dict
        of loaders, read in turn. The first `calibration` samples are used. "rebasin", "c2m3" and "average" need
        none, but recompute batch-norm statistics if there is one.
    method: a name of `METHODS` or a matcher object, such as `Zip(alpha=0.3, beta=1.0)`; "zip+repair" or
        `Repair(Zip())` also sets right the spread of merged features (REPAIR), "+rescale" that alone. "solve+distill"
        takes what solve fitted further by natural-gradient steps (`Distill`): no labels, but no longer gradient-free.
    until: path of the first module that stays per model (`"layer3"`): only what is not downstream is merged, and from
        there on the models may differ (one segments, one classifies).
    since: path of the first module that is shared: every model keeps its own layers before it (stems), all of them run,
        and what is shared reads their merged features. A task's network, as `extract` gives it, has all stems.
    budget: FLOPs of the result, times those of one model (with until or since, of the merge at the models' widths):
        widths are chosen to fit, in steps of `round_to`. Or widths themselves, {space: features}, by the names that
        `inspect` prints (not with since). Default: the models' widths.
    heads: "separate"; "concat", all outputs side by side along axis 1, as logits over all classes; "joint", so and made
        comparable (`rewrite.Comparable`; reads the loader), for one answer out of all classes; or "average".
    model_weights: what each model counts wherever a mean over models is taken, by position or name (default: all
        alike). example_inputs: one batch, if there is no loader.
    moments: from `collect` of these models, instead of measuring; methods that need no more then work without a loader.
    device: "auto" uses a GPU if there is one.
    verify: prove the inferred spaces on model 0 first; "report": go on when the proof fails, and say so in the
        report. strict: refuse if any op has no rule.
    forward_fn: called as forward_fn(model, x, ...) instead of model(x, ...), to choose what comes out.
    evaluate: called as evaluate(network, task) -> number (more is better), on every model and on what `extract`
        gives of the result: the report has the numbers, and a warning where the merge lost much.
    resume: a folder that keeps what was measured: Ctrl-C, SIGTERM or a crash loses little, and the same call
        goes on from there, to the same bytes.
    memory: bytes, or "4GB": what may be held beyond the models, the calibration inputs and the result. Spaces are
        then measured in several passes over the batches, and what has no room goes to temporary files; the result
        is the same to the last bit. `plan` says beforehand what is needed. The proof (verify) is not counted.
    distributed: True in every process of a torch.distributed group (or that group): all call this alike, each
        measures and solves on its share of the batches, and all get the network that one process would make, up
        to rounding. "repair" and matching itself are not divided.

    Returns a GraphModule on the models' device, in eval mode; its forward returns one output per model, as a
    tuple (list of models) or dict. `report(zipped)` says what was done.
    Raises InputError with every problem of the call before any expensive work, TraceError, SpaceError when
    nothing can be merged, VerificationError when the proof fails.

    >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, k)) for k in (2, 3))
    >>> zipped = merge([a, b], [torch.randn(64, 4)], progress=False)
    >>> [tuple(y.shape) for y in zipped(torch.randn(5, 4))]
    [(5, 2), (5, 3)]
    """
    clock = Clock()
    models, loader, model_weights = apart(models, loader, model_weights)
    wrong = wrong_options(
        {"until": until, "since": since, "budget": budget, "round_to": round_to, "heads": heads, "seed": seed,
         "device": device, "verify": verify, "forward_fn": forward_fn, "evaluate": evaluate, "moments": moments,
         "resume": resume, "memory": memory, "distributed": distributed}
    ) + wrong_weights(model_weights, models)  # fmt: skip
    repair, solver, matcher = choose(method, budget, models, wrong)
    wrong += solver.refused(memory, distributed, since) if isinstance(solver, Distill) else []
    if isinstance(budget, Mapping) and since:
        wrong.append("budget as widths does not go with since=: spaces are counted anew behind it; give a number")
    compares = bool(needs(matcher) - {"weights"}) or budget is not None
    needs_data = bool(solver or repair) or (compares and moments is None)
    if wrong:
        check_merge(models, loader, example_inputs=example_inputs, calibration=calibration, problems=wrong)
    if loader is None and example_inputs is None and moments is not None and moments.form is not None:
        example_inputs = invent(moments.form, seed)
    graph = passes.start(
        models, loader, call="fxzip.merge", clock=clock, progress=progress, example_inputs=example_inputs,
        device=device, calibration=calibration, needs_data=needs_data or heads == "joint", forward_fn=forward_fn,
        distributed=distributed, model_weights=model_weights, until=until, since=since, heads=heads, copies=False,
    )  # fmt: skip
    stages: list[passes.Stage] = [passes.Infer(strict), passes.Cut(until)]
    widths = [passes.Widths(budget, round_to)] if budget is not None else []
    stages += widths if isinstance(budget, Mapping) else []  # what is wrong with them comes out before the work
    stages += [passes.Prove(seed, strict=verify != "report")] if verify else []
    stages += [passes.Read(calibration, seed)]
    stages += [passes.Cap(memory, matcher, solver, needs_data and moments is None, resume is not None)]
    stages += [passes.Measure(seed, moments, resume)] if needs_data or moments is not None else []
    stages += [] if isinstance(budget, Mapping) else widths
    stages += [passes.Match(matcher, seed=seed), passes.Average()]
    stages += [passes.Respread(repair)] if repair else []
    stages += [passes.Solve(solver, heads, seed)] if solver else []
    stages += [passes.Build(heads), passes.Calibrate(), passes.Prepend(), passes.Describe(evaluate)]
    for stage in stages:
        graph = stage(graph).graph_module
    return graph


def choose(
    method: Any, budget: float | Mapping[str, int] | None, models: Any, wrong: list[str]
) -> tuple[Repair | None, Solve | Distill | None, Matcher]:
    """What repairs, what solves and what matches, of a `method` as `merge` takes it. What is wrong with it goes to
    `wrong`; the choice then means nothing."""
    try:
        repair, method = split(method, budget)
        solver = Solve() if method == "solve" else method if isinstance(method, (Solve, Distill)) else None
        count = len(models) if isinstance(models, Sized) else 2
        matcher = solver.matcher_for(count) if solver else resolve(method, [Solve.name])  # type: ignore[arg-type]
        changes = isinstance(budget, Mapping) or (isinstance(budget, (int, float)) and budget != 1)
        if changes and not widens(matcher):
            raise InputError(f"{matcher.name} keeps the models' widths and has no budget: match by 'suited', 'zip' or"
                             " 'select'")  # fmt: skip
        return repair, solver, matcher
    except InputError as error:
        wrong.append(str(error))
        return None, None, resolve("average")


def collect(
    models: Sequence[nn.Module] | Mapping[str, nn.Module],
    loader: Iterable | Mapping[str, Iterable],
    *,
    until: str | None = None,
    since: str | None = None,
    calibration: int = 2048,
    seed: int = 0,
    device: str | torch.device = "auto",
    progress: bool = True,
    forward_fn: Callable[..., Any] | None = None,
    resume: str | Path | None = None,
    memory: int | str | None = None,
    distributed: Any = False,
) -> Moments:
    """The joint moments `merge` would measure: `merge(models, moments=...)` reuses them, `.save` keeps them.

    Arguments and errors as for `merge`. Count, mean [Sn] and second moment [Sn, Sn] (float64) per space.
    """
    wrong = wrong_options(
        {"until": until, "since": since, "seed": seed, "device": device, "forward_fn": forward_fn, "resume": resume,
         "memory": memory, "distributed": distributed}
    )  # fmt: skip
    if wrong:
        check_merge(models, loader, calibration=calibration, problems=wrong, call="fxzip.collect")
    p = prepare(
        models, loader, call="fxzip.collect", clock=Clock(), until=until, since=since, device=device, verify=False,
        seed=seed, calibration=calibration, forward_fn=forward_fn,
    )  # fmt: skip
    processes = Processes.of(distributed)
    batches = from_stems(p, calibration_batches(p, calibration, seed, processes))
    processes.same("memory", cap := parsed(memory))
    capped = None if cap is None else make_plan(p, batches, cap, resume=resume is not None)
    found = measure(p, batches, seed, progress and processes.rank == 0, resume, processes, capped)
    return replace(found, of=identities(p))


def plan(
    models: Sequence[nn.Module] | Mapping[str, nn.Module],
    loader: Iterable | Mapping[str, Iterable],
    *,
    method: str | Matcher | Solve | Distill | Repair = "solve",
    memory: int | str | None = None,
    until: str | None = None,
    since: str | None = None,
    calibration: int = 2048,
    seed: int = 0,
    device: str | torch.device = "auto",
    forward_fn: Callable[..., Any] | None = None,
    resume: bool = False,
) -> Plan:
    """What `merge` with these arguments would need and do; print it. Every model runs on one batch of each shape.

    Arguments and errors as for `merge`; resume: whether there would be a folder. `.least` is the smallest `memory=`
    that would do, `.passes` the spaces of each pass over the batches, `.spills` whether anything goes to files.

    >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, k)) for k in (2, 3))
    >>> found = plan([a, b], [torch.randn(64, 4)], method="zip", memory="1MB")
    >>> found.passes, found.spills
    ((('s0',),), False)
    """
    models, loader, _ = apart(models, loader, None)
    wrong = wrong_options(
        {"until": until, "since": since, "seed": seed, "device": device, "forward_fn": forward_fn, "memory": memory}
    )
    repair, solver, matcher = choose(method, None, models, wrong)
    wrong += solver.refused(memory, False, since) if isinstance(solver, Distill) else []
    if wrong:
        check_merge(models, loader, calibration=calibration, problems=wrong, call="fxzip.plan")
    p = prepare(
        models, loader, call="fxzip.plan", clock=Clock(), until=until, since=since, device=device, verify=False,
        seed=seed, calibration=calibration, forward_fn=forward_fn,
    )  # fmt: skip
    measures = bool(solver or repair or needs(matcher) - {"weights"})
    batches = from_stems(p, calibration_batches(p, calibration, seed))
    if isinstance(solver, Distill):
        solver.check(batches, p.stems is not None)
    return make_plan(
        p, batches, parsed(memory), method=solver.name if solver else matcher.name, matcher=matcher,
        solver=solver, measures=measures, resume=resume,
    )  # fmt: skip
