from __future__ import annotations

import inspect
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fxzip.errors import InputError
from fxzip.measure import read_batches
from fxzip.measure.collect import _accumulator
from fxzip.measure.moments import FORMAT, Accumulator, Moments, SpaceMoments, balanced


@pytest.fixture
def rows():
    return torch.randn(500, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1


def test_streaming_equals_numpy(rows):
    a = Accumulator((2, 3))
    for part in rows.split(77):
        a.add(part)
    m, x = a.moments(), rows.double().numpy()
    assert m.count == 500 and m.sizes == (2, 3) and m.offsets == (0, 2, 5)
    np.testing.assert_allclose(m.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(m.second, x.T @ x / 500, rtol=1e-12)
    np.testing.assert_allclose(m.covariance(), np.cov(x.T, bias=True), rtol=1e-9)
    np.testing.assert_allclose(m.correlation(), np.corrcoef(x.T), rtol=1e-9)


def test_any_dtype_is_accumulated_in_float64_without_touching_the_rows(rows):
    half, before = rows.half(), rows.half().clone()
    a = Accumulator((5,))
    a.add(half)
    assert a.moments().second.dtype == torch.float64 and torch.equal(half, before)
    np.testing.assert_allclose(a.moments().mean, half.double().mean(0), rtol=1e-12)


def test_moments_do_not_follow_later_rows(rows):
    a = Accumulator((5,))
    a.add(rows)
    first = a.moments()
    mean = first.mean.clone()
    a.add(rows + 1)
    assert torch.equal(first.mean, mean)


def test_dead_and_constant_features_have_no_correlation_and_never_nan(rows):
    x = torch.cat([rows, torch.zeros(500, 1), torch.full((500, 1), 1e4), torch.full((500, 1), 0.1)], 1)
    a = Accumulator((4, 4))
    a.add(x)
    m = a.moments()
    assert m.dead.tolist() == [False] * 5 + [True] * 3
    correlation = m.correlation()
    assert correlation.isfinite().all() and torch.equal(correlation.diagonal(), torch.ones(8).double())
    assert not correlation[5:, :5].any() and correlation[5, 6] == correlation[6, 7] == 0
    assert not m.covariance()[5:].any()


def test_tiny_features_are_alive():
    a = Accumulator((1, 1))
    x = torch.randn(100, 1, generator=torch.Generator().manual_seed(0))
    a.add(torch.cat([x * 1e-12, x], 1))
    assert not a.moments().dead.any()
    assert a.moments().correlation()[0, 1] == pytest.approx(1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_rows_are_refused_with_place_and_model(rows, bad):
    a = Accumulator((2, 3))
    rows = rows.clone()
    rows[3, 2] = bad
    with pytest.raises(InputError, match=r"moments at %relu_3: NaN or Inf in model 1;"):
        a.add(rows, "%relu_3")
    assert a.count == 0 and not a.gram.any()


def test_wrong_calls_are_refused(rows):
    a = Accumulator((2, 2))
    with pytest.raises(InputError, match=r"rows are \[500, 5\], not \[r, 4\]"):
        a.add(rows)
    with pytest.raises(InputError, match="no rows were seen; is the loader empty"):
        a.moments()
    with pytest.raises(InputError, match=r"sizes \(2,\) need a mean of \[2\]"):
        SpaceMoments((2,), 1.0, torch.zeros(3), torch.eye(2))
    with pytest.raises(InputError, match="NaN or Inf in the moments"):
        SpaceMoments((1,), 1.0, torch.tensor([float("nan")]), torch.eye(1))


def test_restrict_takes_features_of_each_model(rows):
    a = Accumulator((2, 3))
    a.add(rows)
    m = a.moments().restrict([np.array([1]), np.array([2, 0])])
    index = torch.tensor([1, 4, 2])
    assert m.sizes == (1, 2)
    assert torch.equal(m.mean, a.moments().mean[index])
    assert torch.equal(m.second, a.moments().second[index][:, index])


def test_balanced_weights_data_sets_equally(rows):
    a, b = Accumulator((5,)), Accumulator((5,))
    a.add(rows)
    b.add(rows[:10] * 2)
    m = balanced([a.moments(), b.moments()])
    assert m.count == 510
    torch.testing.assert_close(m.mean, (a.moments().mean + b.moments().mean) / 2)
    torch.testing.assert_close(m.second, (a.moments().second + b.moments().second) / 2)
    with pytest.raises(InputError, match="moments of one space"):
        balanced([a.moments(), SpaceMoments((1,), 1.0, torch.zeros(1), torch.eye(1))])


def test_save_and_load_are_bit_exact(rows, tmp_path):
    a = Accumulator((2, 3))
    a.add(rows)
    moments = Moments({"s0": a.moments(), "s1": a.moments().restrict([np.array([0]), np.array([1])])})
    moments.save(tmp_path / "m.safetensors")
    back = Moments.load(tmp_path / "m.safetensors")
    assert set(back) == {"s0", "s1"} and len(back) == 2
    for name, m in moments.items():
        assert back[name].sizes == m.sizes and back[name].count == m.count
        assert torch.equal(back[name].mean, m.mean) and torch.equal(back[name].second, m.second)


def test_load_refuses_other_files(tmp_path):
    with pytest.raises(InputError, match="no file"):
        Moments.load(tmp_path / "none")
    (tmp_path / "text").write_text("this is no tensor file")
    with pytest.raises(InputError, match="not a safetensors file"):
        Moments.load(tmp_path / "text")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, str(tmp_path / "other"))
    with pytest.raises(InputError, match=r"not written by Moments\.save"):
        Moments.load(tmp_path / "other")


def test_products_in_single_precision_keep_deviations_and_constants():
    """Features far from zero, a constant one, one that never fires, tiny and huge ones."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4096, 600, generator=generator).relu() + 1000 * torch.arange(600).remainder(2)
    rows[:, 3], rows[:, 5] = 0.1, 0
    for scale in (1.0, 1e-12, 1e20):  # the last in float64
        a = Accumulator((300, 300))
        for part in (rows * scale).split(512):
            a.add(part, weight=0.5)
        m = a.moments()
        exact = torch.cov((rows * scale).double().T, correction=0)
        assert m.count == 2048 and m.dead.nonzero().flatten().tolist() == [3, 5]
        assert (m.covariance() - exact).abs().max() < 1e-5 * exact.diagonal().max()


def test_out_of_memory_names_the_space():
    """More than any address space holds, so that no machine tries."""
    space: Any = SimpleNamespace(name="s7")
    message = r"out of memory: the second moments of s7 \(3000000 \+ 3000000 features\) take 288000.0 GB. Smaller batch"
    with pytest.raises(InputError, match=message):
        _accumulator(space, [3_000_000, 3_000_000], torch.device("cpu"))


def test_a_file_of_other_moments_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    for facts in ({}, {"spaces": "{"}, {"spaces": '{"s0": {}}'}, {"spaces": '{"s0": {"sizes": [2], "count": 1}}'}):
        save_file({"mean/s1": torch.ones(2)}, path, {"format": FORMAT, **facts})
        with pytest.raises(InputError, match="m.safetensors"):
            Moments.load(path)


class Refilled:
    """A loader that writes every batch into one tensor, drawn by Python, numpy and torch."""

    def __init__(self) -> None:
        self.buffer = torch.empty(4, 3)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for _ in range(3):
            self.buffer.fill_(random.random() + float(np.random.rand()))
            yield self.buffer.add_(torch.rand(4, 3))


def test_batches_of_one_buffer_are_kept_apart_and_drawn_from_the_seed():
    def read() -> list[torch.Tensor]:
        return [x for (x,) in read_batches(Refilled(), call, 12, torch.device("cpu"), seed=3)]

    call = inspect.Signature([inspect.Parameter("x", inspect.Parameter.POSITIONAL_ONLY)])
    first = read()
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    again = read()
    assert random.getstate() == before[0] and (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])
    assert len(first) == 3 and not torch.equal(first[0], first[1])
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
