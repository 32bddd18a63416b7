"""Which values behind a layer its fit may aim at: those that are affine in each of its outputs, and no others."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

import fxzip


class Net(nn.Module):
    """Tokens [n, 7, 5] -> [n, 3], with one layer whose output meets something in `between`."""

    def __init__(self):
        super().__init__()
        self.first, self.layer, self.other, self.head = (nn.Linear(*s) for s in ((5, 7), (7, 7), (7, 7), (7, 3)))
        self.norm, self.token = nn.BatchNorm1d(7), nn.Parameter(torch.rand(7, 1) + 0.5)
        self.one = nn.Parameter(torch.tensor([0.5]))
        for p in self.norm.parameters():
            nn.init.uniform_(p, 0.5, 2)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.head(torch.relu(self.between(x)).mean(1))

    def between(self, x):
        raise NotImplementedError


class NormOfAnOutput(Net):
    def forward(self, x):
        y = self.layer(torch.relu(self.first(x)))
        return y, self.head(torch.relu(self.norm(y.transpose(1, 2))).mean(2))


class ScaleOfAMovedOutput(Net):
    def forward(self, x):
        y = self.layer(torch.relu(self.first(x))).transpose(1, 2)
        return self.head(torch.relu(self.token * y).mean(2)), y


class SpreadOverTokens(Net):
    def between(self, x):
        return x + self.layer(x.mean(1, keepdim=True))


class SpreadBehindAMove(Net):
    def between(self, x):
        return x + self.layer(x.mean(1)).unsqueeze(1)


class ScaledByToken(Net):  # as many tokens as features
    def between(self, x):
        return self.layer(x) * self.token


class NormedByToken(Net):
    def between(self, x):
        return self.norm(self.layer(x))


class ScaledByANumber(Net):
    def between(self, x):
        return x + self.one * self.layer(x)


class TimesZero(Net):
    def between(self, x):
        return self.other(x) + 0.0 * self.layer(x)


class AddedZeroTimes(Net):
    def between(self, x):
        return torch.sub(self.layer(x), self.other(x), alpha=0)


class NormedByConstants(Net):
    """Statistics that are no part of the checkpoint."""

    def __init__(self):
        super().__init__()
        for name, value in (("mean", torch.linspace(-1, 1, 7)), ("variance", torch.linspace(0.5, 3, 7))):
            self.register_buffer(name, value, persistent=False)

    def between(self, x):
        return self.normed(self.layer(x).transpose(1, 2), self.mean, self.variance).transpose(1, 2)

    def normed(self, x, mean, variance):
        return F.batch_norm(x, mean, variance, self.norm.weight, self.norm.bias)


class NormedByConstantsLater(NormedByConstants):
    def between(self, x):
        return self.normed(torch.relu(self.layer(x)).transpose(1, 2), self.mean, self.variance).transpose(1, 2)


class NormedByComputed(NormedByConstants):
    def __init__(self):
        super().__init__()
        self.log = nn.Parameter(torch.randn(7), requires_grad=False)

    def between(self, x):
        return self.normed(self.layer(x).transpose(1, 2), self.norm.running_mean, self.log.exp()).transpose(1, 2)


class Rounded(Net):
    def between(self, x):
        return torch.div(self.layer(x), 0.5, rounding_mode="floor")


@torch.no_grad()
@pytest.mark.parametrize("kind", [*Net.__subclasses__(), *NormedByConstants.__subclasses__()])
def test_a_copy_is_fitted_to_the_model_itself(kind):
    torch.manual_seed(0)
    x = torch.randn(300, 7, 5)
    net = kind().train()
    net(x)
    net.eval()
    zipped = fxzip.merge([net, copy.deepcopy(net)], [x], method="solve", progress=False, verify=False)
    for made in zipped(x):
        for output, wanted in zip(tree_leaves(made), tree_leaves(net(x)), strict=True):
            assert float((output - wanted).abs().max()) < 1e-3 * float(wanted.abs().max())


class Scaled(Net):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(7) + 0.5)

    def between(self, x):
        return self.scale * self.layer(x)


class HeadFirst(Net):
    """A head before a layer: in the merged graph, which has a head per model, later nodes have other names."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(7, 3)

    def forward(self, x):
        x = torch.relu(self.first(x)).mean(1)
        return self.head(x), self.last(torch.relu(self.layer(x) + self.other(x)))


@torch.no_grad()
@pytest.mark.parametrize("kind", [Scaled, HeadFirst])
def test_wider_networks_have_nodes_of_their_own(kind):
    torch.manual_seed(0)
    x = torch.randn(300, 7, 5)
    net = kind().eval()
    zipped = fxzip.merge([net, copy.deepcopy(net)], [x], budget=2.0, progress=False, verify=False)
    for made in zipped(x):
        for output, wanted in zip(tree_leaves(made), tree_leaves(net(x)), strict=True):
            assert float((output - wanted).abs().max()) < 1e-3 * float(wanted.abs().max())


class Masked(Net):
    def forward(self, x, mask):
        return self.head(torch.relu(self.layer(torch.relu(self.first(x)) * mask[..., None])).mean(1))


def test_arguments_without_a_row_for_each_sample_stay_whole():
    """Of two batches, and of a chunk that holds parts of both."""
    torch.manual_seed(0)
    nets, x, mask = [Masked().eval() for _ in range(2)], torch.randn(160, 7, 5), torch.rand(1, 7)
    quick: dict = {"method": "solve", "progress": False, "verify": False}
    found = [fxzip.merge(nets, loader, **quick) for loader in (
        [(x[:80], mask), (x[80:], mask)], [(x, mask.expand(160, 7).contiguous())],
    )]  # fmt: skip
    for a, b in zip(*(zipped(x, mask.expand(160, 7)) for zipped in found), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    with pytest.raises(fxzip.InputError, match=r"float32\[1, 7\], an argument without a row for each sample, differs"):
        fxzip.merge(nets, [(x[:80], mask), (x[80:], mask + 1)], **quick)


class FlattenedHeads(nn.Module):
    """Two heads of four features that share an axis with the batch, as in a bmm of one's own."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        x = torch.tanh(self.first(x))
        n, t, _ = x.shape
        q, k, v = (f(x).transpose(0, 1).reshape(t, n * 2, 4).transpose(0, 1) for f in (self.q, self.k, self.v))
        y = torch.bmm(torch.bmm(q, k.mT).softmax(-1), v).transpose(0, 1).reshape(t, n, 8).transpose(0, 1)
        return self.head(torch.tanh(self.out(y)).mean(1))


@torch.no_grad()
def test_targets_are_taken_before_the_batch_is_in_an_axis_of_features():
    torch.manual_seed(0)
    x = torch.randn(64, 6, 5)
    net, other = FlattenedHeads().eval(), FlattenedHeads().eval()
    zipped = fxzip.merge([net, fxzip.scramble(net, x[:2])], [x], progress=False, verify=False)
    assert all((y - net(x)).abs().max() < 1e-3 * net(x).abs().max() for y in zipped(x))
    rows = {r.node: r for r in fxzip.report(fxzip.merge([net, other], [x], progress=False, verify=False)).layers}
    assert all(rows[name].after < 0.9 * rows[name].before for name in "qkv")
