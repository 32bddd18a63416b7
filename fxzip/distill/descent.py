"""The steps: curvature and rate from the first samples, epochs with momentum, each judged on samples that none sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, cos, inf, isfinite, pi
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from ..errors import FxzipError
from ..solve.lanes import Lane
from ..solve.sequence import Pass
from ..trace import batch_size
from .aims import feature_aims, kept_outputs, output_aims, targets
from .curvature import Curvature
from .network import Layer, Network, Place, Unmerge, derived
from .precision import Lower
from .views import seen, taken

if TYPE_CHECKING:
    from . import Distill

MOMENTUM = 0.9
FLAT = 1e6  # best steps above which nothing comes of them but rounding errors: it is about 1 where curvature is exact
SLOWER = 4  # by so much after an epoch that has to be undone
NEAR, SMALL = 0.1, 0.01  # how far errors in another precision may be from those in the own, relative to these or SMALL
FIRST, SIXTEENTH, MOST = 512, 16, 2_048  # samples that curvature is from: more of many, but no more than that
HELD_OUT = 8  # one in so many chunks is not learnt from: what epochs are judged on

Errors = tuple[float, float]  # relative squared ones, of outputs and of features, each as they count


@dataclass(frozen=True)
class Distilled:
    """Errors on calibration samples that no step has seen; where there are too few for that, on those it has."""

    before: Errors
    after: Errors  # the same: no epoch has become better, and the layers are as solve left them
    views: int = 0  # beside the inputs as they are
    held_out: bool = False
    precision: str = ""  # what was said of it

    def __str__(self) -> str:
        outputs, features = zip(self.before, self.after, strict=True)
        told = "errors of outputs {:.4f} -> {:.4f}, of features {:.4f} -> {:.4f}".format(*outputs, *features)
        means = f" (outputs: from the mean over an input and {self.views} of its views)" if self.views else ""
        kept = "; no epoch ended better, so the layers are solve's" if self.after == self.before else ""
        samples = f"{'held-out ' if self.held_out else ''}calibration samples"
        return f"distill: {told}{means} on {samples}{kept}{self.precision}"


@dataclass(frozen=True)
class Nets:
    """What steps run, in one precision."""

    network: Network
    parents: Sequence[Lane]
    lower: Lower | None = None

    def to(self, lower: Lower) -> Nets:
        return Nets(self.network.lowered(lower), [lower.lane(p) for p in self.parents], lower)


class Descent:
    """One network's steps: what moves, what it is to come near to, and on which samples."""

    def __init__(self, steps: Pass, chunks: Sequence[tuple], unmerged: Unmerge, settings: Distill) -> None:
        layers = {(point.name, model): Layer.of(point, parts) for point, parts, model in steps.fits}
        for layer in layers.values():
            layer.matrix.requires_grad_(True)
        self.settings, self.chunks, self.layers, self.size = settings, chunks, layers, batch_size(chunks[0])
        self.judged = chunks[HELD_OUT - 1 :: HELD_OUT]  # from all over, as loaders may go task by task
        self.learnt = [c for k, c in enumerate(chunks, 1) if k % HELD_OUT]
        owners = {name: steps.owners(name) for name in steps.dynamic}
        network = Network(steps.merged, steps.private, steps.dynamic, owners, unmerged, layers)
        self.nets = self.own = Nets(network, steps.parents)
        self.aims = [*output_aims(steps), *feature_aims(steps, layers, settings.features, bool(settings.views))]
        self.scale: list[Tensor] = []  # of the variance of every aim
        self.generator = torch.Generator().manual_seed(settings.seed)

    def run(self, progress: bool) -> Distilled:
        if not self.layers:
            return Distilled((0.0, 0.0), (0.0, 0.0))
        count = min(max(FIRST, len(self.learnt) * self.size // SIXTEENTH), MOST)
        first = self.learnt[: ceil(count / self.size)]
        curvature = Curvature(self.layers, self.settings.damping)
        for args in first:
            tape: dict[Place, tuple[dict, Tensor]] = {}
            with torch.enable_grad():
                curvature.add(tape, self._residuals(args, tape), self.size, self.generator)
        curvature.invert()
        rate, said = self._rate(curvature, first), self._change_precision(first[0])
        judged = self.judged or first
        kept = kept_outputs(self.aims, self.own.parents, judged, self.settings.views)
        judge = lambda: self._errors(judged, kept)  # noqa: E731
        solved, before = self._held() if self.nets is not self.own else {}, judge()
        after = self._descend(curvature, rate, judge, before, progress)
        if self.nets is not self.own:  # in which what is nearer may be so by rounding alone
            self.nets, ended = self.own, self._held()
            after = judge()
            self._restore(solved)
            before = judge()
            if _worse(before, after):
                after = before
            else:
                self._restore(ended)
        self._write()
        return Distilled(before, after, len(self.settings.views), bool(self.judged), said)

    def _change_precision(self, args: tuple) -> str:
        """To that of the settings, where the network can be run in it, and errors are what they were; what is to be
        said of it."""
        dtype = self.settings.precision
        own = {k.point.lane.state[k.parts.weight.name].dtype for k in self.layers.values()}
        if not isinstance(dtype, torch.dtype) or own == {dtype}:
            return ""
        name, errors = str(dtype).removeprefix("torch."), self._errors([args])
        if len(own) > 1:
            return f"; not in {name}: weights are {' and '.join(sorted(str(t).removeprefix('torch.') for t in own))}"
        self.nets = self.own.to(Lower(dtype, own.pop()))
        try:
            self._gradients(args)
            made = self._errors([args])
            if all(abs(a - b) <= NEAR * max(b, SMALL) for a, b in zip(made, errors, strict=True)):
                return f"; steps in {name}"
            why = "errors would be {:.2g} and {:.2g}, not {:.2g} and {:.2g}".format(*made, *errors)
        except (RuntimeError, FxzipError) as error:  # such as an operator without a kernel for it
            why = str(error).partition("\n")[0]
        self.nets = self.own
        return f"; not in {name}: {why}"

    def _residuals(
        self, args: tuple, tape: dict | None = None, view: int = 0, outputs: Sequence[Tensor] | None = None
    ) -> list[Tensor]:  # fmt: skip
        """Of every aim, scaled so that squares add up to its share of the loss, times the samples. view: 0 is none.
        outputs: what these are to be, if that is known."""
        network, parents, lower = self.nets.network, self.nets.parents, self.nets.lower
        views = self.settings.views
        others = [] if outputs else [k for k in range(1 + len(views)) if k != view]
        shown = [seen(views[k - 1], args) if k else args for k in (view, *others)]
        args, *rest = [lower.args(x) for x in shown] if lower else shown
        wanted = targets(self.aims, parents, args, rest, outputs)
        if not self.scale:
            spread = [(t - t.mean(0)).square().mean().clamp(min=1e-12) for t in wanted]
            self.scale = [(a.share / v).sqrt() for a, v in zip(self.aims, spread, strict=True)]
        values = network([x for x in tree_leaves(args) if isinstance(x, Tensor)], tape)
        return [
            (values[a.place] - t) * (s * (self.size / t.numel()) ** 0.5)
            for a, t, s in zip(self.aims, wanted, self.scale, strict=True)
        ]

    @torch.no_grad()
    def _errors(self, batches: Sequence[tuple], kept: Sequence[Tensor] | None = None) -> Errors:
        """kept: what outputs are to be on all of them."""
        total = [0.0, 0.0]
        for k, args in enumerate(batches):
            outputs = [t[k * self.size : (k + 1) * self.size] for t in kept] if kept else None
            for a, r in zip(self.aims, self._residuals(args, outputs=outputs), strict=True):
                total[a.feature] += float(r.double().square().sum()) / (self.size * len(batches))
        return (total[0], total[1]) if all(map(isfinite, total)) else (inf, inf)

    def _gradients(
        self, args: tuple, view: int = 0, outputs: Sequence[Tensor] | None = None
    ) -> dict[Place, Tensor]:  # fmt: skip
        with torch.enable_grad():
            found = self._residuals(args, view=view, outputs=outputs)
            by = [r.detach() / self.size for r in found]  # what half their squares change by
            return dict(zip(self.layers, derived(found, by, [k.matrix for k in self.layers.values()]), strict=True))

    def _rate(self, curvature: Curvature, batches: Sequence[tuple]) -> float:
        """From the best step along the natural gradient: -<g, d> / |J d|^2, by differences."""
        slope = bend = 0.0
        for args in batches[: ceil(4 * self.settings.batch / self.size)]:
            gradients = self._gradients(args)
            steps = {p: curvature.step(p, g) for p, g in gradients.items()}
            slope -= float(sum((gradients[p] * d).double().sum() for p, d in steps.items()))
            length = 1e-2
            with torch.no_grad():
                here = self._residuals(args)
                self._move(steps, length)
                there = self._residuals(args)
                self._move(steps, -length)
            bend += sum(float(((b - a).double() / length).square().sum()) for a, b in zip(here, there, strict=True))
        best = slope * self.size / bend if bend > 0 else inf
        return self.settings.rate * best if best < FLAT else 0.0

    def _move(self, steps: Mapping[Place, Tensor], length: float) -> None:
        for place, step in steps.items():
            self.layers[place].matrix.data.add_(step, alpha=length)

    def _descend(
        self, curvature: Curvature, rate: float, judge: Callable[[], Errors], best: Errors, progress: bool
    ) -> Errors:  # fmt: skip
        """Steps with momentum. An epoch that ends worse is undone, and what follows is slower. Errors at the end."""
        joined = max(1, round(self.settings.batch / self.size))
        each, epochs, drawn = max(1, len(self.learnt) // joined), self.settings.epochs, self._drawn()
        held, speed = self._held(), {p: torch.zeros_like(layer.matrix) for p, layer in self.layers.items()}
        bar = tqdm(total=epochs * each, desc="distill", unit="step", disable=not progress, leave=False)
        for epoch in range(epochs):
            for k in range(each):
                gradient: dict[Place, Tensor] = {}
                for _ in range(min(joined, len(self.learnt))):
                    for p, g in self._gradients(*next(drawn)).items():
                        gradient[p] = gradient[p] + g if p in gradient else g
                if not all(bool(g.isfinite().all()) for g in gradient.values()):
                    bar.update(each - k)
                    break  # the epoch is lost, which need not take all its steps
                for p, g in gradient.items():
                    speed[p].mul_(MOMENTUM).add_(curvature.step(p, g / joined))
                self._move(speed, rate * (1 + cos(pi * (epoch + k / each) / epochs)) / 2)
                bar.update()
            now = judge()
            if _worse(best, now):
                self._restore(held)
                rate, speed = rate / SLOWER, {p: torch.zeros_like(v) for p, v in speed.items()}
            else:
                best, held = now, self._held()
        bar.close()
        return best

    def _held(self) -> dict[Place, Tensor]:
        return {p: layer.matrix.detach().clone() for p, layer in self.layers.items()}

    def _restore(self, held: Mapping[Place, Tensor]) -> None:
        for place, matrix in held.items():
            self.layers[place].matrix.data.copy_(matrix)

    def _drawn(self) -> Iterator[tuple[tuple, int, list[Tensor] | None]]:
        """Chunks of the samples to learn from, dealt anew for every epoch; by which view each is seen, 0: none; and
        what its outputs are to be, where that was kept."""
        count, views = len(self.learnt) * self.size, len(self.settings.views)
        kept = kept_outputs(self.aims, self.own.parents, self.learnt, self.settings.views)
        while True:
            order = torch.randperm(count, generator=self.generator)
            for index in order.split(self.size):
                view = int(torch.randint(1 + views, (), generator=self.generator)) if views else 0
                yield taken(self.learnt, index, self.size), view, [t[index] for t in kept] if kept else None

    @torch.no_grad()
    def _write(self) -> None:
        """Matrices into the lanes, and for norms the exact statistics of what they get."""
        sums = {p: [torch.zeros(()), torch.zeros(()), 0] for p, layer in self.layers.items() if layer.point.normed}
        for args in self.chunks if sums else ():
            tape: dict[Place, tuple[dict, Tensor]] = {}
            self.own.network([x for x in tree_leaves(args) if isinstance(x, Tensor)], tape)
            for p, total in sums.items():
                layer = self.layers[p]
                rows = layer.rows_of(tape[p][1]).flatten(1).double() - layer.matrix[..., -1].flatten().double()
                sums[p] = [total[0] + rows.sum(0), total[1] + rows.square().sum(0), total[2] + len(rows)]
        for p, layer in self.layers.items():
            nothing = torch.zeros(())
            mean, square, count = sums.get(p, (nothing, nothing, 1))
            layer.write(mean / count, square / count - (mean / count) ** 2)


def _worse(before: Errors, after: Errors) -> bool:
    return not sum(after) < sum(before)
