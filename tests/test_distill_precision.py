"""Distill(precision=): steps in bfloat16, weights in the models' own precision."""

import pytest
import torch
from test_distill import HELD_OUT, merge, said
from test_solve import Residual, group_norm, loss, pair
from torch import nn

from fxzip import Distill, InputError
from fxzip.distill import descent
from fxzip.distill.descent import Descent

pytestmark = pytest.mark.filterwarnings("ignore::fxzip.MergeWarning")
LOW = Distill(precision=torch.bfloat16)


@pytest.fixture
def images():
    return torch.randn(1024, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def mirrored(x):
    return x.flip(-1)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, group_norm, lambda c: nn.Identity()])
def test_it_ends_as_near_to_the_parents_as_in_their_own_precision(norm, images, monkeypatch):
    nets = pair(lambda k: Residual(k, norm), images)
    solved, plain = merge(nets, images, "solve"), merge(nets, images)
    dtypes, residuals = set(), Descent._residuals

    def noted(run, *args, **kw):
        found = residuals(run, *args, **kw)
        dtypes.update(r.dtype for r in found if torch.is_grad_enabled())
        return found

    monkeypatch.setattr(Descent, "_residuals", noted)
    low = merge(nets, images, LOW)
    assert torch.bfloat16 in dtypes
    own, start, got = loss(plain, nets, HELD_OUT), loss(solved, nets, HELD_OUT), loss(low, nets, HELD_OUT)
    assert abs(got - own) < 0.1 * (start - own)
    assert said(low).endswith("; steps in bfloat16") and "bfloat16" not in said(plain)
    assert all(v.dtype == torch.float32 for v in low.state_dict().values() if v.is_floating_point())
    again = merge(nets, images, LOW)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in low.state_dict().items())


def test_of_double_precision_too(images):
    nets = [n.double() for n in pair(Residual, images)]
    solved, low = (merge(nets, images.double(), m) for m in ("solve", LOW))
    assert all(v.dtype == torch.float64 for v in low.state_dict().values() if v.is_floating_point())
    assert loss(low, nets, HELD_OUT.double()) < 0.9 * loss(solved, nets, HELD_OUT.double())


@pytest.mark.parametrize("options", [{"until": "b1"}, {"since": "a1"}, {"budget": 1.4}], ids=str)
def test_it_goes_with_cuts_and_budgets(options, images):
    nets = pair(Residual, images)
    solved, low = (merge(nets, images, m, **options) for m in ("solve", LOW))
    assert loss(low, nets, HELD_OUT) < 0.95 * loss(solved, nets, HELD_OUT)
    assert said(low).endswith("; steps in bfloat16")


class Recurrent(nn.Module):
    """Starts from zeros, a constant with a dtype of its own."""

    def __init__(self, classes):
        super().__init__()
        self.rnn, self.head = nn.GRU(24, 16, batch_first=True), nn.Linear(16, classes)

    def forward(self, x):
        return self.head(self.rnn(x.movedim(1, 2).flatten(2))[0][:, -1])


def test_constants_follow(images):
    nets = pair(Recurrent, images)
    assert said(merge(nets, images, LOW)).endswith("; steps in bfloat16")


class Pooled(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv, self.head = nn.Conv3d(1, 8, 3, padding=1), nn.Linear(8, classes)

    def forward(self, x):
        return self.head(nn.functional.avg_pool3d(torch.relu(self.conv(x.unsqueeze(1))), (3, 8, 8)).flatten(1))


def test_an_operator_without_it_leaves_the_models_own_precision_and_says_so(images):
    nets = pair(Pooled, images)
    low, plain = merge(nets, images, LOW), merge(nets, images)
    assert said(low).endswith("""; not in bfloat16: "avg_pool3d_out_frame" not implemented for 'BFloat16'""")
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in low.state_dict().items())


class Offset(nn.Module):
    """What it tells apart is lost in eight bits."""

    def __init__(self, classes):
        super().__init__()
        self.body, self.head = nn.Linear(192, 16), nn.Linear(16, classes)

    def forward(self, x):
        return self.head(torch.relu(self.body(x.flatten(1) + 1000 - 1000)))


def test_errors_that_are_others_in_it_do_so_too(images):
    assert "; not in bfloat16: errors would be " in said(merge(pair(Offset, images), images, LOW))


class Fixed(Residual):
    """Outputs without derivatives, and one that no input reaches."""

    def __init__(self, classes):
        super().__init__(classes)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        made = super().forward(x)
        return made, (made > 0).float(), self.scale * 2


@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_outputs_without_derivatives_do_not_count(precision, images):
    nets = pair(Fixed, images)
    zipped = merge(nets, images, Distill(precision=precision, epochs=1))
    assert "no epoch ended better" not in said(zipped)


class Twice(nn.Module):
    """Two kinds of weights."""

    def __init__(self, classes):
        super().__init__()
        self.first, self.body = nn.Linear(192, 16).double(), nn.Linear(16, 16)
        self.head = nn.Linear(16, classes)

    def forward(self, x):
        first = torch.relu(self.first(x.flatten(1).double()))
        return self.head(torch.relu(self.body(first.float())))


def test_of_weights_in_several_precisions_it_is_not_taken(images):
    assert said(merge(pair(Twice, images), images, LOW)).endswith("; not in bfloat16: weights are float32 and float64")


def test_what_is_exact_stays_so(images):
    """In bfloat16 there is always something to come nearer to."""
    net = pair(Residual, images)[0]
    zipped = merge([net, net], images, LOW)
    torch.testing.assert_close(zipped(HELD_OUT)[0], net(HELD_OUT), rtol=1e-3, atol=1e-4)


def test_another_precision_is_refused():
    with pytest.raises(InputError, match=r"precision must be torch\.bfloat16, or None .*, got torch\.float16"):
        Distill(precision=torch.float16)
    assert Distill(precision="bfloat16").precision is torch.bfloat16


def test_what_outputs_are_to_be_is_found_once_and_is_what_every_step_would_find(images, monkeypatch):
    nets, kept, found = pair(Residual, images), [], descent.kept_outputs

    def keep(*args):
        kept.append(found(*args))
        return kept[-1]

    monkeypatch.setattr(descent, "kept_outputs", keep)
    once = merge(nets, images, Distill(views=[mirrored]))
    judged, learnt = kept
    shown = images[:128]  # of the first chunk
    for k, net in enumerate(nets):
        with torch.no_grad():
            torch.testing.assert_close(learnt[k][:128], (net(shown) + net(mirrored(shown))) / 2, rtol=1e-4, atol=1e-5)
    assert [len(t) for t in judged] == [128, 128] and [len(t) for t in learnt] == [896, 896]
    monkeypatch.setattr(descent, "kept_outputs", lambda *a: None)
    every = merge(nets, images, Distill(views=[mirrored]))
    for a, b in zip(once(HELD_OUT), every(HELD_OUT), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


class Wide(nn.Module):
    """As many classes as samples in a chunk."""

    def __init__(self, classes):
        super().__init__()
        self.body = Residual(128)

    def forward(self, x):
        return self.body(x)


class Turned(Wide):
    def forward(self, x):
        return super().forward(x).T


class TurnedFar(Wide):
    """Next to what all have in common, what tells them apart is little."""

    def forward(self, x):
        return 1e-4 * super().forward(x).T + 1


class Coupled(Wide):
    """What a sample gets depends on the others, but not on their order."""

    def forward(self, x):
        return super().forward(x - 3 * x.mean(0))


@pytest.mark.parametrize("kind", [Wide, Turned, TurnedFar, Coupled])
def test_rows_that_are_not_samples_are_not_kept(kind, monkeypatch):
    images = torch.randn(512, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    kept, found = [], descent.kept_outputs

    def keep(*args):
        kept.append(found(*args))
        return kept[-1]

    monkeypatch.setattr(descent, "kept_outputs", keep)
    merge(pair(kind, images), images, Distill(views=[mirrored], epochs=1))
    assert all((t is not None) == (kind is Wide) for t in kept) and len(kept) == 2
