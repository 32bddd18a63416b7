"""What is shared and what is each model's own: where a graph may be cut, and which parameters go where."""

import pytest
import torch
from rewrite_nets import close, permuted_pair, random_model, spaces_of, zipped_of
from torch import fx, nn

import fxzip
from examples import EXAMPLES
from fxzip.errors import InputError, SpaceError
from fxzip.rewrite import cut_points, owned, partition

torch.set_num_threads(1)
pair = pytest.fixture(scope="module")(permuted_pair)


def test_partition_by_opaque_and_until(pair):
    graph = fx.symbolic_trace(pair[0])
    cut = partition(graph, {"fc"})
    assert cut.private == {"fc", "output"} and cut.boundary == ("drop",)
    cut = partition(graph, {"fc"}, "block2.conv2")
    assert cut.boundary == ("block1_relu_1", "block2_relu")
    assert {"block2_conv2", "block2_bn2", "mean", "fc"} <= cut.private and "block2_relu" in cut.shared
    assert partition(graph, {"fc"}, "block2_conv2") == cut  # an FX node name
    assert "aux.weight" not in owned(graph, cut.shared | cut.private)


def test_cut_points_are_the_dominators(pair):
    points = cut_points(fx.symbolic_trace(pair[0]))
    assert {"conv", "block1_relu_1", "block2_relu_1", "mean", "fc"} <= set(points)
    assert not {"block1_conv1", "block2_bn2", "x", "output", "scale"} & set(points)


def test_shapes_carry_no_features():
    class Flat(nn.Module):
        def forward(self, x):
            n = x.shape[0]
            return torch.relu(x).view(n, -1)

    assert cut_points(fx.symbolic_trace(Flat())) == ("relu", "view")


def test_bad_until_lists_names_and_cut_points(pair):
    graph = fx.symbolic_trace(pair[0])
    with pytest.raises(InputError, match=r"Did you mean 'block2'.*Cut points.*block1_relu_1"):
        partition(graph, {"fc"}, "blok2")
    with pytest.raises(InputError, match="placeholder"):
        partition(graph, {"fc"}, "x")
    with pytest.raises(InputError, match='"aux" is no module or node that this graph runs'):
        partition(graph, {"fc"}, "aux")
    with pytest.raises(SpaceError, match='nothing can be merged: until="conv".*Cut points'):
        partition(graph, {"fc"}, "conv")
    with pytest.raises(SpaceError, match="%conv cannot be shared.*no rule for conv"):
        partition(graph, {"conv"}, None, ["no rule for conv"])


class Token(nn.Module):
    """A class token read by the private part alone, an embedding by both."""

    def __init__(self):
        super().__init__()
        self.emb, self.token, self.fc = (
            nn.Parameter(torch.randn(4)),
            nn.Parameter(torch.randn(4)),
            nn.Linear(4, 4),
        )
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.fc(x + self.emb) + self.token.expand(x.shape[0], -1) + self.emb)


def test_parameters_read_by_the_private_part_are_private():
    models = [random_model(Token, seed) for seed in (1, 2)]
    graph = fx.symbolic_trace(models[0])
    cut = partition(graph, {"head"}, "expand")
    assert {"token", "expand"} <= cut.private and cut.copied == {"emb"} and "fc" in cut.boundary
    x = torch.randn(3, 4)
    zipped, _ = zipped_of(models, spaces_of(opaque=["head"]), {}, x, "expand", feature_axis=lambda _: None)
    names = {n for n, _ in zipped.named_parameters()}
    assert {"emb", "emb_a", "emb_b", "token_a", "token_b", "fc.weight", "head_b.weight"} <= names
    assert "token" not in names
    mean = {n: (p + models[1].get_parameter(n)) / 2 for n, p in models[0].named_parameters()}
    hidden = nn.functional.linear(x + mean["emb"], mean["fc.weight"], mean["fc.bias"])
    for got, m in zip(zipped(x), models, strict=True):
        close(got, m.head(hidden + m.token + m.emb))


@pytest.mark.parametrize(("name", "private"), [
    ("token mixer", {"head"}),
    ("relative positions", {"head"}),
    ("votes for classes", {"votes"}),
    ("weight beside its module", {"head"}),
])  # fmt: skip
def test_places_are_shared_and_what_a_model_numbers_itself_is_not(name, private):
    example = next(e for e in EXAMPLES if e.name == name)
    model, (x,) = example.make(), example.inputs()
    zipped = fxzip.merge([model, fxzip.scramble(model, x)], [x], method="permute", progress=False)
    names = {n.rpartition(".")[0].rpartition("_task")[0] for n, _ in zipped.named_parameters() if "_task" in n}
    assert names == private
    for output in zipped(x):
        torch.testing.assert_close(output, model(x), atol=1e-5, rtol=1e-5)
