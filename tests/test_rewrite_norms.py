"""Batch-norm statistics after a merge are those of the data."""

import copy
from typing import Any

import pytest
import torch
from rewrite_nets import X, close, permuted_pair, zipped_of
from torch import nn

from fxzip.errors import InputError
from fxzip.rewrite import recompute_statistics

torch.set_num_threads(1)
pair = pytest.fixture(scope="module")(permuted_pair)


def test_statistics_are_those_of_the_data(pair):
    model, twin, spaces, matchings = pair
    zipped, _ = zipped_of((model, twin), spaces, matchings, X, "block2")
    zipped.get_submodule("bn").train()
    batches = [torch.randn(4, 2, 7, 7, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    state, modes = torch.get_rng_state(), [m.training for m in zipped.modules()]
    assert recompute_statistics(zipped, batches, lambda b: (b,)) == 7  # 3 shared, 2 of each model
    assert torch.equal(state, torch.get_rng_state()) and modes == [m.training for m in zipped.modules()]
    bn: Any = zipped.get_submodule("bn")
    hidden = zipped.get_submodule("conv")(torch.cat(batches))
    close(bn.running_mean, hidden.mean([0, 2, 3]))
    close(bn.running_var, hidden.var([0, 2, 3]), 0.03)  # a mean over three batches, which are shuffled
    assert bn.momentum == 0.1 and bn.num_batches_tracked == 3
    for name in ("block2.bn1_a", "block2.bn1_b"):
        assert zipped.get_submodule(name).num_batches_tracked == 3


def test_batches_count_by_their_size_and_one_sample_is_no_error():
    """A last batch of one sample, without a variance, came to a ValueError after all the work."""
    net = nn.Sequential(nn.BatchNorm1d(3))
    x = torch.randn(66, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 3.0, 10.0]) + 5
    recompute_statistics(net, [x[:40], x[40:60], x[60:65], x[65:]], lambda b: (b,))
    bn: Any = net[0]
    close(bn.running_mean, x.mean(0))
    torch.testing.assert_close(bn.running_var, x.var(0), rtol=0.03, atol=0)
    recompute_statistics(net, list(x.split(1)), lambda b: (b,))
    close(bn.running_mean, x.mean(0))
    torch.testing.assert_close(bn.running_var, x.var(0), rtol=0.3, atol=0)
    parts = [x[:40, :, None], x[40:, :, None].expand(-1, -1, 2)]  # of two forms: by size
    recompute_statistics(net, parts, lambda b: (b,))
    close(bn.running_mean, x.mean(0))
    close(bn.running_var, (40 * parts[0].var((0, 2)) + 26 * parts[1].var((0, 2))) / 66)
    twice = nn.Sequential(bn, nn.Linear(3, 3), bn)  # a norm that runs twice: every run counts
    recompute_statistics(twice, [x], lambda b: (b,))
    second = twice[1]((x - x.mean(0)) / (x.var(0, correction=0) + bn.eps).sqrt() * bn.weight + bn.bias)
    close(bn.running_mean, torch.cat([x, second]).mean(0).detach())


def test_statistics_hold_what_lies_between_tasks():
    """Batches of one task each, as a dict of loaders gives them, were each normed by their own task."""
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4)).eval()
    tasks = [torch.randn(4, generator=g) * 2 + torch.randn(64, 4, generator=g) for _ in range(3)]
    recompute_statistics(net, tasks, lambda b: (b,))
    normed = net(torch.cat(tasks))
    close(normed.mean(0), torch.zeros(4), 0.03)
    close(normed.var(0), torch.ones(4), 0.1)


def test_statistics_without_batches_or_norms_are_left_alone(pair):
    model = copy.deepcopy(pair[0])
    kept = model.bn.running_mean.clone()
    with pytest.raises(InputError, match="gave no batch"):
        recompute_statistics(model, [], lambda b: (b,))
    assert torch.equal(model.bn.running_mean, kept)
    assert (
        recompute_statistics(nn.Linear(2, 2), [torch.zeros(1)], lambda b: pytest.fail("nothing to run")) == 0
    )
    with pytest.raises(RuntimeError):
        recompute_statistics(model, [torch.zeros(1, 5)], lambda b: (b,))
    assert not model.bn.training and model.bn.momentum == 0.1
