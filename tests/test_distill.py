"""solve+distill: natural-gradient steps on what solve has fitted."""

import pytest
import torch
from helpers import unchanged
from sklearn.datasets import load_digits
from test_solve import Residual, group_norm, loss, pair
from torch import nn
from torchvision.models import VisionTransformer

import fxzip
from examples import EXAMPLES
from fxzip import Distill, InputError, Solve
from fxzip.distill import distill_needs
from fxzip.distill.curvature import Curvature
from fxzip.distill.descent import Descent
from fxzip.solve import FitNeed, Settings, SolveNeeds

pytestmark = pytest.mark.filterwarnings("ignore::fxzip.MergeWarning")
NO_DERIVATIVE = ("floor_divide", "copy", "_addmm_activation")
HELD_OUT = torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(9))


@pytest.fixture
def images():
    return torch.randn(1024, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def merge(nets, images, method="solve+distill", **options):
    return fxzip.merge(nets, [images], method=method, progress=False, verify=False, **options)


def said(zipped):
    return next(n for n in fxzip.report(zipped).notices if n.startswith("distill: "))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, group_norm, lambda c: nn.Identity()])
def test_it_comes_nearer_to_the_parents_than_solve_on_held_out_images(norm, images):
    nets = pair(lambda k: Residual(k, norm), images)
    with unchanged(nets):
        zipped = merge(nets, images)
    solved = merge(nets, images, "solve")
    assert loss(zipped, nets, HELD_OUT) < 0.9 * loss(solved, nets, HELD_OUT)
    assert fxzip.report(zipped).method == "solve+distill" and "no epoch" not in said(zipped)
    again = merge(nets, images)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in zipped.state_dict().items())


def test_a_transformer_too():
    x = torch.randn(512, 3, 16, 16, generator=torch.Generator().manual_seed(2))

    def vit(classes):
        net = VisionTransformer(16, 4, 2, 4, 32, 64, num_classes=classes)
        nn.init.normal_(net.heads.head.weight, std=0.2)
        return net

    nets = pair(vit, x)
    solved, distilled = (merge(nets, x[:384], m) for m in ("solve", "solve+distill"))
    assert loss(distilled, nets, x[384:]) < 0.9 * loss(solved, nets, x[384:])


@pytest.mark.parametrize("options", [{"until": "b1"}, {"since": "a1"}, {"budget": 1.4}, {"heads": "concat"}], ids=str)
def test_it_goes_with_cuts_budgets_and_joined_heads(options, images):
    nets = pair(Residual, images)
    solved, distilled = (merge(nets, images, m, **options) for m in ("solve", "solve+distill"))
    whole = options.get("heads") == "concat"
    wanted = torch.cat([n(HELD_OUT) for n in nets], 1)

    def drift(zipped):
        made = zipped(HELD_OUT)
        return float(((made if whole else torch.cat(made, 1)) - wanted).square().mean())

    with torch.no_grad():
        assert drift(distilled) < 0.95 * drift(solved)


class LatePool(nn.Sequential):
    """Convolutions whose positions the head does not tell apart."""

    def __init__(self, classes):
        convs = [nn.Sequential(nn.Conv2d(i, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
                 for i in (1, *[16] * 5)]  # fmt: skip
        super().__init__(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes))


def on_digits(x, labels, seed):
    torch.manual_seed(seed)
    net = LatePool(int(labels.max()) + 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for index in torch.randperm(10 * len(x)).remainder(len(x)).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[index]), labels[index]).backward()
        optimizer.step()
    return net.eval()


def test_it_takes_private_convolutions_under_a_pool_further():
    """Their curvature is that of single positions; outputs alone say little of those, and steps were much too long."""
    digits = load_digits()
    x, labels = torch.from_numpy(digits.images).float()[:, None] / 8 - 1, torch.from_numpy(digits.target)
    low = labels < 5
    nets = [on_digits(x[low], labels[low], 0), on_digits(x[~low], labels[~low] - 5, 1)]
    solved, distilled = (merge(nets, x[:1024], m, until="2") for m in ("solve", "solve+distill"))
    assert loss(distilled, nets, x[1024:]) < 0.63 * loss(solved, nets, x[1024:])  # 0.55; without them 0.70


@pytest.mark.parametrize("example", [e for e in EXAMPLES if not e.frozen], ids=str)
def test_steps_of_no_length_change_nothing(example, monkeypatch):
    """What layers hold together with norms and scales is taken apart and put back: soundness, over all operators."""
    monkeypatch.setattr("fxzip.distill.descent._worse", lambda before, after: False)  # equal is no reason to go back
    model, inputs = example.make(), example.inputs()
    data = tuple(torch.cat([v + 0.1 * k * torch.randn_like(v) if v.is_floating_point() else v for k in range(8)])
                 if isinstance(v, torch.Tensor) and v.dim() and len(v) == 2 else v for v in inputs)  # fmt: skip
    settings = Settings(rows=1, least=64)
    try:
        solved = fxzip.merge([model, model], [data], method=Solve(settings=settings), progress=False, verify=False)
    except fxzip.FxzipError as error:
        pytest.skip(f"no merge to start from: {error}")
    method = Distill(Solve(settings=settings), epochs=1, rate=0, precision="bfloat16")  # soon given up
    if example.name.split(": ")[-1] in NO_DERIVATIVE:
        with pytest.raises(fxzip.FxzipError, match=r"cannot be differentiated: derivative for aten::\w+ is not impl"):
            fxzip.merge([model, model], [data], method=method, progress=False, verify=False)
        return
    distilled = fxzip.merge([model, model], [data], method=method, progress=False, verify=False)
    with torch.no_grad():
        for a, b in zip(solved(*data), distilled(*data), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3 * float(a.abs().max()) if a.numel() else 0)


def test_what_has_become_worse_is_not_kept(images):
    nets = pair(Residual, images)
    zipped, solved = merge(nets, images, Distill(rate=1e30)), merge(nets, images, "solve")
    assert said(zipped).endswith("no epoch ended better, so the layers are solve's")
    for made, kept in zip(zipped(HELD_OUT), solved(HELD_OUT), strict=True):
        torch.testing.assert_close(made, kept, rtol=1e-3, atol=1e-4)


def test_an_epoch_that_is_lost_is_not_gone_through(images, monkeypatch):
    taken, gradients = [], Descent._gradients
    monkeypatch.setattr(Descent, "_gradients", lambda run, *args: taken.append(0) or gradients(run, *args))
    merge(pair(Residual, images), images, Distill(epochs=3, rate=1e30))
    assert len(taken) <= 4 + 3 * 3  # for the rate; then of seven steps an epoch, those until one is not finite


def test_steps_that_are_lost_in_rounding_have_no_length(images, monkeypatch):
    found, rate = [], Descent._rate

    def lost(run, *args):
        with monkeypatch.context() as patch:
            patch.setattr(Descent, "_move", lambda *a: None)
            found.append(rate(run, *args))
        return found[-1]

    monkeypatch.setattr(Descent, "_rate", lost)
    assert said(merge(pair(Residual, images), images)).endswith("the layers are solve's") and found == [0.0]


def test_epochs_are_judged_on_samples_that_no_step_sees(images, monkeypatch):
    seen, judged, gradients, errors = [], [], Descent._gradients, Descent._errors

    def stepped(run, args, *rest):
        seen.append(args[0])
        return gradients(run, args, *rest)

    def judge(run, batches, *rest):
        judged.extend(args[0] for args in batches)
        return errors(run, batches, *rest)

    monkeypatch.setattr(Descent, "_gradients", stepped)
    monkeypatch.setattr(Descent, "_errors", judge)
    zipped = merge(pair(Residual, images), images, Distill(epochs=2))
    rows = {x.numpy().tobytes() for x in torch.cat(seen)}
    held_out = {x.numpy().tobytes() for x in torch.cat(judged)}
    assert len(rows) == 896 and len(held_out) == 128 and not rows & held_out
    assert said(zipped).endswith("on held-out calibration samples")
    merge(pair(Residual, images), images[:512], Distill(epochs=1))  # four chunks: too few to leave any out
    assert {x.numpy().tobytes() for x in torch.cat(judged)} - held_out <= {x.numpy().tobytes() for x in images[:512]}


def test_double_precision_stays(images):
    nets = [n.double() for n in pair(Residual, images)]
    held_out = HELD_OUT.double()
    solved, distilled = (merge(nets, images.double(), m) for m in ("solve", "solve+distill"))
    assert all(v.dtype == torch.float64 for v in distilled.state_dict().values() if v.is_floating_point())
    assert loss(distilled, nets, held_out) < 0.9 * loss(solved, nets, held_out)


def test_one_task_of_it_loads_into_the_users_class(images):
    nets = pair(Residual, images)
    zipped = merge(nets, images)
    single = fxzip.extract(zipped, 0)
    own = Residual(3)
    own.load_state_dict(single.state_dict(), strict=True)
    torch.testing.assert_close(own.eval()(HELD_OUT), zipped(HELD_OUT)[0], rtol=1e-3, atol=1e-4)
    reset = fxzip.reset_statistics(zipped, [images])  # norms hold what they see, so that this changes next to nothing
    torch.testing.assert_close(reset(HELD_OUT)[0], zipped(HELD_OUT)[0], rtol=1e-2, atol=1e-2)


def test_what_it_does_not_go_with_is_said_at_once(images):
    nets = pair(Residual, images)
    with pytest.raises(InputError, match=r"'solve\+distill' does not go by memory=: leave it out"):
        merge(nets, images, memory="1GB")
    with pytest.raises(InputError, match="does not go by memory="):
        fxzip.plan(nets, [images], method="solve+distill", memory="1GB")
    wrong = (
        "(?s)epochs must be at least 1, got 0.*features must be at least 0, got -1.*rate must be at least 0, got -1"
        ".*solve_samples must be at least 1, got 0.*damping must be above 0, got 0"
    )
    with pytest.raises(InputError, match=wrong):
        Distill(epochs=0, features=-1, solve_samples=0, rate=-1, damping=0)


def test_the_plan_counts_every_models_own_layers(images):
    nets = [Residual(k).eval() for k in (2, 3, 4)]
    whole, cut, solving = (
        fxzip.plan(nets, [images], method=m, until=u)
        for m, u in (("solve+distill", None), ("solve+distill", "a1"), ("solve", None))
    )
    assert "solve+distill of 3 models" in str(whole) and "\n  distill            curvature, and deriv" in str(whole)
    assert "memory=" not in str(whole).split("no cap")[1] and "distill" not in str(solving)  # there is no cap to choose
    low = fxzip.plan(nets, [images], method=Distill(precision="bfloat16"))
    assert low.distilling == whole.distilling + (low.models + low.models // 3) // 2 + low.models // 3
    viewed = fxzip.plan(nets, [images], method=Distill(views=[lambda x: x.flip(-1)]))
    assert viewed.distilling == whole.distilling + 2 * images.nbytes
    assert cut.distilling > 1.5 * whole.distilling > 0 == solving.distilling and whole.whole >= whole.distilling


def test_needs_are_factors_matrices_and_values():
    fits = (FitNeed("a", 10, 0, 3), FitNeed("b", 4, 0, 5, groups=2, copies=3))
    factors, matrices = (8 * 109, 8 * 2 * 41), (4 * 30, 4 * 2 * 20)
    wanted = factors[0] + 3 * factors[1] + 3 * max(factors) + 6 * (matrices[0] + 3 * matrices[1]) + 3 * 1000
    assert distill_needs(SolveNeeds(fits, 0, 0, 1000)) == wanted


def test_solve_fits_on_fewer_samples_and_steps_see_all(images):
    nets = pair(Residual, images)
    many, few, fewer = (
        merge(nets, x, Distill(solve_samples=s)) for x, s in ((images, 256), (images[:256], None), (images, 130))
    )
    assert loss(many, nets, HELD_OUT) < 0.9 * loss(few, nets, HELD_OUT)
    assert all(torch.equal(v, fewer.state_dict()[k]) for k, v in many.state_dict().items())  # chunks are whole
    every, plan = (fxzip.plan(nets, [images], method=Distill(solve_samples=s)) for s in (None, 256))
    assert 4 * plan.solving.activations == every.solving.activations
    assert fxzip.plan(nets, [images], method=Distill(solve_samples=9999)).solving == every.solving


def test_with_less_damping_curvature_counts_for_more(images):
    """Towards plain gradients with much of it: nothing but its length is left of the outputs' factor."""
    nets = pair(Residual, images)
    little, much = (loss(merge(nets, images, Distill(damping=d, rate=0.1)), nets, HELD_OUT) for d in (0.1, 1e4))
    assert little < much < loss(merge(nets, images, "solve"), nets, HELD_OUT)


def test_of_many_samples_curvature_is_from_more(images, monkeypatch):
    many, seen, add = torch.cat([images] * 10), [], Curvature.add
    monkeypatch.setattr(Curvature, "add", lambda c, t, r, count, g: seen.append(count) or add(c, t, r, count, g))
    merge(pair(Residual, images), many, Distill(epochs=1, solve_samples=256), calibration=len(many))
    assert len(images) == 1024 and sum(seen) == 640  # a sixteenth of the 8,960 and more that are learnt from
