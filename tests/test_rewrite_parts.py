"""Parts of rewrite against what they are by definition: dense matrices, models run by hand, odd small networks."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import randomise

import fxzip
from fxzip.errors import InputError, SpaceError
from fxzip.infer.spaces import MAKES, FeatureSpace, Segment, Spaces
from fxzip.match.matching import Matching, from_slots
from fxzip.rewrite import merge_parameters

torch.set_num_threads(1)
MODELS = 3
X = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))


class Ends(nn.Module):
    """Two layers and a head, behind which comes what a test wants."""

    def __init__(self, end) -> None:
        super().__init__()
        self.a, self.b, self.head, self.end = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3), end

    def forward(self, x: Tensor):
        return self.end(self.head(self.b(self.a(x).relu()).relu()))


def two(end) -> list[nn.Module]:
    return [randomise(Ends(end), seed).eval() for seed in range(2)]


@pytest.mark.parametrize("weights", [None, [3, 1]])
@pytest.mark.parametrize(
    "end, said",
    [
        (lambda y: y.argmax(1), "%argmax is int64"),
        (lambda y: (y, y > 0, y.int()), "%gt is bool, %int_1 is int32"),
    ],
)
def test_no_mean_of_indices_or_truth_values(end, said, weights):
    with pytest.raises(InputError, match=f"cannot average indices or truth values, and of the outputs {said};"):
        fxzip.merge(two(end), [X], heads="average", model_weights=weights, progress=False)


@pytest.mark.parametrize("heads", ["average", "concat"])
@pytest.mark.parametrize(
    "end, said", [(lambda y: y.split([1, 2], 1), "%split is of type tuple"), (lambda y: (y, y.shape[0]), "of type int")]
)
def test_outputs_are_joined_one_by_one(end, said, heads):
    with pytest.raises(InputError, match=f'heads="{heads}" needs outputs that are tensors one by one, but .*{said};'):
        fxzip.merge(two(end), [X], heads=heads, progress=False)


@pytest.mark.parametrize("end", [lambda y: (y, y > 0), lambda y: (y > 0) * 2.0])
def test_a_head_behind_which_truth_values_come_is_fitted_itself(end):
    """Nothing to refine there, and who gets the scores reads them, too."""
    nets = two(end)
    plain, compared = (fxzip.merge(n, [X], progress=False) for n in (two(lambda y: y), nets))
    for i in range(2):
        name = f"head_task{i}"
        torch.testing.assert_close(compared.get_submodule(name).weight, plain.get_submodule(name).weight)


# ---- boundary values and weights that are not real numbers


class Late(nn.Module):
    """A layer, what a test makes of it, and a head."""

    def __init__(self, make) -> None:
        super().__init__()
        self.a, self.make, self.head = nn.Linear(4, 8), make, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.make(self.a(x)))


class Complex(nn.Module):
    """Two complex layers between two real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(4, 8), nn.Linear(5, 3)
        self.w, self.v, self.b = (nn.Parameter(torch.randn(s, dtype=torch.complex64)) for s in ((8, 6), (5, 6), (6,)))

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x).relu().to(torch.complex64) @ self.w + self.b
        z = z * z.abs().sigmoid()
        return self.head((z @ self.v.T).abs())


def copies(model: nn.Module) -> list[nn.Module]:
    other = fxzip.scramble(model, X)
    assert not torch.equal(other.a.weight, model.a.weight)
    return [model.eval(), other.eval()]


@pytest.mark.parametrize("method", ["permute", "solve"])
@pytest.mark.parametrize(
    "make, until",
    [
        (lambda h: (h > 0).float(), "float_1"),
        (lambda h: torch.where(h > 0, 1.0, -0.5), "where"),
        (lambda h: (10 * h).long().float(), "float_1"),
        (lambda h: torch.complex(h, h.sin()).abs(), "abs_1"),
        (lambda h: torch.complex(h * 0, h).abs(), "abs_1"),
    ],
    ids=["bool", "where", "integers", "complex", "imaginary"],
)
def test_features_behind_the_cut_are_read_whatever_their_dtype(make, until, method):
    nets = copies(randomise(Late(make), 1))
    for y in fxzip.merge(nets, [X], until=until, method=method, progress=False)(X):
        torch.testing.assert_close(y, nets[0](X), atol=1e-3, rtol=1e-3)


def test_mixtures_of_truth_values_are_refused():
    nets = [randomise(Late(lambda h: (h > 0).float()), seed).eval() for seed in range(2)]
    with pytest.raises(SpaceError, match="%gt is bool and its merged features are mixtures, so the cut cannot be here"):
        fxzip.merge(nets, [X], until="float_1", method="cca", progress=False)


@pytest.mark.parametrize("method", ["permute", "solve", "select", "rebasin", "c2m3", "cca", "average"])
@pytest.mark.parametrize("until", [None, "matmul_1"])
def test_complex_weights(until, method):
    """The proof, matching by data, by weights and by readers, solve, and what heads absorb."""
    torch.manual_seed(1)
    model = Complex()
    nets = copies(model) if method != "average" else [model, copy.deepcopy(model)]
    for y in fxzip.merge(nets, [X], until=until, method=method, progress=False)(X):
        torch.testing.assert_close(y, model(X), atol=1e-3, rtol=1e-3)


def test_complex_outputs_are_proven():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), Fourier())
    assert fxzip.verify(model, X[:4])


class Fourier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x)


class Times(nn.Module):
    """A layer times a whole number that is in the checkpoint, a norm that counts batches, and a head."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.a, self.norm, self.head = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.register_buffer("k", torch.tensor(k))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.a(x) * self.k).relu())


def test_whole_numbers_that_differ_are_refused_and_counters_are_not():
    one, other = (randomise(Times(k), 0).eval() for k in (2, 3))
    with pytest.raises(InputError, match="k holds other integers in task1 than in task0: a mean has no meaning"):
        fxzip.merge([one, other], [X], method="average", progress=False)
    other.k.fill_(2)
    other.norm.num_batches_tracked += 5
    zipped = fxzip.merge([one, other], [X], method="permute", progress=False)
    torch.testing.assert_close(zipped(X)[1], other(X), atol=1e-4, rtol=1e-4)


# ---- parameters against dense matrices, one per axis


def random_spaces(draw: np.random.Generator, axes: int) -> tuple[list[int], dict[int, list]]:
    """Sizes of a parameter, and per axis its spaces: (name, positions, roles). Some entries belong to none."""
    shape, held = [], {}
    for axis in range(axes):
        sizes, rest = draw.integers(1, 4, size=draw.integers(0, 3)), draw.integers(0, 3)
        shape.append(max(int(sizes.sum() + rest), 1))
        order, ends = draw.permutation(shape[-1]), np.cumsum(sizes)
        roles = draw.choice(["produce", "consume", "vector", "produce consume"], size=len(sizes))
        held[axis] = [
            (f"s{axis}{k}", order[end - n : end], frozenset(str(role).split()))
            for k, (end, n, role) in enumerate(zip(ends, sizes, roles, strict=True))
        ]
    return shape, held


def random_matching(draw: np.random.Generator, n: int) -> Matching:
    if draw.random() < 0.5:
        return from_slots(np.concatenate([draw.permutation(n) for _ in range(MODELS)]), n, (n,) * MODELS)
    merge, unmerge = draw.normal(size=(n, n * MODELS)), draw.normal(size=(n * MODELS, n))
    return Matching(torch.from_numpy(merge), torch.from_numpy(unmerge), (n,) * MODELS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32, torch.bfloat16])
def test_merged_parameters_are_sums_of_products(dtype):
    """M_i along the first axis that makes features, U_i^T along others, the share where neither sums over models."""
    for seed in range(60):
        draw = np.random.default_rng(seed)
        torch.manual_seed(seed)
        shape, held = random_spaces(draw, axes=seed % 3 + 1)
        matchings = {name: random_matching(draw, len(at)) for every in held.values() for name, at, _ in every}
        shares = tuple(draw.dirichlet(np.ones(MODELS))) if seed % 2 else (1 / MODELS,) * MODELS
        making = min((a for a, every in held.items() if any(roles & MAKES for _, _, roles in every)), default=None)
        weights = [torch.randn(shape, dtype=torch.complex128 if dtype.is_complex else None).to(dtype) for _ in shares]
        want = torch.zeros(shape, dtype=torch.complex128)
        for i, share in enumerate(shares):
            x = weights[i].to(torch.complex128)
            for axis, every in held.items():
                factor = share if axis == making else 1.0
                dense = factor * torch.eye(shape[axis], dtype=torch.float64)
                for name, at, roles in every:
                    m, p = matchings[name], torch.from_numpy(at.copy())
                    sums = axis == making and roles & MAKES
                    dense[p[:, None], p] = m.blocks_merge(i) if sums else m.blocks_unmerge(i).T * factor
                x = torch.tensordot(dense.to(x.dtype), x, ([1], [axis])).movedim(0, axis)
            want += x if making is not None else x * share
        spaces = tuple(
            FeatureSpace(name, len(at), segments=(Segment("w", axis, at, roles),))
            for axis, every in held.items()
            for name, at, roles in every
        )
        before = [w.clone() for w in weights]
        lowered = cast(Any, SimpleNamespace(tied={}))
        states = [{"w": w} for w in weights]
        found = merge_parameters(
            states, Spaces(spaces, (), (), frozenset(), lowered), matchings, ["w"], shares if seed % 2 else None
        )["w"]
        torch.testing.assert_close(found, want.to(dtype) if dtype.is_complex else want.real.to(dtype))
        assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
