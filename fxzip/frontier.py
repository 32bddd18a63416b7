"""`frontier`: what each budget or cut costs and keeps, measured on the user's own batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Signature, signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from . import markup
from .calibration import calibration_batches
from .drawing import drawing
from .errors import InputError
from .evaluate import Ensemble
from .merge import choose, collect, merge
from .options import wrong_options
from .prepare import prepare
from .prepared import Clock
from .report import report, table
from .trace import on

__all__ = ["Frontier", "Point", "frontier"]

HOLDOUT = 512  # samples that no fit saw


@dataclass(frozen=True)
class Point:
    """One merge. cost: FLOPs of the result over those of one model; parameters: scalars in the result.

    drift: per model, E|y - y0|^2 / E|y0 - E y0|^2 of the merged network's outputs y against the model's own y0,
    on batches that nothing was fitted to: 0 is the ensemble, 1 a constant. measured: from `evaluate`, or None.
    """

    name: str
    cost: float
    parameters: int
    drift: tuple[float, ...]
    measured: Any = None


@dataclass(frozen=True)
class Frontier:
    """Points by ascending cost; the last is the ensemble. Printable; `plot` draws it."""

    points: tuple[Point, ...]
    tasks: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(table(*self._table()))

    def _repr_html_(self) -> str:
        return markup.table(*self._table())

    def _table(self) -> tuple[list[str], list[list[str]]]:
        heads = ["merge", "FLOPs", "parameters", *(f"drift {t}" for t in self.tasks), "measured"]
        return heads, [
            [p.name, f"{p.cost:.2f}x", f"{p.parameters:,}", *(f"{d:.4f}" for d in p.drift), _shown(p.measured)]
            for p in self.points
        ]

    def plot(self, value: Callable[[Any], float] = float, label: str = "measured"):
        """A matplotlib Figure: `value(measured)` (or, without evaluate, 1 - mean drift) against cost.

        Raises InputError without matplotlib (the `report` extra), and where `value` gives no number.
        """
        measured = all(p.measured is not None for p in self.points)
        try:
            heights = [value(p.measured) if measured else 1 - sum(p.drift) / len(p.drift) for p in self.points]
        except TypeError as error:
            kind = type(self.points[0].measured).__name__
            raise InputError(
                f"Frontier.plot: evaluate gave {kind}, which is no number: pass value=, such as lambda m: m.joint"
            ) from error
        figure, axes = drawing("Frontier.plot", 6, 4)
        axes.axhline(heights[-1], color="0.6", linestyle=":", linewidth=1)
        axes.plot([p.cost for p in self.points], heights, marker="o", color="C0", linewidth=1.5)
        for point, height in zip(self.points, heights, strict=True):
            axes.annotate(
                point.name, (point.cost, height), (0, -12), textcoords="offset points", ha="center", fontsize=8
            )
        axes.set_xlabel("FLOPs, times one network")
        axes.set_ylabel(label if measured else "1 - drift of the outputs")
        axes.margins(x=0.12, y=0.18)
        return figure


def frontier(
    models: Sequence[nn.Module] | Mapping[str, nn.Module],
    loader: Iterable,
    budgets: Sequence[float] = (1.0, 1.15, 1.33),
    *,
    untils: Sequence[str] = (),
    evaluate: Callable[[nn.Module], Any] | None = None,
    calibration: int = 2048,
    holdout: int = HOLDOUT,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Frontier:
    """Merge at every budget and every cut; features are measured once for all budgets, and once for each cut.

    models, loader: as for `merge`. budgets: FLOPs over one model's; 1.0 keeps the widths. untils: cuts to try.
    evaluate: merged network -> anything (a number, an `Accuracy`); also called with the ensemble. holdout: samples
    read after the `calibration` ones, for the drift; if the loader has none beyond, the last calibration samples are
    used again, and the drift is optimistic. options: passed on to `merge`; of a resume folder every cut has one inside.
    Raises InputError for a budget below 0.1 or no point at all, and what `merge` raises.

    >>> a, b = (nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)) for _ in range(2))
    >>> found = frontier([a, b], [torch.randn(64, 4)], [1.0, 1.5], progress=False)
    >>> [p.name for p in found.points]
    ['1x', '1.5x', 'ensemble']
    """
    _check(models, budgets, untils, evaluate, holdout, options)
    reading = {k: options[k] for k in ("device", "forward_fn") if k in options}
    p = prepare(models, loader, call="fxzip.frontier", clock=Clock(), seed=seed, calibration=calibration + holdout,
                verify=options.get("verify", True), **reading)  # fmt: skip
    batches = calibration_batches(p, calibration + holdout, seed)
    total = sum(_size(b) for b in batches)
    fitted = _named(_slice(batches, 0, calibration), signature(p.graph_modules[0].forward))
    held = _slice(batches, calibration if total > calibration else max(total - holdout, 0), total)
    kept = options.pop("resume", None)
    moments = collect(models, fitted, calibration=calibration, seed=seed, progress=progress, resume=kept,
                      memory=options.get("memory"), since=options.get("since"), **reading)  # fmt: skip
    given: dict[str, Any] = options | {
        "verify": False, "calibration": calibration, "seed": seed, "progress": progress,
    }  # fmt: skip
    plans: list[tuple[str, dict[str, Any]]] = [
        (f"{b:g}x", {"budget": None if b == 1 else b, "moments": moments}) for b in budgets
    ]
    plans += [(f"until {u}", {"until": u, "resume": kept and Path(kept) / f"until {u}"}) for u in untils]
    points: list[Point] = []
    zipped = p.graph_modules[0]
    for name, plan in tqdm(plans, desc="frontier", unit="merge", disable=not progress, leave=False):
        zipped = merge(models, fitted, **given, **plan)
        points.append(_point(name, zipped, p.graph_modules, held, evaluate))
    sizes = report(zipped).inputs
    flops, parameters = [s.flops or 0 for s in sizes], sum(s.parameters or 0 for s in sizes)
    ensemble = Ensemble(p.graph_modules, p.names if p.as_dict else None).eval()
    measured = evaluate(ensemble) if evaluate else None
    points.sort(key=lambda x: x.cost)
    end = Point("ensemble", sum(flops) / max(*flops, 1), parameters, (0.0,) * len(p.names), measured)
    return Frontier((*points, end), p.names)


def _check(
    models: Any, budgets: Any, untils: Any, evaluate: Any, holdout: Any, options: Mapping[str, Any]
) -> None:
    found = wrong_options({"round_to": options.get("round_to", 8)})
    choose(options.get("method", "solve"), next((b for b in budgets if _budget(b) and b != 1), None), models, found)
    found += [f"budget {b!r} must be a number of at least 0.1" for b in budgets if not _budget(b)]
    found += ["budgets and untils are both empty: nothing to merge"] * (not budgets and not untils)
    found += [f"evaluate must be callable, not a {type(evaluate).__name__}"] * (
        evaluate is not None and not callable(evaluate)
    )
    found += [f"holdout must be a positive number of samples, got {holdout!r}"] * (
        not isinstance(holdout, int) or holdout < 1
    )
    taken = sorted(options.keys() & {"budget", "until", "moments"})
    found += [f"{name}= is what frontier varies: pass budgets= and untils=" for name in taken]
    found += ["heads= joins outputs, the drift is each model's own: leave it out, and pass it to merge then"] * (
        options.get("heads", "separate") != "separate"
    )
    if found:
        raise InputError.listing("fxzip.frontier", found)


def _budget(b: Any) -> bool:
    return isinstance(b, (int, float)) and not isinstance(b, bool) and b >= 0.1


@torch.no_grad()
def _point(
    name: str, zipped: fx.GraphModule, parents: Sequence[nn.Module], held: list[tuple], evaluate: Callable | None
) -> Point:
    made = report(zipped)
    where = next((t.device for t in zipped.parameters()), torch.device("cpu"))
    wrong, total = [0.0] * len(parents), [0.0] * len(parents)
    for batch in held:
        outputs = zipped(*on(where, batch))
        outputs = list(outputs.values()) if isinstance(outputs, Mapping) else list(outputs)
        for i, (parent, output) in enumerate(zip(parents, outputs, strict=True)):
            for y, y0 in zip(_floats(output), _floats(parent(*batch)), strict=True):
                y0 = y0.double()
                wrong[i] += float((y.to(y0) - y0).square().sum())
                total[i] += float((y0 - y0.mean(0, keepdim=True)).square().sum())
    drift = tuple(w / max(t, 1e-300) for w, t in zip(wrong, total, strict=True))
    cost = (made.result.flops or 0) / max(1, *(s.flops or 0 for s in made.inputs))
    return Point(name, cost, made.result.parameters or 0, drift, evaluate(zipped) if evaluate else None)


def _slice(batches: list[tuple], start: int, stop: int) -> list[tuple]:
    """Samples start to stop (at most), in their batches."""
    found: list[tuple] = []
    at = 0
    for batch in batches:
        size = _size(batch)
        low, high = max(start - at, 0), min(stop - at, size)
        if low < high:
            found.append(
                tuple(x[low:high] if isinstance(x, Tensor) and x.dim() and len(x) == size else x for x in batch)
            )
        at += size
    return found


def _named(batches: list[tuple], parameters: Signature) -> list[Any]:
    """The batches as dicts: of a tuple `merge` would take what need not be given (a mask) for labels."""
    if any(p.kind is p.VAR_POSITIONAL for p in parameters.parameters.values()):
        return list(batches)
    return [dict(zip(parameters.parameters, b, strict=True)) for b in batches]


def _size(batch: tuple) -> int:
    return max((len(x) for x in batch if isinstance(x, Tensor) and x.dim()), default=1)


def _floats(output: Any) -> list[Tensor]:
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def _shown(measured: Any) -> str:
    if isinstance(measured, float):
        return f"{measured:.4g}"
    return "" if measured is None else str(measured)
