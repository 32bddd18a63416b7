"""`merge`, the pipeline: trace -> infer -> measure -> match -> (solve) -> rewrite -> calibrate -> report."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from .check import check_merge
from .errors import InputError, MergeWarning
from .evaluate import cost
from .infer import Spaces
from .match import MATCHERS, Matcher, Matching, lossless, match, needs, resolve
from .measure import invent
from .measure.moments import Moments
from .options import wrong_options
from .prepare import Clock, Prepared, calibration_batches, measure, prepare
from .repair import Repair, repair_parameters, split
from .report import Report, Size, SpaceRow
from .rewrite import Heads, build, head_parameters, merge_parameters, owned, recompute_statistics, state_of
from .rewrite.zipped import KEY
from .sanity import doubts, measured, refuse_broken
from .solve import Solve, solve_parameters
from .widths import allocate, cost_terms, probe, resizable

METHODS = (*(m.name for m in MATCHERS), Solve.name)


def merge(
    models: Sequence[nn.Module] | Mapping[str, nn.Module],
    loader: Iterable | Mapping[str, Iterable] | None = None,
    *,
    method: str | Matcher | Solve | Repair = "solve",
    until: str | None = None,
    budget: float | None = None,
    heads: str = "separate",
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
) -> fx.GraphModule:
    """Merge N networks of one architecture into one; gradient-free, label-free, deterministic.

    models: list, or dict task name -> module. They are not changed. Layers that make the outputs (heads) stay
        per model and may differ in width; everything before them is shared.
    loader: any iterable of batches (tensor; tuple or list, labels ignored; dict bound to forward), or a dict
        of loaders, read in turn. The first `calibration` samples are used. "rebasin", "c2m3" and "average" need
        none, but recompute batch-norm statistics if there is one.
    method: a name of `METHODS` or a matcher object, such as `Zip(alpha=0.3, beta=1.0)`; "zip+repair" or
        `Repair(Zip())` also sets right the spread of merged features (REPAIR), "+rescale" that alone.
    until: path of the first module that stays per model (`"layer3"`): only what is not downstream is merged.
    budget: FLOPs of the result, times those of one model: widths are chosen to fit. Default: the models' widths.
    heads: "separate" or "average". example_inputs: one batch, if there is no loader.
    moments: from `collect`, instead of measuring; methods that need no more then work without a loader.
    device: "auto" uses a GPU if there is one.
    verify: prove the inferred spaces on model 0 first; "report": go on when the proof fails, and say so in the
        report. strict: refuse if any op has no rule.
    forward_fn: called as forward_fn(model, x, ...) instead of model(x, ...), to choose what comes out.
    evaluate: called as evaluate(network, task) -> number (more is better), on every model and on what `extract`
        gives of the result: the report has the numbers, and a warning where the merge lost much.
    resume: a folder that keeps what was measured: Ctrl-C, SIGTERM or a crash loses little, and the same call
        goes on from there, to the same bytes.

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
    wrong = wrong_options(
        {"until": until, "budget": budget, "heads": heads, "seed": seed, "device": device, "verify": verify,
         "forward_fn": forward_fn, "evaluate": evaluate, "moments": moments, "resume": resume}
    )  # fmt: skip
    try:
        repair, solver, matcher = choose(method, budget, len(models) if isinstance(models, Sized) else 2)
    except InputError as error:
        wrong, repair, solver, matcher = [*wrong, str(error)], None, None, resolve("average")
    compares = bool(needs(matcher) - {"weights"}) or budget is not None
    needs_data = bool(solver or repair) or (compares and moments is None)
    if wrong:
        check_merge(models, loader, example_inputs=example_inputs, calibration=calibration, problems=wrong)
    if loader is None and example_inputs is None and moments is not None and moments.form is not None:
        example_inputs = invent(moments.form, seed)
    p = prepare(
        models, loader, call="fxzip.merge", clock=clock, example_inputs=example_inputs, until=until, device=device,
        verify=verify, seed=seed, calibration=calibration, strict=strict, needs_data=needs_data, forward_fn=forward_fn,
    )  # fmt: skip
    batches = calibration_batches(p, calibration, seed)
    with clock.stage("measure"):
        if moments is None:
            moments = measure(p, batches, seed, progress, resume) if needs_data else Moments({})
    with clock.stage("match"):
        widths = choose_widths(p, moments, budget, models) if budget is not None else {}
        matchings = match(p.merged_spaces(), moments, matcher, widths, len(p.names), p.weights(), seed)
    with clock.stage("rewrite"):
        shared, private = merged_parameters(p, matchings)
    notices = list(matchings.notices)
    if repair:
        with clock.stage("calibrate"):
            shared, found = repair_parameters(
                p.graph_modules, p.spaces, p.cut, matchings, shared, batches, repair.shift
            )
            notices += found
    if solver:
        with clock.stage("solve"):
            resized = assemble(p, shared, private, models, heads) if widths else None
            settings = replace(solver.settings, seed=seed)
            solved = solve_parameters(
                p.graph_modules, p.spaces, p.cut, matchings, shared, private, batches, settings, progress, resized
            )
            shared, private, notices = solved.shared, solved.heads, [*notices, *solved.notices]
    with clock.stage("rewrite"):
        zipped = assemble(p, shared, private, models, heads)
    with clock.stage("calibrate"):
        notices += [] if solver else calibrate(zipped, batches, agree(p, matchings, moments))
    zipped.to(next((t.device for m in _list(models) for t in (*m.parameters(), *m.buffers())), torch.device("cpu")))
    refuse_broken(zipped)
    found = describe(p, (solver or repair or matcher).name, matchings, zipped, notices, clock)
    figures, losses = measured(zipped, p.names, _list(models), evaluate) if evaluate else ([], [])
    doubtful = [
        *doubts(p.verification, found.shared, matchings, moments, p.names, p.graph_modules, batches), *losses
    ]  # fmt: skip
    for text in doubtful:
        warnings.warn(text, MergeWarning, stacklevel=2)
    zipped.meta[KEY]["report"] = found.with_(notices=(*doubtful, *found.notices, *figures))
    return zipped


def choose(method: Any, budget: float | None, models: int) -> tuple[Repair | None, Solve | None, Matcher]:
    """What repairs, what solves and what matches, of a `method` as `merge` takes it. Raises InputError."""
    repair, method = split(method, budget)
    solver = Solve() if method == "solve" else method if isinstance(method, Solve) else None
    return repair, solver, solver.matcher_for(models) if solver else resolve(method)  # type: ignore[arg-type]


def collect(
    models: Sequence[nn.Module] | Mapping[str, nn.Module],
    loader: Iterable | Mapping[str, Iterable],
    *,
    until: str | None = None,
    calibration: int = 2048,
    seed: int = 0,
    device: str | torch.device = "auto",
    progress: bool = True,
    forward_fn: Callable[..., Any] | None = None,
    resume: str | Path | None = None,
) -> Moments:
    """The joint moments `merge` would measure: `merge(models, moments=...)` reuses them, `.save` keeps them.

    Arguments and errors as for `merge`. Count, mean [Sn] and second moment [Sn, Sn] (float64) per space.
    """
    wrong = wrong_options({"until": until, "seed": seed, "device": device, "forward_fn": forward_fn, "resume": resume})
    if wrong:
        check_merge(models, loader, calibration=calibration, problems=wrong, call="fxzip.collect")
    p = prepare(
        models, loader, call="fxzip.collect", clock=Clock(), until=until, device=device, verify=False, seed=seed,
        calibration=calibration, forward_fn=forward_fn,
    )  # fmt: skip
    return measure(p, calibration_batches(p, calibration, seed), seed, progress, resume)


def merged_parameters(p: Prepared, matchings: Mapping[str, Matching]) -> tuple[dict[str, Tensor], Heads]:
    """Zipped weights of the shared part, and what every model keeps with U absorbed or explicit."""
    modules = p.graph_modules
    states = [state_of(m) for m in modules]
    shared = merge_parameters(states, p.spaces, matchings, owned(modules[0], p.cut.shared))
    return shared, head_parameters(modules, p.cut, p.spaces, matchings, feature_axis(p.spaces), p.args)


def assemble(p: Prepared, shared: Mapping[str, Tensor], private: Heads, models: Any, heads: str) -> fx.GraphModule:
    """One GraphModule of these parameters."""
    originals = [m.state_dict() for m in _list(models)]
    return build(
        p.graph_modules, p.cut, shared, private, p.names, p.args, as_dict=p.as_dict, heads=heads, originals=originals
    )


def choose_widths(p: Prepared, moments: Moments, budget: float, models: Any) -> dict[str, int]:
    """Widths within the budget. Spaces that turn out not to take a new width keep theirs, and we allocate again."""
    merged = p.merged_spaces()
    terms = cost_terms(p.spaces, p.cut, len(p.names))
    free = resizable(p.spaces, merged, 8)

    def build_at(widths: Mapping[str, int]) -> fx.GraphModule:
        matchings = {s.name: plain_matching(s.size, widths.get(s.name, s.size), len(p.names)) for s in merged}
        return assemble(p, *merged_parameters(p, matchings), models, "separate")

    while free:
        widths = allocate(terms, merged, moments, free, budget, len(p.names))
        wrong = probe(build_at, p.spaces, p.graph_modules[0], p.args, widths)
        if not wrong:
            return widths
        free -= wrong
    raise InputError(f"budget={budget}: no space of this network can change its width; use until= to spend more")


def plain_matching(size: int, width: int, models: int) -> Matching:
    """Some matching of the right shape: slot k holds feature k (mod n) of every model."""
    slots = torch.arange(width) % size
    unmerge = torch.zeros(size, width, dtype=torch.float64)
    unmerge[slots, torch.arange(width)] = 1
    unmerge = unmerge / unmerge.sum(1, keepdim=True).clamp(min=1)
    chosen = torch.zeros(width, size, dtype=torch.float64)
    chosen[torch.arange(width), slots] = 1
    return Matching(chosen.repeat(1, models) / models, unmerge.repeat(models, 1), (size,) * models)


def feature_axis(spaces: Spaces):
    """FX node name -> (feature axes of its value, [(space, positions [n])]); None without features."""

    def of(name: str):
        nodes = spaces.lowered.values.get(name, ())
        layouts = spaces.layouts(nodes[0].name) if nodes else ()
        if not layouts:
            return None
        layout = layouts[0]
        return layout.axes, [(s, column) for s, positions in layout.runs for column in positions.T]

    return of


def agree(p: Prepared, matchings: Mapping[str, Matching], moments: Moments) -> bool:
    """Whether the models are equal, or compute the same features in another order."""
    first, *others = (state_of(m) for m in p.graph_modules)
    if all(s[n].shape == first[n].shape and torch.equal(s[n], first[n]) for s in others for n in first):
        return True
    return bool(moments) and all(lossless(m, moments[n]) for n, m in matchings.items() if n in moments)


def calibrate(zipped: fx.GraphModule, batches: list[tuple], agree: bool) -> list[str]:
    """Recompute batch-norm statistics of the merged network; what the user should know if that is not possible.

    agree: nothing is lost by the matching, so the models' own statistics are right, and better than a sample's."""
    if agree:
        return ["the models agree feature by feature: batch-norm statistics are their own, not recomputed"]
    if batches:
        recompute_statistics(zipped, batches, lambda batch: batch)
        return []
    if any(name.endswith("running_var") for name, _ in zipped.named_buffers()):
        return ["batch-norm statistics were averaged, not recomputed: pass a loader, or expect chance accuracy"]
    return []


def describe(
    p: Prepared,
    method: str,
    matchings: Mapping[str, Matching],
    zipped: fx.GraphModule,
    notices: list[str],
    clock: Clock,
) -> Report:
    """What was done, for `report`."""
    device = next((t.device for t in zipped.parameters()), torch.device("cpu"))
    args = tuple(x.to(device) if isinstance(x, Tensor) else x for x in p.args)
    one = tuple(x[:1] if isinstance(x, Tensor) and x.dim() else x for x in args)
    sizes = [Size(n, *_cost(m.to(device), one)) for n, m in zip(p.names, p.graph_modules, strict=True)]
    result = Size("merged", *_cost(zipped, one))
    private = sum(t.numel() for n, t in zipped.named_parameters() if n in _private(zipped))
    structure = {s.name: s.structure for s in p.spaces}
    rows = tuple(SpaceRow(n, structure[n], m.sizes, m.width, m.quality, m.baseline) for n, m in matchings.items())
    notices = [*dict.fromkeys(n for t in p.traced for n in t.notices), *notices]
    return Report(
        method,
        p.names,
        tuple(sizes),
        result,
        1 - private / max(result.parameters, 1),
        rows,
        tuple(str(f) for f in p.spaces.frozen),
        tuple(notices),
        str(p.verification) if p.verification is not None else "",
        dict(clock.seconds),
    )


def _private(zipped: fx.GraphModule) -> set[str]:
    targets = tuple(zipped.meta[KEY]["targets"])
    return {n for n, _ in zipped.named_parameters() if any(n == t or n.startswith(t + ".") for t in targets)}


def _cost(module: nn.Module, args: tuple) -> tuple[int, int]:
    c = cost(module, args)
    return c.parameters, c.flops


def _list(models: Any) -> list[nn.Module]:
    return list(models.values()) if isinstance(models, Mapping) else list(models)
