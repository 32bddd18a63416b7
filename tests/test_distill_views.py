"""Views: what outputs of solve+distill are the mean over."""

import random

import numpy as np
import pytest
import torch
from test_distill import HELD_OUT, merge, said
from test_solve import Residual, loss, pair
from torch import nn
from torchvision.transforms import RandomHorizontalFlip

import fxzip
from fxzip import Distill, InputError

pytestmark = pytest.mark.filterwarnings("ignore::fxzip.MergeWarning")


@pytest.fixture
def images():
    return torch.randn(1024, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def mirrored(x):
    return x.flip(-1)


def over_views(net):
    return lambda x: (net(x) + net(mirrored(x))) / 2


def test_they_pull_outputs_towards_the_mean_of_what_models_give_for_them(images):
    nets = pair(Residual, images)
    means = [over_views(n) for n in nets]
    plain, viewed = merge(nets, images), merge(nets, images, Distill(views=[mirrored]))
    assert loss(viewed, means, HELD_OUT) < 0.9 * loss(plain, means, HELD_OUT)
    assert "(outputs: from the mean over an input and 1 of its views) on held-out calibration" in said(viewed)
    again = merge(nets, images, Distill(views=[mirrored]))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in viewed.state_dict().items())


def test_steps_see_the_views_as_well(images):
    """What only the mirror images of the calibration images show."""
    images[..., 4:] = 0
    nets = pair(Residual, torch.cat([images, mirrored(images)]))
    means, other = [over_views(n) for n in nets], mirrored(HELD_OUT * (torch.arange(8) < 4))
    plain, viewed = merge(nets, images), merge(nets, images, Distill(views=[mirrored]))
    assert loss(viewed, means, other) < 0.6 * loss(plain, means, other)  # 0.47; 0.73 if no step sees a view


class Two(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.body, self.scale, self.head = Residual(16), nn.Linear(4, 16), nn.Linear(16, classes)

    def forward(self, x, by):
        return torch.log_softmax(self.head(torch.relu(self.body(x) * self.scale(by))), 1)


def test_they_get_what_the_models_get_and_outputs_may_be_made_of_logits(images):
    torch.manual_seed(0)
    nets, by = [Two(3).eval(), Two(5).eval()], torch.randn(1024, 4)
    batches = [(images, by)]
    views = [lambda x, by: (mirrored(x), by)]
    plain, viewed = (
        fxzip.merge(nets, batches, method=m, progress=False, verify=False) for m in ("solve", Distill(views=views))
    )
    held = torch.randn(256, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = [(n(HELD_OUT, held) + n(mirrored(HELD_OUT), held)) / 2 for n in nets]
        off = [sum(float((a - b).square().mean()) for a, b in zip(z(HELD_OUT, held), wanted, strict=True))
               for z in (plain, viewed)]  # fmt: skip
    assert off[1] < 0.9 * off[0]


def test_what_cannot_be_taken_is_listed_before_anything_is_measured(images, monkeypatch):
    def broken(x):
        raise ValueError("no such view")

    monkeypatch.setattr("fxzip.passes.stages.measure", lambda *a, **k: pytest.fail("measured"))
    views = [mirrored, lambda x: x[..., 1:], lambda x: x.mul_(-1), broken, lambda x: x - x.mean(0)]
    nets = pair(Residual, images)
    with pytest.raises(InputError) as caught:
        merge(nets, images, Distill(views=views))
    assert str(caught.value).splitlines()[1:] == [
        "  1. views[1] makes float32[4, 3, 8, 7] of float32[4, 3, 8, 8]: it must leave shapes as they are",
        "  2. views[2] writes to its inputs: it must return new tensors",
        "  3. views[3] fails on samples of the first batch: ValueError: no such view",
        "  4. views[4] shows a sample otherwise when others are beside it: it must take each by itself",
    ]
    with pytest.raises(InputError, match=r"views\[0\] makes"):
        fxzip.plan(nets, [images], method=Distill(views=views[1:2]))


@pytest.mark.parametrize(
    "view",
    [
        RandomHorizontalFlip(),
        lambda x: x.flip(-1) if random.random() < 0.5 else x,
        lambda x: x.flip(-1) if np.random.rand() < 0.5 else x,
        lambda x: x + torch.randn_like(x),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_what_draws_at_random_is_refused_whatever_it_draws(view, seed, images):
    nets = pair(Residual, images)
    torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
    states = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    with pytest.raises(InputError, match=r"views\[0\] draws at random: it must be the same every time"):
        merge(nets, images, Distill(views=[view]))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), repr(np.random.get_state()))


def test_they_do_not_go_by_since(images):
    nets, method = pair(Residual, images), Distill(views=[mirrored])
    why = r"Distill\(views=\) does not go by since=: what is shared reads stems"
    with pytest.raises(InputError, match=why):
        merge(nets, images, method, since="a1")
    graph = fxzip.passes.start(nets, [images], since="a1", progress=False)
    stages = [fxzip.passes.Infer(), fxzip.passes.Cut(), fxzip.passes.Read(), fxzip.passes.Cap(solve=method)]
    with pytest.raises(InputError, match=why):
        for stage in stages:
            graph = stage(graph).graph_module
    with pytest.raises(InputError, match="views must be a list of functions, got <function"):
        Distill(views=mirrored)
