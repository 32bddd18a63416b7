"""What solve holds, counted tensor by tensor, against what the plan says beforehand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fxzip
from fxzip import passes

torch.set_num_threads(1)


class Held(TorchDispatchMode):
    """Bytes of the storages that operators made beneath it and that live on: `most` at any one time. What an operator
    needs inside itself is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **kwargs or {})
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in (x for x in tree_leaves(found) if isinstance(x, Tensor)):
            storage = x.untyped_storage()
            if storage._cdata not in given:
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.made = {k: v for k, v in self.made.items() if not v[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.made.values()))
        return found


def wide() -> nn.Module:
    """Fits take most: 600 columns, few samples."""
    return nn.Sequential(nn.Linear(20, 600), nn.ReLU(), nn.Linear(600, 600), nn.ReLU(), nn.Linear(600, 3))


def tall() -> nn.Module:
    """Activations take most: few channels, many pixels."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


@pytest.mark.parametrize("make, data", [(wide, (128, 20)), (tall, (64, 3, 48, 48))], ids=["fits", "activations"])
def test_solve_holds_what_the_plan_says(make, data):
    models = [make().eval() for _ in range(2)]
    batches = list(torch.randn(*data, generator=torch.Generator().manual_seed(0)).split(16))
    plan = fxzip.plan(models, batches, method="solve")
    assert (said := plan.solving) is not None
    graph = passes.start(models, batches, progress=False)
    for stage in (passes.Infer(), passes.Cut(), passes.Read(), passes.Measure(), passes.Match("zip"), passes.Average()):
        graph = stage(graph).graph_module
    with Held() as held:
        passes.Solve()(graph)
    promised = said.activations + said.work
    assert promised / 2 < held.most <= promised + plan.result  # fitted weights are part of the result
