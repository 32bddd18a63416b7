"""What limits solve on the CIFAR-10 pair: the same blocks, trained by gradients on the same unlabelled images.

    python benchmarks/limits.py --data ../shared/data --checkpoints a.pt b.pt --calibration 2048

Every residual block of the merged network in turn is trained by Adam towards what solve aims it at, the features of
both parents that the matching keeps, on the inputs it gets from the trained blocks before it; then the heads are
fitted. Adam is slow at this: natural-gradient steps (method="solve+distill") come much nearer. *Drift* as in tried.py,
on all images and on those of the own task. A record of what was found, not a way to use the library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from cifar_pair import parents_of
from common import Bench, Row, announce, machine, options, parse, save, show
from data import load
from nets import ResNet20
from torch import Tensor, nn
from tqdm import tqdm

from fxzip import Solve, passes

BATCH, RATE = 64, 1e-3


class Shared(nn.Module):
    """A ResNet-20 with two heads, as a module: what the merged graph computes."""

    def __init__(self, state: dict[str, Tensor], width: int):
        super().__init__()
        self.trunk = ResNet20(5, width=width)
        mine = self.trunk.state_dict()
        self.trunk.load_state_dict({k: state.get(k, v) for k, v in mine.items()})
        self.heads = nn.ModuleList(nn.Linear(64 * width, 5) for _ in range(2))
        for i, head in enumerate(self.heads):
            head.load_state_dict({k: state[f"linear_task{i}.{k}"] for k in ("weight", "bias")})

    def forward(self, x: Tensor) -> list[Tensor]:
        z = streams(self.trunk, x)[-1].mean((2, 3))
        return [head(z) for head in self.heads]


def blocks_of(net: ResNet20) -> list[nn.Module]:
    return [*net.layer1, *net.layer2, *net.layer3]


def streams(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Behind the stem and behind every block."""
    assert isinstance(net, ResNet20)
    found = [F.relu(net.bn1(net.conv1(x)))]
    for block in blocks_of(net):
        found.append(block(found[-1]))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--checkpoints", nargs=2, metavar="FILE", required=True)
    parser.add_argument("--sweeps", type=int, default=5, help="over the calibration images, by Adam (5)")
    args = parse(parser, argv)
    data, count = load("cifar10", args.data).with_test(args.test, args.seed), args.calibration or 1024
    bench = Bench.of(*parents_of(args, data)[:2], data, count, args.seed)
    merged, merges = solved(bench)
    net = Shared(merged.state_dict(), len(merged.state_dict()["bn1.weight"]) // 16).eval()
    rows = [announce(r) for r in bench.parent_rows([None, None], ["parent a", "parent b"])]
    rows.append(announce(drifted(bench, "solve", net)))
    train_blocks(bench, net, merges, args.sweeps)
    rows.append(announce(drifted(bench, "blocks trained towards the same targets", net)))
    notes = machine(args, calibration=count, sweeps=args.sweeps, **{"test images": len(bench.images)})
    show("what limits solve", rows, ["a", "b"], notes)
    save(args.out, [("limits", rows)], notes)


def solved(bench: Bench) -> tuple[nn.Module, list[Tensor]]:
    """The merged network, and M of every stream: behind the stem and behind each block."""
    method = Solve()
    graph = passes.start(bench.parents, list(bench.calibration.split(256)), progress=False)
    plan = [passes.Infer(), passes.Cut(), passes.Read(), passes.Measure(), passes.Match(method.matcher_for(2))]
    for stage in (*plan, passes.Average(), passes.Solve(method), passes.Build(), passes.Calibrate()):
        graph = stage(graph).graph_module
    job, merges = passes.job(graph), []
    state = dict(graph.named_parameters())
    for stage, times in (("layer1", 4), ("layer2", 3), ("layer3", 3)):
        last = f"{stage}.2.conv2.weight"  # its outputs are the stage's stream
        names = {s.name for s in job.prepared.spaces for g in s.segments if (g.parameter, g.axis) == (last, 0)}
        assert len(names) == 1 and last in state, names
        merges += [job.matchings[names.pop()].merge.float()] * times
    return graph, merges


def train_blocks(bench: Bench, net: Shared, merges: Sequence[Tensor], sweeps: int) -> None:
    generator, images = torch.Generator().manual_seed(bench.seed), bench.calibration.split(256)
    with torch.no_grad():
        now = torch.cat([F.relu(net.trunk.bn1(net.trunk.conv1(x))) for x in images])
    for k, block in enumerate(tqdm(blocks_of(net.trunk), desc="blocks", leave=False, disable=None), 1):
        with torch.no_grad():
            wanted = torch.cat([_mixed(bench, merges[k], k, x) for x in images])

        def loss(index: Tensor, block=block, now=now, wanted=wanted) -> Tensor:
            return F.mse_loss(block(now[index]), wanted[index])

        _train(list(block.parameters()), loss, len(now), sweeps, generator)
        with torch.no_grad():
            now = torch.cat([block(x) for x in now.split(256)])
    z = now.mean((2, 3)).double()
    z = torch.cat([z, torch.ones(len(z), 1)], 1)
    state = net.state_dict()
    for i, parent in enumerate(bench.parents):
        with torch.no_grad():
            logits = torch.cat([parent(x) for x in images]).double()
            weight = torch.linalg.solve(z.T @ z + 1e-3 * (z**2).sum(0).diag(), z.T @ logits).float()
            state[f"heads.{i}.weight"].copy_(weight[:-1].T)
            state[f"heads.{i}.bias"].copy_(weight[-1])


def _train(parameters: list[nn.Parameter], loss, count: int, sweeps: int, generator: torch.Generator) -> None:
    for p in parameters:
        p.requires_grad_(True)
    steps = sweeps * count // BATCH
    optimiser = torch.optim.Adam(parameters, RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    with torch.enable_grad():
        for _ in range(steps):
            optimiser.zero_grad()
            loss(torch.randint(count, (BATCH,), generator=generator)).backward()
            optimiser.step()
            schedule.step()
    for p in parameters:
        p.requires_grad_(False)


def _mixed(bench: Bench, merge: Tensor, k: int, images: Tensor) -> Tensor:
    """What the merged stream k is to be: M times both parents' features."""
    features = torch.cat([streams(p, images)[k] for p in bench.parents], 1)
    return torch.einsum("mk,nkhw->nmhw", merge, features)


@torch.no_grad()
def drifted(bench: Bench, name: str, net: nn.Module) -> Row:
    """With a note of how far the logits are from the parents'."""
    of_all, of_own = [], []
    made = [torch.cat(x) for x in zip(*(net(x) for x in bench.images.split(250)), strict=True)]
    for own, parent, logits in zip(bench.class_lists, bench.parents, made, strict=True):
        want = torch.cat([parent(x) for x in bench.images.split(250)])
        inside = torch.isin(bench.labels, torch.tensor(own))
        for found, part in ((of_all, slice(None)), (of_own, inside)):
            a, b = logits[part], want[part]
            found.append(float((a - b).square().sum() / (b - b.mean(0)).square().sum()))
    return replace(bench.row(name, net), note=f"drift {sum(of_all) / 2:.4f}, own {sum(of_own) / 2:.4f}")


if __name__ == "__main__":
    main()
