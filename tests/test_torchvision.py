"""Torchvision's classifiers: the spaces found are as many as worked out by hand, proven, and merge exactly.

Networks are random, inputs as small as each net takes. The heaviest run with --slow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.models as tv
from helpers import unchanged
from merging import far
from torch import Tensor, nn
from torchvision.models.maxvit import MaxVit

import fxzip
from fxzip.infer import analyse
from fxzip.infer.show import free_parameters
from fxzip.rewrite import recompute_statistics
from fxzip.trace import trace
from fxzip.verify import verify_spaces

torch.set_num_threads(1)


def small_maxvit() -> nn.Module:
    """maxvit_t with windows of 2 x 2 instead of 7 x 7, which make inputs of 64 pixels possible."""
    return MaxVit(
        input_size=(64, 64), stem_channels=64, partition_size=2, head_dim=32, stochastic_depth_prob=0.2,
        block_channels=[64, 128, 256, 512], block_layers=[2, 2, 5, 2],
    )  # fmt: skip


@dataclass(frozen=True)
class Net:
    """spaces: with parameters and something to exchange; blocks: without parameters (heads, groups);
    instances: exchangeable sets in all spaces together, where blocks make it more than `spaces`."""

    name: str
    spaces: int
    blocks: int = 0
    instances: int = 0
    size: int = 32
    slow: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    build: Callable[..., nn.Module] | None = None

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        return (self.build or getattr(tv, self.name))(**self.options).eval()

    def images(self, n: int, seed: int = 5) -> Tensor:
        return torch.randn(n, 3, self.size, self.size, generator=torch.Generator().manual_seed(seed))

    @property
    def parameter(self):
        return pytest.param(self, id=self.name, marks=[pytest.mark.slow] if self.slow else [])


NETS = [
    Net("alexnet", 7, size=64),
    Net("vgg11", 10, slow=True),
    Net("vgg11_bn", 10, slow=True),
    Net("resnet18", 12),
    Net("resnet50", 37),
    # what the groups of a convolution read and what they make: an instance in every group of each of 16, 22, 16
    Net("resnext50_32x4d", 37, 16, 37 - 2 * 16 + 2 * 16 * 32),
    Net("wide_resnet50_2", 37, slow=True),
    Net("densenet121", 120),
    Net("googlenet", 57, options={"init_weights": False}),
    Net("inception_v3", 94, size=96, options={"init_weights": False}),
    Net("mobilenet_v2", 25),
    Net("mobilenet_v3_small", 27),
    Net("mnasnet0_5", 25),
    Net("shufflenet_v2_x1_0", 86),
    Net("squeezenet1_1", 25),
    Net("efficientnet_b0", 40),
    Net("efficientnet_v2_s", 75, slow=True),
    Net("regnet_x_400mf", 49, 22, 49 - 2 * 22 + 2 * 380),
    Net("regnet_y_400mf", 53, 16, 53 - 2 * 16 + 2 * 531),
    Net("convnext_tiny", 22),
    Net("vit_b_16", 37, 12, 1 + 12 * (1 + 12 + 12), size=64, slow=True, options={"image_size": 64}),
    Net("swin_t", 52, 0, 304, size=64),
    Net("swin_v2_t", 76, 12, 202, size=64),
    Net("maxvit_t", 117, size=64, slow=True, build=small_maxvit),
]
BY_NAME = {net.name: net for net in NETS}


@pytest.mark.parametrize("net", [net.parameter for net in NETS])
def test_spaces_are_found_and_sound(net):
    model, x = net.make(), net.images(2)
    with unchanged(model):
        traced = trace(model, x)
        spaces = analyse(traced.graph_module, (x,))
        proof = verify_spaces(traced, spaces, (x,))
    movable = [s for s in spaces if np.bincount(s.blocks).max() > 1]
    owners = [s for s in movable if s.segments]
    assert (len(owners), len(movable) - len(owners)) == (net.spaces, net.blocks), str(spaces)
    if net.instances:
        assert sum(int((np.bincount(s.blocks) > 1).sum()) for s in owners) == net.instances
    assert not spaces.frozen
    free, total = free_parameters(spaces)
    assert free > 0.99 * total
    assert proof.ok and proof.error < 1e-9, str(proof)


def trained(net: Net) -> tuple[nn.Module, list[Tensor]]:
    """A model in which every scale and bias matters, with batch-norm statistics of the calibration batches,
    which a merge recomputes from them."""
    model, batches = net.make(), list(net.images(32).split(16))
    with torch.no_grad():
        for p in model.parameters():
            if p.numel() > 1 and (p == p.flatten()[0]).all():
                p.clamp_(min=0.3 if p.flatten()[0] > 0 else 0).add_(0.1 * torch.randn_like(p))
    recompute_statistics(model, batches, lambda batch: (batch,))
    return model, batches


RECOVERED = ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x1_0", "squeezenet1_1"]
SLOWLY_RECOVERED = [
    "alexnet",
    "vgg11",
    "vgg11_bn",
    "resnet50",
    "wide_resnet50_2",
    "efficientnet_v2_s",
    "regnet_y_400mf",
    "densenet121",
    "googlenet",
    "resnext50_32x4d",
    "mobilenet_v2",
    "efficientnet_b0",
    "mnasnet0_5",
    "regnet_x_400mf",
    "inception_v3",
    "convnext_tiny",
    "swin_t",
    "swin_v2_t",
    "vit_b_16",
    "maxvit_t",
]


@pytest.mark.parametrize("name", [*RECOVERED, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOWLY_RECOVERED)])
def test_a_scrambled_copy_merges_back_to_the_model(name):
    model, batches = trained(BY_NAME[name])
    with unchanged(model):
        twin = fxzip.scramble(model, batches[0][:2])
    with torch.no_grad():
        wanted = model(batches[0])
        assert far(twin(batches[0]), wanted) < 1e-3, "scramble changed the function"
    moved = sum(not torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert moved > 0.9 * len(list(model.parameters()))  # all but head biases and unused auxiliary heads
    moments = fxzip.collect([model, twin], batches, calibration=32, progress=False)
    for method in ("permute", "zip"):
        with unchanged([model, twin]):
            zipped = fxzip.merge([model, twin], batches, method=method, calibration=32, moments=moments,
                                 verify=False, progress=False)  # fmt: skip
        with torch.no_grad():
            for output in zipped(batches[0]):
                assert far(output, wanted) < 1e-4, f"{method}\n{fxzip.report(zipped)}"
        quality = [row.quality for row in fxzip.report(zipped).spaces if row.quality is not None]
        assert min(q for q in quality if q == q) > 0.999  # NaN where nothing was measured
        if method == "permute":
            own = BY_NAME[name].make()
            own.load_state_dict(fxzip.extract(zipped, 0).state_dict(), strict=True)
            with torch.no_grad():
                assert far(own.eval()(batches[0]), wanted) < 1e-4


@pytest.mark.parametrize("name, until", [("resnet18", "layer3"), ("mobilenet_v3_small", "features.7")])
def test_partial_recovery(name, until):
    model, batches = trained(BY_NAME[name])
    twin = fxzip.scramble(model, batches[0][:2], seed=1)
    zipped = fxzip.merge([model, twin], batches, method="permute", until=until, calibration=32, verify=False,
                         progress=False)  # fmt: skip
    with torch.no_grad():
        wanted = model(batches[0])
        assert all(far(y, wanted) < 1e-4 for y in zipped(batches[0]))
    assert 0 < fxzip.report(zipped).shared < 0.5


@pytest.mark.parametrize("method", ["average", "permute", "zip"])
def test_a_model_merged_with_itself_is_the_model(method):
    model, batches = trained(BY_NAME["mobilenet_v3_small"])
    zipped = fxzip.merge([model, model], batches, method=method, calibration=32, verify=False, progress=False)
    with torch.no_grad():
        wanted = model(batches[0])
        assert all(far(y, wanted) < 1e-4 for y in zipped(batches[0]))
