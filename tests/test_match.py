from __future__ import annotations

import pytest
import torch
from oracles import (
    features,
    moments_of,
    onehot,
    two,
)

from fxzip.errors import InputError
from fxzip.match import CCA, MATCHERS, Average, Matching, MuDSC, Pair, Permute, Select, Transport, Zip, needs, resolve

by_name = pytest.mark.parametrize("matcher", [m() for m in MATCHERS], ids=[m.name for m in MATCHERS])

LINEAR = (Select, CCA, Transport)  # their M is no grouping of features: see test_linear_matchers.py


@by_name
def test_shapes_dtype_and_averaging_scale(matcher):
    m = two(6)
    matching = matcher(m, 6)
    assert matching.merge.shape == (6, 12) and matching.unmerge.shape == (12, 6) and matching.width == 6
    assert matching.merge.dtype == matching.unmerge.dtype == torch.float64
    assert matching.blocks_merge(1).shape == (6, 6) and matching.blocks_unmerge(0).shape == (6, 6)
    if matcher.name != "cca":  # it maps features, all others average them
        torch.testing.assert_close(matching.merge.sum(1), torch.ones(6).double())
    if matcher.name != "transport":  # soft: what is merged and taken apart again is blurred
        close = {"atol": 1e-3, "rtol": 0} if matcher.name == "unmerge" else {}  # its ridge
        torch.testing.assert_close(matching.merge @ matching.unmerge, torch.eye(6).double(), **close)
    assert -1 <= matching.quality <= 1 and -1 <= matching.baseline <= 1


@by_name
def test_deterministic_and_inputs_untouched(matcher):
    m = two(7, 3)
    mean, second = m.mean.clone(), m.second.clone()
    one, other = matcher(m, 7), matcher(m, 7)
    assert torch.equal(one.merge, other.merge) and torch.equal(one.unmerge, other.unmerge)
    assert torch.equal(m.mean, mean) and torch.equal(m.second, second)


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("matcher", [m() for m in MATCHERS if m not in LINEAR], ids=lambda m: m.name)
def test_identical_models_give_the_identity(matcher, dead):
    x = features(8, 1)
    if dead:
        x[:, [2, 5]] = 0
        x[:, 6] = 0.3
    matching = matcher(moments_of(x, x), 8)
    eye = torch.eye(8).double()
    assert torch.equal(matching.merge, torch.cat([eye, eye], 1) / 2)
    assert torch.equal(matching.unmerge, torch.cat([eye, eye]))
    assert matching.quality == pytest.approx(1) and matching.baseline == pytest.approx(1)


@pytest.mark.parametrize("matcher", [m() for m in MATCHERS if m not in (*LINEAR, Average)], ids=lambda m: m.name)
def test_a_permuted_copy_gives_the_permutation(matcher):
    x = features(9, 2)
    x[:, 4] = 0
    p = torch.randperm(9, generator=torch.Generator().manual_seed(5))
    matching = matcher(moments_of(x, x[:, p]), 9)
    assert torch.equal(matching.blocks_merge(0), torch.eye(9).double() / 2)
    assert torch.equal(matching.blocks_unmerge(1), onehot(p, 9))
    assert matching.quality == pytest.approx(1) and matching.baseline < 0.9


@pytest.mark.parametrize("matcher", [Average(), Permute()], ids=lambda m: m.name)
def test_three_identical_models_give_the_identity(matcher):
    x = features(6, 1)
    assert torch.equal(matcher(moments_of(x, x, x), 6).merge, torch.eye(6).double().repeat(1, 3) / 3)


def test_select_rebuilds_identical_models_exactly():
    x = features(8, 1, relu=False)
    matching = Select(ridge=0.0)(moments_of(x, x), 8)
    torch.testing.assert_close(matching.unmerge, torch.cat([torch.eye(8)] * 2).double(), atol=1e-6, rtol=0)


@by_name
def test_dead_features_never_give_nan(matcher):
    x = features(12, 4)
    x[:, [0, 3, 7]] = 0
    x[:, 9] = 2.5
    for blocks in ((x[:, :6], x[:, 6:]), (x * 0, x * 0 + 1)):
        matching = matcher(moments_of(*blocks), blocks[0].shape[1])
        assert matching.merge.isfinite().all() and matching.unmerge.isfinite().all()


@by_name
def test_wrong_widths_are_refused(matcher):
    with pytest.raises(InputError, match=r"^(permute|zip|" + matcher.name + "): the width must be"):
        matcher(two(4), 9)


@pytest.mark.parametrize("matcher", [Zip(), Zip(1.0, 1.0), Pair(), Select()], ids=repr)
@pytest.mark.parametrize("width", [1, 3, 6, 9, 12])
def test_free_matchers_take_any_width(matcher, width):
    matching = matcher(two(6), width)
    assert matching.merge.shape == (width, 12)
    assert torch.linalg.matrix_rank(matching.merge) == width
    if width == 12:
        torch.testing.assert_close(matching.unmerge @ matching.merge, torch.eye(12).double())


def test_a_single_model_is_kept_as_it_is():
    for matcher in (Average(), Permute(), Zip()):
        assert torch.equal(matcher(moments_of(features(5)), 5).merge, torch.eye(5).double())


def test_a_matcher_need_not_say_what_it_needs():
    """It gets moments, then."""

    class Own:
        name = paper = "own"
        correspondence = "identity"

        def __call__(self, moments, width):
            return Average()(moments, width)

    own = resolve(Own())
    assert needs(own) == {"moments"} and needs(Permute()) == {"similarity"} and not needs(Average())
    with pytest.raises(InputError, match="MuDSC: the matcher must work on similarities"):
        MuDSC(matcher=own)


def test_resolve():
    assert resolve("zip") == Zip(0.3, 0.125) and resolve(Zip(beta=1.0)) == Zip(beta=1.0)
    with pytest.raises(InputError, match="method 'zpi'; did you mean 'zip'\\? Methods: average, rebasin"):
        resolve("zpi")
    with pytest.raises(InputError, match=r"unknown method 'quux'\. Methods: average, .*, mudsc, select, unmerge\."):
        resolve("quux")
    with pytest.raises(InputError, match=r"is the class Zip; pass an object: Zip\(\)"):
        resolve(Zip)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="must be a name or a matcher, not 3"):
        resolve(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [{"alpha": 0.0}, {"alpha": 1.5}, {"beta": -1.0}, {"beta": float("nan")}])
def test_zip_settings_are_checked(bad):
    with pytest.raises(InputError, match=f"Zip: {next(iter(bad))} must be"):
        Zip(**bad)


def test_matching_checks_its_shapes():
    with pytest.raises(InputError, match=r"need merge \[m, 3\] and unmerge \[3, m\]"):
        Matching(torch.zeros(2, 4), torch.zeros(4, 2), (1, 2))
    with pytest.raises(InputError, match="NaN or Inf"):
        Matching(torch.full((1, 2), float("nan")), torch.zeros(2, 1), (1, 1))
