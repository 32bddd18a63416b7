"""heads="joint": logits of several heads that one arg max may go over, and nothing else about them changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ranks import in_ranks
from torch import nn

import fxzip
from fxzip import InputError
from fxzip.comparable import compare_heads
from fxzip.rewrite import Comparable

torch.set_num_threads(1)
X = torch.randn(90, 16, generator=torch.Generator().manual_seed(3))


def mlp(seed: int, classes: int, size: float = 1.0) -> nn.Module:
    """size: of its logits."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, classes)).eval()
    with torch.no_grad():
        net[2].weight.mul_(size)
        net[2].bias.add_(3 * size)
    return net


def merge(models, heads="joint", method="permute", loader=X, **options):
    loader = loader.split(25) if isinstance(loader, torch.Tensor) else loader
    return fxzip.merge(models, loader, heads=heads, method=method, progress=False, **options)


def models():
    return {"cats": mlp(0, 4), "dogs": mlp(1, 3, size=5.0)}


def confidence(logits: np.ndarray, calibration: np.ndarray) -> np.ndarray:
    """As the docstring of Comparable says it."""
    mean, deviation = calibration.mean(0), calibration.std(0)
    seen = ((calibration - mean) / deviation).max(1)
    return (((logits - mean) / deviation).max(1) - seen.mean()) / seen.std()


@pytest.mark.parametrize("method", ["permute", "solve"])
def test_the_surest_head_wins_and_no_head_changes(method):
    apart, joint = merge(models(), "separate", method), merge(models(), "joint", method)
    fresh = torch.randn(40, 16, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        own, found, seen = apart(fresh), joint(fresh).split([4, 3], 1), apart(X)
    for task, part in zip(own, found, strict=True):
        wanted = confidence(own[task].double().numpy(), seen[task].double().numpy())
        np.testing.assert_allclose(part.amax(1).numpy(), wanted, rtol=2e-4, atol=2e-5)
        torch.testing.assert_close(part.softmax(1), own[task].softmax(1))
        assert torch.equal(part.argmax(1), own[task].argmax(1))
    plain = torch.cat([*own.values()], 1).argmax(1)
    assert (plain >= 4).float().mean() > 0.95, "the second head's logits are larger, whatever the sample"
    assert 0.2 < (joint(fresh).argmax(1) >= 4).float().mean() < 0.8


def test_pixels_have_answers_of_their_own():
    def net(seed, classes):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, classes, 1)).eval()

    x = torch.randn(12, 3, 5, 5)
    nets = [net(0, 2), net(1, 4)]
    apart, joint = merge(nets, "separate", loader=x), merge(nets, loader=x)
    with torch.no_grad():
        found, every = joint(x).split([2, 4], 1), apart(x)
    assert found[1].shape == (12, 4, 5, 5)
    for part, own in zip(found, every, strict=True):
        columns = own.double().transpose(0, 1).flatten(1).T.numpy()  # [pixels, classes]
        seen = part.amax(1).flatten().numpy()
        np.testing.assert_allclose(seen, confidence(columns, columns), rtol=2e-3, atol=1e-4)
        assert abs(float(part.amax(1).mean())) < 1e-4 and abs(float(part.amax(1).std(correction=0)) - 1) < 1e-3


def test_save_load_extract_export(tmp_path):
    joint, apart = merge(models()), merge(models(), "separate")
    fxzip.save(joint, tmp_path / "out")
    again = fxzip.load(tmp_path / "out", lambda task: models()[task])
    assert torch.equal(again(X), joint(X)) and "made comparable" in (tmp_path / "out" / "README.md").read_text()
    for task in models():
        assert torch.equal(fxzip.extract(again, task)(X), apart(X)[task])
        models()[task].load_state_dict(fxzip.extract(joint, task).state_dict())
    program = torch.export.export(joint, (X[:4],), strict=True)
    torch.testing.assert_close(program.module()(X[:4]), joint(X[:4]))
    compiled = torch.compile(joint, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), joint(X))


def test_wider_layers_and_names_that_are_taken():
    """A budget, and models that have a module called as what compares them would be."""

    class Net(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.body, self.joint = nn.Sequential(nn.Linear(16, 24), nn.ReLU()), nn.Linear(24, 3)

        def forward(self, x):
            return self.joint(self.body(x))

    zipped = merge({"a": Net(0).eval(), "b": Net(1).eval()}, method="solve", budget=1.5)
    assert zipped(X).shape == (90, 6)
    assert [n for n, m in zipped.named_modules() if isinstance(m, Comparable)] == ["joint_a_", "joint_b_"]


def test_a_logit_that_never_changes_counts_like_its_mean():
    nets = models()
    with torch.no_grad():
        nets["cats"][2].weight[0] = 0
    zipped = merge(nets)
    assert zipped.get_submodule("joint_cats").deviation[0] == 1 and bool(zipped(X).isfinite().all())


def test_two_ranks_find_what_one_finds():
    batches = [(x,) for x in X.split(25)]
    wanted = {k: v for k, v in merge(models()).state_dict().items() if k.startswith("joint")}

    def work(processes):
        zipped = merge(models())
        for head in (m for m in zipped.modules() if isinstance(m, Comparable)):
            head.load_state_dict({name: torch.full_like(b, 7) for name, b in head.named_buffers()})
        compare_heads(zipped, batches, processes)
        return zipped.state_dict()

    for found in in_ranks(work):
        torch.testing.assert_close({k: found[k] for k in wanted}, wanted)


def test_refused():
    with pytest.raises(InputError, match="loader is missing"):
        fxzip.merge([mlp(0, 4), mlp(1, 3)], example_inputs=X[:2], method="rebasin", heads="joint", progress=False)
    with pytest.raises(InputError, match='heads="joint" compares heads by samples, and there are none'):
        compare_heads(merge(models()), [])
    said = r'heads="joint" compares logits, one tensor of real numbers per model, got task0: float32, float32, task1: '
    with pytest.raises(InputError, match=said):
        merge([nn.Sequential(mlp(k, 4), Both()) for k in (0, 1)])
    with pytest.raises(InputError, match='heads="joint" needs outputs that differ along axis 1 alone'):
        merge([nn.Sequential(mlp(k, 4), nn.Flatten(0)) for k in (0, 1)])
    nets = [nn.Sequential(mlp(k, 4), Log()) for k in (0, 1)]
    with pytest.raises(InputError, match=r'heads="joint": not all logits of task0 are finite on the calibration data'):
        merge(nets, verify=False)


class Both(nn.Module):
    def forward(self, x):
        return x, x + 1


class Log(nn.Module):
    """-inf for whatever is not positive."""

    def forward(self, x):
        return torch.log(torch.relu(x - 3))
