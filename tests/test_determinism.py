"""Numbers: the same bytes from the same seed, nearly the same from other threads, and finite ones from hard data."""

from __future__ import annotations

import pytest
import torch
from killing import digest
from torch import Tensor, nn
from toys import randomise

import fxzip
from fxzip import METHODS

torch.set_num_threads(1)
pytestmark = [pytest.mark.filterwarnings("ignore::fxzip.MergeWarning"), pytest.mark.filterwarnings("ignore:a Gram")]
X = torch.randn(96, 3, 6, 6, generator=torch.Generator().manual_seed(0))
NORMLESS = ("average", "permute", "zip", "solve", "select", "cca")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.fc = nn.Conv2d(8, 12, 3, padding=1), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv1(x)))
        return self.fc(torch.relu(self.conv2(x)).mean((2, 3)))


def small(seed: int) -> Small:
    model = Small()
    randomise(model, seed).eval()
    return model


def merged(models, data, method, **options):
    return fxzip.merge(models, [data], method=method, progress=False, **{"verify": False, **options})


def outputs(module, data):
    with torch.no_grad():
        return module(data)


def finite(module: nn.Module) -> bool:
    return all(bool(t.isfinite().all()) for t in module.state_dict().values() if t.is_floating_point())


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_bytes(method):
    torch.manual_seed(1)
    first = merged([small(0), small(1)], X, method, seed=3)
    torch.manual_seed(2)
    torch.rand(5)
    second = merged([small(0), small(1)], X, method, seed=3)
    assert digest(first) == digest(second) and first.code == second.code


def by_threads(dtype: torch.dtype, method: str) -> list[nn.Module]:
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(merged([small(0).to(dtype), small(1).to(dtype)], X.to(dtype), method))
    finally:
        torch.set_num_threads(before)
    return found


@pytest.mark.parametrize("dtype, method, near", [
    (torch.float32, "zip", 1e-6), (torch.float64, "zip", 1e-12), (torch.float64, "solve", 1e-9),
], ids=str)  # fmt: skip
def test_other_thread_counts_differ_by_rounding(dtype, method, near):
    one, two = (net.state_dict() for net in by_threads(dtype, method))
    for name, a in one.items():
        if a.is_floating_point():
            assert float((a - two[name]).abs().max()) <= near * max(float(a.abs().max()), 1.0), name


def test_fits_in_single_precision_give_nearly_the_same_outputs_by_other_threads():
    """Their weights differ by more: some processors' kernels round by the number of threads, in a first layer by 1e-7,
    and the head's twelve features, fitted on 96 samples, are nearly dependent."""
    one, two = by_threads(torch.float32, "solve")
    for a, b in zip(outputs(one, X), outputs(two, X), strict=True):
        assert float((a - b).abs().max()) <= 1e-3 * float(a.abs().max())


@pytest.mark.parametrize("dtype, near", [(torch.float16, 2e-2), (torch.bfloat16, 1.5e-1), (torch.float64, 1e-9)])
@pytest.mark.parametrize("method", ["permute", "zip", "solve"])
def test_other_precisions(method, dtype, near):
    """The dtype is kept, and a scrambled copy merges back as well as the numbers allow."""
    model = small(0).to(dtype)
    other = fxzip.scramble(small(0), X[:2]).to(dtype)
    zipped = merged([model, other], X.to(dtype), method)
    assert {t.dtype for t in zipped.parameters()} == {dtype} and finite(zipped)
    wanted = outputs(model, X.to(dtype)).double()
    for y in outputs(zipped, X.to(dtype)):
        assert float((y.double() - wanted).abs().max() / wanted.abs().max()) < near


@pytest.mark.parametrize("method", METHODS)
def test_one_image(method):
    assert finite(merged([small(0), small(1)], X[:1], method))


@pytest.mark.parametrize("method", METHODS)
def test_data_of_one_direction(method):
    """All Grams have rank one."""
    data = X[:1] * torch.linspace(0, 1, 64)[:, None, None, None]
    assert finite(merged([small(0), small(1)], data, method))


@pytest.mark.parametrize("method", METHODS)
def test_constant_data(method):
    assert finite(merged([small(0), small(1)], torch.ones(32, 3, 6, 6), method))


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-20])
@pytest.mark.parametrize("method", NORMLESS)
def test_denormals(method, scale):
    """Activations whose squares vanish: nothing becomes NaN, and equal models stay what they are."""
    model = small(0)
    with torch.no_grad():
        for p in model.conv2.parameters():
            p.mul_(scale)
    assert finite(merged([model, small(1)], X, method))
    twin = merged([model, model], X, method)
    wanted = outputs(model, X)
    assert all(float((y - wanted).abs().max()) < 1e-3 * float(wanted.abs().max()) for y in outputs(twin, X))


@pytest.mark.parametrize("method", METHODS)
def test_dead_and_constant_features(method):
    """Three units that never fire and two that are constant, in other places in the other model."""
    model = small(0)
    with torch.no_grad():
        model.conv2.weight[:5] = 0
        model.conv2.bias[:5] = torch.tensor([-1.0, -2.0, -0.5, 1.0, 2.0])
        model.norm.weight[6] = 0
    other = fxzip.scramble(model, X[:2])
    zipped = merged([model, other], X, method)
    assert finite(zipped)
    if method in ("permute", "zip", "solve"):
        wanted = outputs(model, X)
        assert all(float((y - wanted).abs().max() / wanted.abs().max()) < 1e-4 for y in outputs(zipped, X))


def test_random_states_of_devices_that_do_not_take_part_stay():
    """`torch.manual_seed` would set every GPU's, or have CUDA start with our seed and not with the user's."""

    def gpus():
        waiting = list(torch.cuda._lazy_seed_tracker.get_calls())
        return waiting, [s.tolist() for s in torch.cuda.get_rng_state_all()] if torch.cuda.is_initialized() else []

    before = gpus()
    fxzip.verify(small(0), X[:2], seed=7)
    assert gpus() == before
