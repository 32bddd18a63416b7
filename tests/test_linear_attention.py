"""Linear attention: keys times values is [heads, d, e], and both d and e have an order of their own in every head."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from merging import far, outputs
from torch import Tensor, nn
from toys import randomise

import fxzip

HEADS, DIM = 3, 4


def softmaxed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Efficient attention (Shen et al.)."""
    return q.softmax(-1) @ (k.softmax(-2).transpose(-2, -1) @ v)


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear transformers (Katharopoulos et al.), with their normaliser."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    pooled = torch.einsum("bhnd,bhne->bhde", k, v)
    return torch.einsum("bhnd,bhde,bhn->bhne", q, pooled, 1 / torch.einsum("bhnd,bhd->bhn", q, k.sum(2)))


def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """EfficientViT: the normaliser is one more value, of ones."""
    out = q.relu() @ (k.relu().transpose(-2, -1) @ F.pad(v, (0, 1), value=1.0))
    return out[..., :-1] / (out[..., -1:] + 1e-3)


def across(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """XCiT: attention of features to features; here queries lead to what is read, and keys go with values."""
    weights = (F.normalize(q, dim=-2).transpose(-2, -1) @ F.normalize(k, dim=-2)).softmax(-1)
    return (weights @ v.transpose(-2, -1)).transpose(-2, -1)


class Net(nn.Module):
    def __init__(self, attend) -> None:
        super().__init__()
        self.attend = attend
        self.embed, self.head = nn.Linear(5, 16), nn.Linear(16, 3)
        self.q, self.k, self.v = (nn.Linear(16, HEADS * DIM) for _ in range(3))
        self.o = nn.Linear(HEADS * DIM, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (f(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.head((x + self.o(self.attend(q, k, v).transpose(1, 2).flatten(2))).relu().mean(1))


KINDS = {"softmaxed": softmaxed, "einsum": einsum, "padded": padded, "across": across}


def made(kind: str, seed: int = 0) -> nn.Module:
    return randomise(Net(KINDS[kind]), seed).eval()


def batches() -> list[Tensor]:
    return [torch.randn(16, 7, 5, generator=torch.Generator().manual_seed(k)) for k in range(4)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_head_orders_keys_and_values_by_itself(kind):
    spaces = fxzip.inspect(made(kind), batches()[0][:1])
    block, first, second = (s for s in spaces if s.size != 16)
    assert (block.size, block.segments) == (HEADS, ())
    assert [s.structure for s in (first, second)] == [f"{HEADS} x {DIM}"] * 2
    assert all([p.space for p in s.parents] == [block.name] for s in (first, second))
    together = [{"q", "o"}, {"k", "v"}] if kind == "across" else [{"q", "k"}, {"v", "o"}]
    assert [{p.partition(".")[0] for p in s.parameters} for s in (first, second)] == together
    assert fxzip.verify(made(kind), batches()[0][:2]).ok


def by_hand(net: nn.Module, kind: str) -> nn.Module:
    """A copy with heads in another order, and features in another order in every head and either space."""
    rng = np.random.default_rng(3)
    heads = rng.permutation(HEADS)
    first, second = (np.concatenate([h * DIM + rng.permutation(DIM) for h in heads]) for _ in range(2))
    other = made(kind)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    for name, order in zip("qkv", (first, second, second) if kind == "across" else (first, first, second), strict=True):
        state[f"{name}.weight"], state[f"{name}.bias"] = state[f"{name}.weight"][order], state[f"{name}.bias"][order]
    state["o.weight"] = state["o.weight"][:, first if kind == "across" else second]
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("method", ["permute", "zip", "rebasin", "solve"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_with_an_order_of_its_own_in_every_head_is_found(kind, method):
    net = made(kind)
    other = by_hand(net, kind)
    wanted = outputs(net, batches()[0])
    assert far(outputs(other, batches()[0]), wanted) < 1e-5
    zipped = fxzip.merge([net, other], batches(), method=method, progress=False)
    for out in outputs(zipped, batches()[0]):
        assert far(out, wanted) < 1e-4


def test_what_is_normalised_over_one_axis_is_noted_for_the_space_on_it():
    """Both spaces are under the softmax: what only permutations commute with must not get lost on [heads, d, e]."""
    spaces = fxzip.inspect(made("across"), batches()[0][:1])
    assert all("softmax" in s.nonlinear for s in spaces if s.structure == f"{HEADS} x {DIM}")


@pytest.mark.parametrize("kind", KINDS)
def test_groups_too_large_to_be_joined_are_cut(kind, monkeypatch):
    """Heads have one order of their features then, all of them; what is left is sound."""
    monkeypatch.setattr("fxzip.infer.relations._JOINT", HEADS * DIM)
    net = made(kind)
    spaces = fxzip.inspect(net, batches()[0][:1])
    assert {s.size for s in spaces if not s.segments} == {HEADS, DIM}
    assert all(s.structure == f"{HEADS * DIM} x 1" for s in spaces if s.size == HEADS * DIM)
    assert fxzip.verify(net, batches()[0][:2]).ok
    other = fxzip.scramble(net, batches()[0][:2])
    zipped = fxzip.merge([net, other], batches(), method="permute", progress=False)
    for out in outputs(zipped, batches()[0]):
        assert far(out, outputs(net, batches()[0])) < 1e-4
