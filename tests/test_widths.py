"""Widths within a budget: what many layers read is worth more."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxzip
from fxzip.infer.spaces import FeatureSpace, Segment
from fxzip.measure.moments import Moments, SpaceMoments
from fxzip.widths import Term, allocate, flops

N = 16


def space(name: str, readers: int) -> FeatureSpace:
    every = np.arange(N)
    made = Segment(f"{name}.made", 0, every, frozenset({"produce"}))
    read = [Segment(f"{name}.read{k}", 1, every, frozenset({"consume"})) for k in range(readers)]
    return FeatureSpace(name, N, segments=(made, *read))


def moments(names, fall: float = 0.9) -> Moments:
    """Independent features whose variance falls, in a random basis: directions matter, features alike."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in names:
        basis = torch.linalg.qr(torch.randn(2 * N, 2 * N, generator=generator, dtype=torch.float64))[0]
        second = (basis * fall ** torch.arange(2 * N)) @ basis.T
        found[name] = SpaceMoments((N, N), 100.0, torch.zeros(2 * N, dtype=torch.float64), second)
    return Moments(found)


@pytest.mark.parametrize("budget", [1.33, 1.6])
def test_what_many_layers_read_becomes_wider(budget):
    spaces, names = [space("stream", 5), space("inner", 1)], ["stream", "inner"]
    terms = [Term(100.0, ({"stream": 1.0}, {"inner": 1.0}))]
    widths = allocate(terms, spaces, moments(names), names, budget, round_to=2)
    assert widths["stream"] > 1.2 * widths["inner"] >= N
    assert 0.9 * budget < flops(terms, {s: w / N for s, w in widths.items()}) / 100 <= budget


def test_widths_start_from_the_models_and_all_fits_at_the_most():
    spaces, names, seen = [space("a", 2), space("b", 1)], ["a", "b"], moments(["a", "b"])
    terms = [Term(100.0, ({"a": 1.0}, {"b": 1.0}))]
    assert allocate(terms, spaces, seen, names, 1.0, round_to=2) == {"a": N, "b": N}
    assert allocate(terms, spaces, seen, names, 4.0, round_to=2) == {"a": 2 * N, "b": 2 * N}


class Halves(nn.Module):
    """What it makes of the stream's width stops where the stream is wider than the layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.pair, self.out = nn.Linear(6, 8), nn.Linear(8, 16), nn.Linear(8, 8)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        n, width = x.shape
        one, other = self.pair(x).view(n, 2, width).unbind(1)
        x = x + self.out(one.sigmoid() * other)
        return self.head(x + self.down(self.up(x).relu()))


def test_trying_a_width_prints_nothing_where_the_network_stops(capsys):
    models = [Halves().eval(), Halves().eval()]
    zipped = fxzip.merge(models, [torch.randn(64, 6)], method="zip", budget=2.5, progress=False)
    widths = {s.name: s.width for s in fxzip.report(zipped).spaces}
    assert sorted(widths.values()) == [8, 8, 24], "the hidden layer alone grows"
    assert capsys.readouterr().err == ""


class Block(nn.Module):
    """stem, stream of 16 -> hidden layer of 24 and back -> head."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.down(self.up(x).relu()))


ROWS = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
MODELS = [Block(0).eval(), Block(1).eval()]


def widths_of(zipped: nn.Module) -> dict[str, int]:
    return {s.name: s.width for s in fxzip.report(zipped).spaces}


@pytest.mark.parametrize("method", ["zip", "solve"])
def test_widths_as_they_are_given(method):
    own = widths_of(fxzip.merge(MODELS, [ROWS], method=method, progress=False))
    hidden = next(s for s, n in own.items() if n == 24)
    zipped = fxzip.merge(MODELS, [ROWS], method=method, budget={hidden: 33}, progress=False)
    assert widths_of(zipped) == own | {hidden: 33}, "the other space keeps its width, and no step rounds what is given"
    assert tuple(zipped.get_parameter("up.weight").shape) == (33, 16)
    assert [tuple(y.shape) for y in zipped(ROWS)] == [(96, 3), (96, 3)]
    whole = fxzip.merge(MODELS, [ROWS], method=method, budget={s: 2 * n for s, n in own.items()}, progress=False)
    for model, found in zip(MODELS, whole(ROWS), strict=True):  # room for every feature of both
        torch.testing.assert_close(found, model(ROWS), atol=2e-3, rtol=2e-3)


def test_budgets_grow_in_steps_of_round_to():
    for step in (3, 5):
        zipped = fxzip.merge(MODELS, [ROWS], method="zip", budget=1.5, round_to=step, progress=False)
        grown = [s.width - s.width_in[0] for s in fxzip.report(zipped).spaces]
        assert any(grown) and all(g % step == 0 for g in grown)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.up, self.down = nn.Linear(16, 20), nn.Linear(20, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head((x + self.down(self.up(x).relu())).mean(1))


def test_the_report_says_what_keeps_its_width():
    models = [Attends().eval(), Attends().eval()]
    report = fxzip.report(fxzip.merge(models, [torch.randn(64, 5, 6)], method="zip", budget=1.3, progress=False))
    heads = next(s for s in report.spaces if s.width_in == (4, 4))
    said = next(n for n in report.notices if n.endswith("cannot change width, and keep the models'"))
    assert said.startswith("budget=1.3: ") and heads.name in said and heads.width == 4
    grown = [s.name for s in report.spaces if s.width != s.width_in[0]]
    assert grown and not any(f" {name}," in said or f" {name} " in said for name in grown)
    report = fxzip.report(fxzip.merge(MODELS, [ROWS], method="zip", budget=1.3, progress=False))
    assert not any("cannot change width" in n for n in report.notices), "all of them can"


def test_all_that_is_wrong_with_widths_is_said_before_a_sample_is_measured():
    models, read = [Attends().eval(), Attends().eval()], []

    def loader():
        for batch in torch.randn(64, 5, 6).split(2):
            read.append(batch)
            yield batch

    sizes = {s.name: s for s in fxzip.inspect(models[0], torch.randn(2, 5, 6)).spaces}
    heads = next(s for s in sizes if sizes[s].size == 4)
    hidden = next(s for s in sizes if sizes[s].size == 20)
    with pytest.raises(fxzip.InputError) as caught:
        fxzip.merge(models, loader(), budget={"s99": 4, heads: 3, hidden: 41}, progress=False)
    said = str(caught.value)
    for text in (
        "fxzip.merge: budget as widths: 3 problems", "s99 is no shared space", f"{heads} keeps its width (4)",
        f"{hidden} cannot have 41 features: all models together have 40", "spaces that can change: ", f"{hidden} (20)",
        "print(fxzip.inspect(model)) says which layers they are",
    ):  # fmt: skip
        assert text in said
    assert len(read) <= 1, "one batch for tracing"


def test_a_network_that_does_not_take_a_width_says_so():
    models = [Halves().eval(), Halves().eval()]
    own = widths_of(fxzip.merge(models, [torch.randn(64, 6)], method="zip", progress=False))
    stream = next(s for s, n in own.items() if n == 8)
    with pytest.raises(fxzip.InputError, match=f"{stream} does not take 12 features: the network stops"):
        fxzip.merge(models, [torch.randn(64, 6)], method="zip", budget={stream: 12}, progress=False)


@pytest.mark.parametrize(
    "method",
    ["permute", "average", "cca", "transport", fxzip.Solve(fxzip.Permute()), fxzip.Unmerge(fxzip.Permute())],
    ids=str,
)
def test_what_keeps_widths_has_no_budget(method):
    with pytest.raises(fxzip.InputError, match="keeps the models' widths and has no budget"):
        fxzip.merge(MODELS, [ROWS], method=method, budget=1.5, progress=False)
    fxzip.merge(MODELS, [ROWS], method=method, budget=1, progress=False)  # which are these


def test_widths_by_space_do_not_go_with_stems():
    with pytest.raises(fxzip.InputError, match="budget as widths does not go with since="):
        fxzip.merge(MODELS, [ROWS], since="up", budget={"s0": 18}, progress=False)


class Stacked(nn.Module):
    """Each group of a convolution reads a space of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.grouped, self.out = nn.Conv2d(16, 6, 3, padding=1, groups=2), nn.Conv2d(6, 5, 1)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.a(x), self.b(x)], 1).relu()
        return self.head(self.out(self.grouped(x).relu()).mean((2, 3)))


@pytest.mark.parametrize("budget", [{"s0": 10, "s1": 10}, {"s0": 16, "s1": 16}, 1.2, 1.5, 2.0], ids=str)
def test_groups_with_spaces_of_their_own_stay_in_their_groups(budget):
    """A network merged with itself has room at any width of at least its own."""
    model, images = Stacked().eval(), torch.randn(64, 3, 4, 4)
    zipped = fxzip.merge([model, model], [images], method="zip", budget=budget, round_to=2, progress=False)
    for found in zipped(images):
        torch.testing.assert_close(found, model(images), atol=1e-5, rtol=1e-5)
    assert any(s.width != s.width_in[0] for s in fxzip.report(zipped).spaces)


@pytest.mark.parametrize("budget", [{"s0": 10}, {"s1": 10}, {"s2": 4}, {"s0": 10, "s1": 6}], ids=str)
def test_a_group_is_not_widened_alone(budget):
    model = Stacked().eval()
    with pytest.raises(fxzip.InputError, match="does not take"):
        fxzip.merge([model, model], [torch.randn(64, 3, 4, 4)], method="zip", budget=budget, progress=False)


class Joined(nn.Module):
    """One layer reads two spaces side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(6, 8), nn.Linear(6, 24), nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(torch.cat([self.a(x), self.b(x)], 1).relu()).relu())


@pytest.mark.parametrize("budget", [1.3, 1.6])
def test_flops_of_a_layer_that_reads_several_spaces(budget):
    models = [Joined().eval(), Joined().eval()]
    report = fxzip.report(fxzip.merge(models, [ROWS], method="zip", budget=budget, round_to=1, progress=False))
    one = report.inputs[0].flops + 2 * 16 * 3  # at the models' widths, and every model's head
    assert 0.95 * budget < report.result.flops / one <= budget
