"""What was tried for solve and is not in the library, on the CIFAR-10 pair: targets by task, other metrics of select.

    python benchmarks/tried.py --data ../shared/data --checkpoints a.pt b.pt

*Targets by task*: on an image of task i, merged features are fitted to model i's features rather than to the mean of
their groups; the others count `rest`. Which task an image is of is known here from its label, or guessed from the
parents' logits. *By gradients*: features are selected in the metric E[g g^T], g the gradients of random sums of
logits. *By all that follows*: in one without gradients, see what_follows.py. These reach into fxzip's internals: a
record of experiments, not a way to use the library. *solve+distill*: what the features count beside the outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from unittest.mock import patch

import torch
from cifar_pair import parents_of
from common import Bench, announce, drifted, machine, options, parse, save, show
from data import _shuffled, load
from torch import Tensor, fx
from what_follows import metric_by_what_follows

import fxzip
from fxzip import Distill, Permute, Select, Solve, Suited
from fxzip.match import Read
from fxzip.measure import Programs
from fxzip.measure.programs import rows_of
from fxzip.prepared import Prepared
from fxzip.solve import CHUNK
from fxzip.solve.lanes import Lane
from fxzip.solve.mixing import Mixer, _along

IMAGES, SUMS = 256, 4  # for gradients: of so many images, of so many random sums of logits each


@contextmanager
def targets_by_task(weights: Tensor) -> Iterator[None]:
    """weights [samples, models], in the order of the calibration images; rows add up to 1."""
    value, mix, at = Lane.value, Mixer.__call__, [0]

    def watched(lane: Lane, name: str, chunk: int):
        at[0] = chunk
        return value(lane, name, chunk)

    def weighted(mixer: Mixer, parents: Sequence[Tensor]) -> Tensor:
        own = weights[at[0] * CHUNK : at[0] * CHUNK + len(parents[0])].T  # [models, b]
        sizes = [-1] + [1] * (parents[0].dim() - 1)
        parts = [_along(v, mixer.axes, m) * w.view(sizes) for v, m, w in zip(parents, mixer.maps, own, strict=True)]
        share = [_along(torch.ones_like(v[:1]), mixer.axes, m) for v, m in zip(parents, mixer.maps, strict=True)]
        norm = sum(s * w.view(sizes) for s, w in zip(share, own, strict=True)) / sum(share)
        return torch.where(norm > 1e-6, sum(parts) / norm.clamp(min=1e-6), mix(mixer, parents))

    with patch.object(Lane, "value", watched), patch.object(Mixer, "__call__", weighted):
        yield


@contextmanager
def metric_by_gradients(images: Tensor) -> Iterator[None]:
    """Select's metric: what an error in the features does to the logits of their own model, to first order."""
    plain = Prepared.reading

    def reading(prepared: Prepared, moments):
        one, programs = plain(prepared, moments), Programs(prepared.graph_modules, prepared.spaces)
        found = {name: one(name, seen) for name, seen in moments.items()}
        generator, spaces = torch.Generator().manual_seed(0), prepared.merged_spaces()
        for space in spaces:
            if isinstance(found[space.name], Read):
                found[space.name] = replace(found[space.name], metric=torch.zeros_like(found[space.name].second))
        for i in range(len(prepared.names)):
            for batch in images.split(128):
                _add(found, programs, spaces, i, batch, generator)
        return lambda name, _: found[name]

    with patch.object(Prepared, "reading", reading):
        yield


def _add(found, programs: Programs, spaces, model: int, batch: Tensor, generator: torch.Generator) -> None:
    args = (batch.clone().requires_grad_(),)
    graph, twin = programs.lowered(model, args)
    given, values = iter(args), {}
    with torch.enable_grad():
        for n in graph.graph.nodes:
            if n.op == "placeholder" and "const" not in n.meta:
                values[n] = programs.states[model][n.meta["parameter"]] if "parameter" in n.meta else next(given)
            elif n.op == "placeholder":
                values[n] = n.meta["const"]
            elif n.op == "call_function":
                values[n] = n.target(*fx.map_arg(n.args, values.get), **fx.map_arg(n.kwargs, values.get))
    logits = values[graph.graph.output_node().all_input_nodes[0]]
    by_name = {n.name: v for n, v in values.items()}
    for _ in range(SUMS):
        total = (logits * torch.randn(logits.shape, generator=generator)).sum()
        for space in spaces:
            seen = found[space.name]
            for anchor in programs.visible(space, args) if isinstance(seen, Read) else ():
                value = by_name[twin[anchor.node]]
                grad = torch.autograd.grad(total, value, retain_graph=True, allow_unused=True)[0]
                if grad is not None and anchor.weight == 1:
                    rows = rows_of(anchor, grad).double()
                    own = slice(seen.offsets[model], seen.offsets[model + 1])
                    seen.metric[own, own] += rows.T @ rows


def tasks(bench: Bench, labels: Tensor, rest: float) -> Tensor:
    """[samples, models]: 1 - rest for the model that knows an image's class, `rest` for the other."""
    own = torch.stack([torch.isin(labels, torch.tensor(c)) for c in bench.class_lists], 1).float()
    return own * (1 - 2 * rest) + rest


@torch.no_grad()
def guessed(bench: Bench, sharpness: float) -> Tensor:
    """The same from the parents' logits: the largest of each, standardised per class and per head."""
    surest = []
    for parent in bench.parents:
        logits = torch.cat([parent(x) for x in bench.calibration.split(256)])
        top = ((logits - logits.mean(0)) / logits.std(0)).amax(1)
        surest.append((top - top.mean()) / top.std())
    return (torch.stack(surest, 1) * sharpness).softmax(1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--checkpoints", nargs=2, metavar="FILE", required=True)
    parser.add_argument("--only", default="*", metavar="GLOB", help="rows by their name")
    args = parse(parser, argv)
    data, count = load("cifar10", args.data).with_test(args.test, args.seed), args.calibration or 1024
    bench = Bench.of(*parents_of(args, data)[:2], data, count, args.seed)
    labels = data.train[1][_shuffled(len(data.train[0]), args.seed)[:count]]
    rows = [announce(r) for r in bench.parent_rows([None, None], ["parent a", "parent b"])]

    def add(name: str, method: Solve | Distill) -> None:
        if not fnmatch(name, args.only):
            return
        zipped = fxzip.merge(bench.parents, bench.calibration.split(256), method=method, calibration=count,
                             seed=bench.seed, verify=False, progress=False)  # fmt: skip
        rows.append(announce(drifted(bench, bench.row(name, zipped), zipped)))

    for name, method in (("zip", Solve(fxzip.Zip(beta=1.0))), ("permute", Solve(Permute()))):
        add(f"{name}, as it is", method)
        with targets_by_task(tasks(bench, labels, 0.1)):
            add(f"{name}, task known, the others count 0.1", method)
        with targets_by_task(guessed(bench, 2.0)):
            add(f"{name}, task guessed", method)
    add("select, metric of the readers (the default)", Solve(Suited()))
    with metric_by_gradients(bench.calibration[:IMAGES]):
        add("select, metric by gradients", Solve(Select(plain=0.1)))
    for leak in (0.0, 0.5):
        with metric_by_what_follows(leak):
            add(f"select, metric by all that follows, leak {leak}", Solve(Suited()))
    for share in (3.0, 10.0, 30.0):
        add(f"solve+distill, features count {share:g}", Distill(features=share))
    notes = machine(args, calibration=count, **{"test images": len(bench.images)})
    show("solve: targets by task, other metrics of select", rows, ["a", "b"], notes)
    save(args.out, [("tried", rows)], notes)


if __name__ == "__main__":
    main()
