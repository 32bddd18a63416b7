"""Between networks: the loss on the line from one to another, and on the plane through two and their merge."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from . import passes
from .assemble import assemble, merged_parameters
from .drawing import drawing
from .errors import InputError
from .match import Average, Matcher
from .repair import Repair, repair_parameters, split
from .report import table
from .rewrite import recompute_statistics
from .rewrite.zipped import notes
from .trace import state_by_all_names

Evaluate = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Line:
    """evaluate(network) at the shares `at` of the second network, features in the models' own order and aligned."""

    at: tuple[float, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]

    @property
    def barriers(self) -> tuple[float, float]:
        """Before and after alignment: the largest excess over the straight line between the ends.

        >>> Line((0.0, 0.5, 1.0), (1.0, 4.0, 2.0), (1.0, 1.5, 2.0)).barriers
        (2.5, 0.0)
        """

        def excess(values: Sequence[float]) -> float:
            ends = zip(self.at, values, strict=True)
            return max(v - ((1 - t) * values[0] + t * values[-1]) for t, v in ends)

        return excess(self.before), excess(self.after)

    def __str__(self) -> str:
        rows = zip(self.at, self.before, self.after, strict=True)
        lines = table(("share", "before", "after"), [(f"{t:.2f}", f"{a:.4f}", f"{b:.4f}") for t, a, b in rows])
        return "\n".join([*lines, "", "barrier: {:.4f} before, {:.4f} after alignment".format(*self.barriers)])

    def plot(self, label: str = "loss"):
        """A matplotlib Figure. Raises InputError without matplotlib (the `report` extra)."""
        figure, axes = drawing("Line.plot", 6, 4)
        axes.plot(self.at, self.before, marker="o", color="C1", label="own order")
        axes.plot(self.at, self.after, marker="o", color="C2", label="aligned")
        axes.set_xlabel("share of the second network")
        axes.set_ylabel(label)
        axes.legend(frameon=False)
        return figure


@dataclass(frozen=True)
class Plane:
    """values[j][i] = evaluate(network) at (x[i], y[j]), on the plane through `points` (name -> its coordinates)."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]
    points: Mapping[str, tuple[float, float]]

    def plot(self, label: str = "loss"):
        """A matplotlib Figure. Raises InputError without matplotlib (the `report` extra)."""
        figure, axes = drawing("Plane.plot", 6, 4.5)
        self.draw(figure, axes, label)
        return figure

    def draw(self, figure: Any, axes: Any, label: str = "loss") -> None:
        """On given axes: contours at every twentieth of the values, low ones dark, whatever their scale."""
        every = sorted(v for row in self.values for v in row)
        levels = sorted({every[round(k * (len(every) - 1) / 20)] for k in range(21)})
        levels = levels if len(levels) > 1 else [levels[0] - 1e-9, levels[0] + 1e-9]
        from matplotlib.colors import BoundaryNorm  # pyright: ignore[reportMissingImports]

        drawn = axes.contourf(self.x, self.y, self.values, levels=levels, cmap="cividis",
                              norm=BoundaryNorm(levels, 256))  # fmt: skip
        axes.contour(self.x, self.y, self.values, levels=levels[:: max(1, len(levels) // 7)], colors="white",
                     linewidths=0.4)  # fmt: skip
        figure.colorbar(drawn, ax=axes, label=label, format="%.2g")
        for name, (x, y) in self.points.items():
            axes.plot([x], [y], marker="o", color="white", markeredgecolor="black")
            axes.annotate(name, (x, y), (0, 8), textcoords="offset points", ha="center", color="white")
        axes.set_xlabel("distance in weights")
        longer = max(self.x[-1] - self.x[0], self.y[-1] - self.y[0])
        if longer < 2.5 * min(self.x[-1] - self.x[0], self.y[-1] - self.y[0]):  # a merge may lie far from both
            axes.set_aspect("equal")


def line(
    models: Sequence[nn.Module] | Mapping[str, nn.Module],
    loader: Iterable | None,
    evaluate: Evaluate,
    *,
    method: str | Matcher | Repair = "permute",
    steps: int = 11,
    **options: Any,
) -> Line:
    """Interpolate linearly between two models of one task, before and after `method` aligns their features.

    method: one-to-one, also with "+repair" or "+rescale", which set the spread of features right at every step.
    evaluate: a network that answers as the models do -> loss. What makes the outputs stays per model and is mixed
    there, which for a linear head is interpolation too. loader, options (calibration, device, example_inputs,
    forward_fn, until, seed): as for `merge`. Batch-norm statistics are recomputed at every step. The models are not
    changed. Raises InputError unless there are two models with equal outputs and 2 steps or more, and the method is
    one-to-one; and what `merge` raises.

    >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval() for _ in range(2))
    >>> found = line([a, b], [torch.randn(32, 4)], lambda net: float(net(torch.ones(1, 4)).sum()), steps=3)
    >>> found.at
    (0.0, 0.5, 1.0)
    """
    if not isinstance(models, Sized) or len(models) != 2 or steps < 2:
        given = f"{len(models)} models" if isinstance(models, Sized) else type(models).__name__
        raise InputError(f"fxzip.landscape.line: needs two models and at least 2 steps, not {given} and {steps} steps")
    if options.get("since") is not None:
        raise InputError("fxzip.landscape.line: since= keeps weights per model, and those are on no line: leave it out")
    until, seed = options.pop("until", None), options.pop("seed", 0)
    repair, matcher = split(method)
    if repair is not None and loader is None:
        raise InputError(f"fxzip.landscape.line: {repair.name} measures features: pass a loader")
    graph = passes.start(models, loader, call="fxzip.landscape.line", progress=False, **options)
    plan = [passes.Infer(), passes.Cut(until), passes.Read(options.get("calibration", 2048), seed)]
    plan += [passes.Measure(seed)] if loader is not None else []
    found = []
    at = tuple(k / (steps - 1) for k in range(steps))
    for stage in plan:
        graph = stage(graph).graph_module
    for aligned, post in ((Average(), None), (matcher, repair)):
        job = passes.job(passes.Match(aligned, seed=seed)(graph).graph_module)
        found.append(tuple(_at(job, t, evaluate, post) for t in at))
    return Line(at, *found)


def _at(job: passes.Job, share: float, evaluate: Evaluate, repair: Repair | None) -> float:
    """The value of the network whose merged features are (1 - share) of the first model's and share of the second's."""
    wrong = [n for n, m in job.matchings.items() if not all(_permutes(m.blocks_unmerge(i)) for i in (0, 1))]
    if wrong:
        raise InputError(f"fxzip.landscape.line: {job.method} is not one-to-one on space {wrong[0]}; take 'permute'")
    p = replace(job.prepared, shares=(1 - share, share))
    matchings = {n: m.weighted(p.shares) for n, m in job.matchings.items()}
    shared, heads = merged_parameters(p, matchings)
    if repair is not None:
        shared, _ = repair_parameters(
            p.graph_modules, p.spaces, p.cut, matchings, shared, job.batches, repair.shift, p.shares
        )  # fmt: skip
    network = assemble(p, shared, heads, job.models, "separate")
    if job.batches:
        recompute_statistics(network, job.batches, lambda batch: batch)
    return float(evaluate(_Mixed(network, share).eval()))


class _Mixed(nn.Module):
    """(1 - share) of a merged network's first output and share of its second."""

    def __init__(self, network: nn.Module, share: float):
        super().__init__()
        self.network, self.share = network, share

    def forward(self, *inputs: Any) -> Any:
        outputs = self.network(*inputs)
        first, second = outputs.values() if isinstance(outputs, Mapping) else outputs
        return tree_map(self._mix, first, second)

    def _mix(self, a: Any, b: Any) -> Any:
        if not isinstance(a, Tensor):
            return a
        if a.shape != b.shape:
            raise InputError(
                f"fxzip.landscape.line: outputs {list(a.shape)} and {list(b.shape)} cannot be interpolated: the line is"
                " for two networks of one task"
            )
        return a.lerp(b, self.share)


def _permutes(unmerge: Tensor) -> bool:
    square = unmerge.shape[0] == unmerge.shape[1]
    return square and bool((unmerge.sum(0) == 1).all() and (unmerge.max(1).values == 1).all())


@torch.no_grad()
def plane(
    models: Sequence[nn.Module] | Mapping[str, nn.Module],
    zipped: fx.GraphModule,
    evaluate: Evaluate,
    *,
    steps: int = 9,
    margin: float = 0.25,
    batches: Iterable | None = None,
) -> Plane:
    """evaluate on a grid of the plane in weight space through two models, as they are, and their merge.

    models: the two that were merged. zipped: the merge, at the models' widths. A point has all parameters of the
    merged network, heads included; at a model's own corner they are that model's body and every model's own head.
    margin: how far the grid reaches beyond the three points, as a share of their extent. batches: positional inputs;
    batch-norm statistics are recomputed on them at every point, otherwise they are interpolated.
    Raises InputError unless there are two models and 2 steps or more, and where the merge has other shapes or
    parameters than they have.
    """
    given = list(models.values()) if isinstance(models, Mapping) else list(models)
    if len(given) != 2 or steps < 2:
        raise InputError(
            f"fxzip.landscape.plane: needs two models and at least 2 steps, not {len(given)} models and {steps} steps"
        )
    names = [str(t) for t in notes(zipped)["tasks"]]
    network = copy.deepcopy(zipped)
    merged = {n: t for n, t in state_by_all_names(network).items() if t.is_floating_point()}
    corners = [_corner(zipped, given, i, merged) for i in (0, 1)]
    origin = _flat(corners[0])
    to_second, to_merge = _flat(corners[1]) - origin, _flat(merged) - origin
    length = to_second.norm()
    first = to_second / length.clamp_min(1e-30)
    along = to_merge @ first
    second = to_merge - along * first
    height = second.norm()
    second = second / height.clamp_min(1e-30)
    points = {names[0]: (0.0, 0.0), names[1]: (float(length), 0.0), "merged": (float(along), float(height))}
    x, y = (_grid([p[k] for p in points.values()], steps, margin, float(length)) for k in (0, 1))
    inputs = [b if isinstance(b, tuple) else (b,) for b in batches] if batches is not None else []

    def value(a: float, b: float) -> float:
        at = origin + a * first + b * second
        for tensor, part in zip(merged.values(), at.split([t.numel() for t in merged.values()]), strict=True):
            tensor.copy_(part.view_as(tensor))
        for name, tensor in merged.items():
            if name.endswith("running_var"):
                tensor.clamp_(min=1e-6)
        if inputs:
            recompute_statistics(network, inputs, lambda batch: batch)
        return float(evaluate(network))

    return Plane(x, y, tuple(tuple(value(a, b) for a in x) for b in y), points)


def _corner(
    zipped: fx.GraphModule, models: Sequence[nn.Module], model: int, merged: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of the merged network with one model's body, and every model's own head."""
    info, states = notes(zipped), [dict(state_by_all_names(m)) for m in models]
    found = {}
    for name, tensor in merged.items():
        owner = next((t for t in info["targets"] if name == t or name.startswith(t + ".")), None)
        task, original = info["targets"][owner] if owner else (None, "")
        index = model if task is None else list(info["tasks"]).index(task)
        found[name] = states[index].get(original + name[len(owner or "") :])
        if found[name] is None or found[name].shape != tensor.shape:
            raise InputError(
                f"fxzip.landscape.plane: {name} of the merge has no counterpart of shape {list(tensor.shape)} in the"
                " models: merge at their own widths (budget=None), by a method that leaves no unmerge in the graph"
            )
    return found


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors.values()])


def _grid(values: Sequence[float], steps: int, margin: float, scale: float) -> tuple[float, ...]:
    margin *= max(scale, max(values) - min(values))
    low, high = min(values) - margin, max(values) + margin
    return tuple(low + (high - low) * k / (steps - 1) for k in range(steps))
