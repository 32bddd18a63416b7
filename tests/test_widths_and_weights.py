"""Models that count unequally, models of other hidden widths, merged networks that are merged again, joined heads."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import unchanged
from torch import Tensor, nn
from toys import randomise

import fxzip
from fxzip import CCA, InputError, Pair, Permute, Rebasin, Select, Solve, Unmerge, Zip
from fxzip.infer import analyse
from fxzip.padding import pad

X = torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """Convolutions, batch norm, attention heads of their own: every structure whose width may differ."""

    def __init__(self, classes: int = 3, width: int = 8, hidden: int = 12, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.conv, self.norm = nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width)
        self.qkv, self.out = nn.Linear(width, 3 * heads * 4), nn.Linear(heads * 4, width)
        self.fc1, self.fc2, self.head = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, 4)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head((x + self.fc2(F.gelu(self.fc1(x)))).mean(1))


def net(seed: int, **sizes: int) -> nn.Module:
    return randomise(Net(**sizes), seed).eval()


def merge(models, method="permute", loader=(X,), **options):
    return fxzip.merge(models, loader, method=method, progress=False, **options)


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# ------------------------------------------------------------------------------------------ model_weights


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).eval()


def test_a_weighted_average_is_the_sum_of_shares():
    models = [mlp(k) for k in range(3)]
    state = merge(models, "average", model_weights=[5, 3, 2]).state_dict()
    states = [m.state_dict() for m in models]
    for name in ("1.weight", "1.bias", "3.weight"):
        torch.testing.assert_close(state[name], sum(w * s[name] for w, s in zip((0.5, 0.3, 0.2), states, strict=True)))


@pytest.mark.parametrize("method", ["permute", "zip", "pair", "transport", "cca", "unmerge", "rebasin", "mudsc"])
def test_weights_move_the_merge_towards_a_model(method):
    """By name too; equal ones change nothing, whatever their size. What merges features within a model, too, cannot
    come to it, but is nearer to the one that counts."""
    models = {"a": mlp(0), "b": mlp(1)}
    plain = merge(models, method).state_dict()
    assert all(torch.equal(v, plain[k]) for k, v in merge(models, method, model_weights=[7, 7]).state_dict().items())
    light, even, heavy = (merge(models, method, model_weights={"a": w, "b": 1})(X) for w in (1e-6, 1, 1e6))
    if method in ("zip", "pair", "unmerge", "mudsc"):
        assert far(light["b"], models["b"](X)) < far(heavy["b"], models["b"](X))
    else:
        assert far(heavy["a"], models["a"](X)) < 0.01 < 0.1 * far(even["a"], models["a"](X))


def test_weights_in_repair_solve_and_the_mean_of_outputs(tmp_path):
    models = [mlp(0), mlp(1)]
    for method in ("permute+repair", Solve(Permute())):
        found = [merge(models, method, model_weights=w, heads="average") for w in ([1, 1], [1e6, 1])]
        assert far(found[1](X), models[0](X)) < min(0.5 * far(found[0](X), models[0](X)), 0.2), method
    zipped = merge(models, "permute", model_weights=[3, 1], heads="average")
    parts = [fxzip.extract(zipped, k)(X) for k in (0, 1)]
    torch.testing.assert_close(zipped(X), 0.75 * parts[0] + 0.25 * parts[1])
    fxzip.save(zipped, tmp_path / "w")
    assert torch.equal(fxzip.load(tmp_path / "w", lambda: mlp(0))(X), zipped(X))


@pytest.mark.parametrize(
    ("weights", "message"),
    [([1, 0], "must be positive numbers, got 0"), ([1], "1 numbers for 2 models"), (3, "list or dict of positive"),
     ({"a": 1}, r"has the keys \['a'\], the models are a list"), ([1, float("nan")], "positive numbers, got nan"),
     ([1, 10**400], "positive numbers, got 1000"), ([1e308, 1e308], "add up to infinity")],
)  # fmt: skip
def test_wrong_weights_are_named(weights, message):
    with pytest.raises(InputError, match=message):
        merge([mlp(0), mlp(1)], model_weights=weights)


# ---------------------------------------------------------------------------------------------- widths


def widened(narrow: nn.Module, wide: nn.Module, seed: int = 5) -> nn.Module:
    """`narrow`'s function at the widths of `wide`, idle features not zero but random, all in another order."""
    graphs = [fxzip.inspection.trace(m, X[:2]).graph_module for m in (narrow, wide)]
    made = pad(graphs, (X[:2],), ("narrow", "wide"))
    assert made is not None and not made.reason
    new = copy.deepcopy(wide)
    new.load_state_dict(made.graph_modules[0].state_dict())
    for space in analyse(graphs[1], (X[:2],)):
        for s in space.segments if space.name in made.real else ():
            idle = torch.from_numpy(s.positions[[k for k in range(space.size) if k not in made.real[space.name][0]]])
            tensor = new.get_parameter(s.parameter) if s.parameter in dict(new.named_parameters()) else None
            if tensor is not None and "consume" not in s.roles:
                with torch.no_grad():
                    flat = tensor.movedim(s.axis, 0)
                    flat[idle] += torch.randn(flat[idle].shape, generator=torch.Generator().manual_seed(seed)) * 0.3
    assert far(new(X), narrow(X)) < 1e-5
    return fxzip.scramble(new.eval(), X[:2], seed=seed)


WIDER = {"width": {"width": 12}, "hidden": {"hidden": 20}, "heads": {"heads": 3}}


@pytest.mark.parametrize("method", ["permute", "pair", "zip", "mudsc", Solve(), Unmerge(Pair())], ids=str)
@pytest.mark.parametrize("what", WIDER)
def test_a_network_in_a_wider_one_is_found(what, method):
    """The wider model computes the same from some of its features: they meet, and nothing is lost."""
    narrow = net(0)
    wide = widened(narrow, net(1, **WIDER[what]))
    models = [narrow, wide]
    with unchanged(models):
        zipped = merge(models, method)
    assert "widths differ" in " ".join(fxzip.report(zipped).notices)
    assert all(far(y, narrow(X)) < (2e-2 if method == Solve() else 1e-3) for y in zipped(X)), fxzip.report(zipped)


@pytest.mark.parametrize("method", ["rebasin", Rebasin(start="order"), "c2m3"], ids=str)
@pytest.mark.parametrize("what", WIDER)
def test_a_network_in_a_wider_one_is_found_without_data(what, method):
    narrow = net(0)
    models = [narrow, widened(narrow, net(1, **WIDER[what]))]
    zipped = merge(models, method, None, example_inputs=X[:2])
    assert all(far(y, narrow(X)) < 1e-5 for y in zipped(X))


def test_what_only_the_wider_one_has_counts_whole():
    narrow, wide = mlp(0), nn.Sequential(nn.Flatten(), nn.Linear(192, 11), nn.ReLU(), nn.Linear(11, 6), nn.ReLU(),
                                         nn.Linear(6, 2)).eval()  # fmt: skip
    rest = {}
    for method in ("average", "rebasin", "c2m3"):
        weight = merge([narrow, wide], method).get_parameter("1.weight")
        rest[method] = [k for k in range(11) if any(torch.equal(wide[1].weight[k], row) for row in weight)]
    assert rest["average"] == [8, 9, 10], "narrower ones have the first features"
    assert all(len(rest[m]) == 3 and rest[m] != rest["average"] for m in ("rebasin", "c2m3")), rest


BY_WEIGHTS = ["average", "rebasin", "c2m3", "mudsc"]


@pytest.mark.parametrize(
    "method", [Zip(), Pair(), Select(), CCA(), "transport", "permute", "solve", *BY_WEIGHTS], ids=str
)
def test_three_widths_in_any_order(method):
    models = [mlp(0), mlp(1), mlp(2)]
    models[0] = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    zipped = merge(models, method)
    rows = fxzip.report(zipped).spaces
    assert [(r.width_in, r.width) for r in rows] == [((5, 8, 8), 8), ((4, 6, 6), 6)]
    assert [tuple(y.shape) for y in zipped(X)] == [(96, 3), (96, 2), (96, 2)]
    sizes = [s.parameters for s in fxzip.report(zipped).inputs]
    assert sizes == [sum(p.numel() for p in m.parameters()) for m in models]


def test_a_chosen_budget_of_models_of_two_widths():
    models = [net(0), net(1, hidden=20, width=16)]
    zipped = merge(models, "solve", budget=1.4)
    assert any(r.width > max(r.width_in) for r in fxzip.report(zipped).spaces)
    assert fxzip.extract(zipped, 0)(X).shape == (96, 3)


def test_a_norm_over_idle_features_keeps_its_layer_per_model():
    def normed(width: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 9), nn.ReLU(), nn.Linear(9, width), nn.LayerNorm(width),
                             nn.Linear(width, 2))  # fmt: skip

    zipped = merge([normed(4), normed(6)])
    notices = " ".join(fxzip.report(zipped).notices)
    assert "idle features would change what task0 computes" in notices and "per model from %_3 on" in notices


def test_two_models_each_wider_somewhere_say_so():
    with pytest.raises(InputError, match=r"fc1.weight is \[12, 12\] in task0 and \[20, 8\] in task1"):
        merge([net(0, width=12), net(1, hidden=20)])


# --------------------------------------------------------------------------------- merged again, and heads


def test_a_merged_network_is_merged_again():
    """Two stages; the first one's tasks come out beside the new one's, and copies are found through both."""
    base = mlp(0)
    twins = [fxzip.scramble(base, X[:2], seed=k) for k in (1, 2)]
    both = merge({"a": base, "b": twins[0]})
    zipped = merge({"old": both, "c": twins[1]})
    outputs = zipped(X)
    assert list(outputs) == ["old_a", "old_b", "c"] and all(far(y, base(X)) < 1e-5 for y in outputs.values())
    size = sum(p.numel() for p in mlp(0).parameters())
    assert sum(p.numel() for p in zipped.parameters()) == size + 2 * 14  # one body, three heads
    again = merge([merge([mlp(0), mlp(1)]), mlp(2), merge([mlp(3), mlp(4)])], "solve", model_weights=[2, 1, 2])
    assert len(again(X)) == 5
    by_hand = merge([fxzip.extract(both, "a"), fxzip.extract(both, "b"), twins[1]])
    assert torch.equal(by_hand(X)[0], outputs["old_a"])


def test_names_of_tasks_that_would_meet_are_refused():
    """Once the later of the two was all that came out."""
    both = merge({"a": mlp(0), "b": mlp(1)})
    with pytest.raises(InputError, match="two models would be called 'old_a'"):
        merge({"old": both, "old_a": mlp(2)})


def test_a_generator_of_a_merged_network_is_for_all_its_tasks():
    both = merge({"a": mlp(0), "b": mlp(1)})
    from_list, from_generator = (
        fxzip.merge({"old": both, "c": mlp(2)}, {"old": old, "c": [X]}, method="zip", progress=False)(X)
        for old in ([X], (x for x in [X]))
    )
    assert all(torch.equal(from_generator[task], y) for task, y in from_list.items())


def test_concatenated_logits(tmp_path):
    models = {"a": mlp(0), "b": nn.Sequential(*mlp(1)[:5], nn.Linear(6, 5)).eval()}
    apart, joined = merge(models)(X), merge(models, heads="concat")
    assert torch.equal(joined(X), torch.cat([apart["a"], apart["b"]], 1))
    assert torch.equal(fxzip.extract(joined, "b")(X), apart["b"])
    fxzip.save(joined, tmp_path / "j")
    loaded = fxzip.load(tmp_path / "j", lambda task: models[task])
    assert torch.equal(loaded(X), joined(X)) and "side by side" in (tmp_path / "j" / "README.md").read_text()
    with pytest.raises(InputError, match='heads="concat" needs outputs that differ along axis 1 alone'):
        merge([nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, k)) for k in (1, 3)], heads="concat")


class Answers(nn.Module):
    """Also says which samples it is sure of."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(4, width), nn.Linear(width, 2)

    def forward(self, x):
        return self.second(torch.relu(self.first(x))), x.sum(1) > 0


def test_outputs_of_truth_values_may_go_with_other_widths():
    x = torch.randn(32, 4)
    (_, sure), _ = fxzip.merge([Answers(6), Answers(8)], [x], progress=False, verify=False)(x)
    assert torch.equal(sure, x.sum(1) > 0)
