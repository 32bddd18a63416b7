"""Products by oneDNN are torch's, but for the order of their sums; what oneDNN is not for is left to torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxzip import products
from fxzip.products import addmm, linear, product

SHAPES = [(200, 300, 100), (64, 2048, 27), (2048, 512, 10), (3, 900, 900), (5, 7, 3), (0, 4, 5), (4, 0, 5)]


@pytest.fixture
def by_onednn(monkeypatch) -> Iterator[list[tuple[int, ...]]]:
    """The shapes that were given to it, on Intel's processors too."""
    monkeypatch.setattr(products, "_intel", lambda: False)
    products._built.cache_clear()
    if not products._there():
        pytest.skip("this torch has no oneDNN, or this is not an x86-64")
    seen, own = [], products._linear
    monkeypatch.setattr(products, "_linear", lambda x, w, b: (seen.append((*x.shape, len(w))), own(x, w, b))[1])
    yield seen
    products._built.cache_clear()


def draw(*shape: int, lying: bool = False, **options) -> Tensor:
    """Normal numbers; `lying`: the last two axes are swapped in memory."""
    g = torch.Generator().manual_seed(len(shape) + sum(shape))
    x = torch.randn(*shape, generator=g, **options)
    return x.mT.contiguous().mT if lying else x


def close(found: Tensor, a: Tensor, b: Tensor, bias: Tensor | float = 0.0) -> None:
    wanted = a.double() @ b.double() + bias
    assert found.dtype == a.dtype and found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-5 * a.shape[-1] ** 0.5 * 5 if found.numel() else True


@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3)])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("m, k, n", SHAPES)
def test_product(m, k, n, lead, first, second):
    a, b = draw(*lead, m, k, lying=first), draw(*lead, k, n, lying=second)
    close(product(a, b), a, b)


def test_large_ones_go_to_onednn_and_others_do_not(by_onednn):
    a, b = draw(200, 300), draw(300, 100)
    product(a, b)
    product(draw(2, 200, 300), draw(2, 300, 100))
    assert by_onednn == [(200, 300, 100)] * 3
    by_onednn.clear()
    product(a[:4], b)  # thin
    product(a[:20], b)  # small
    product(a.double(), b.double())
    product(a.bfloat16(), b.bfloat16())
    product(a, draw(2, 300, 100))  # axes that broadcast
    product(a.to("meta"), b.to("meta"))
    assert by_onednn == []


def test_on_intel_s_processors_they_are_torch_s_own(by_onednn, monkeypatch):
    monkeypatch.setattr(products, "_intel", lambda: True)
    products._built.cache_clear()
    a, b = draw(200, 300), draw(300, 100)
    assert torch.equal(product(a, b), a @ b) and torch.equal(linear(a, b.mT), F.linear(a, b.mT))
    assert by_onednn == []


def test_slices_of_wide_matrices_are_copied_first(by_onednn, monkeypatch):
    """oneDNN takes a thousand times as long for some of those."""
    dense = []
    own = torch.ops.mkldnn._linear_pointwise
    watch = lambda x, w, *rest: (dense.append((x.is_contiguous(), w.is_contiguous())), own(x, w, *rest))[1]  # noqa: E731
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", watch)
    x = draw(341, 4096)
    close(product(x[:, 512:1024].T, x[:, :1024]), x[:, 512:1024].T, x[:, :1024])
    assert dense == [(True, True)]


def test_gradients_pass_as_ever(by_onednn):
    a, b = draw(200, 300).requires_grad_(), draw(300, 100)
    product(a, b).sum().backward()
    assert a.grad is not None and torch.allclose(a.grad, b.sum(1).expand(200, 300), atol=1e-4) and by_onednn == []
    with torch.no_grad():
        assert not product(a, b).requires_grad and by_onednn == [(200, 300, 100)]


def test_switched_off_with_torch_s_own_switch(by_onednn):
    with torch.backends.mkldnn.flags(enabled=False):
        product(draw(200, 300), draw(300, 100))
    assert by_onednn == []


@pytest.mark.parametrize("lead", [(200,), (2, 100), (3, 7, 30)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(lead, bias, by_onednn):
    x, w, b = draw(*lead, 300), draw(100, 300), draw(100) if bias else None
    close(linear(x, w, b), x, w.T, 0.0 if b is None else b)
    assert len(by_onednn) == 1


@pytest.mark.parametrize("make", [lambda x: x[:, ::2], lambda x: x.expand(3, 200, 300), lambda x: x.transpose(0, 1)])
def test_linear_of_strided_inputs(make, by_onednn):
    x = make(draw(200, 300) if make(draw(200, 300)).shape != (300, 200) else draw(300, 200))
    w = draw(300, x.shape[-1])
    close(linear(x, w), x, w.T)
    assert by_onednn


def test_linear_of_a_vector_and_of_nothing():
    w = draw(3000, 1000)
    assert torch.equal(linear(x := draw(1000), w), F.linear(x, w))
    assert linear(draw(0, 1000), w).shape == (0, 3000)


def test_addmm(by_onednn):
    a, b, c = draw(200, 300), draw(300, 100, lying=True), draw(100)
    close(addmm(c, a, b), a, b, c)
    assert len(by_onednn) == 1
    close(addmm(c, a, b, beta=2.0), a, b, 2 * c)
    close(addmm(c[:1], a, b), a, b, c[:1])
    close(addmm(whole := draw(200, 100), a, b), a, b, whole)
    assert len(by_onednn) == 1


def test_mixed_dtypes_are_refused_as_by_torch():
    with pytest.raises(RuntimeError, match="dtype"):
        product(draw(200, 300), draw(300, 100, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="dtype"):
        linear(draw(200, 300), draw(100, 300), draw(100, dtype=torch.float64))


def test_nan_and_inf_come_through(by_onednn):
    a, b = draw(200, 300), draw(300, 100)
    a[3, 5], a[4, 5] = float("nan"), float("inf")
    found = product(a, b)
    assert found[3].isnan().all() and not found[4].isfinite().any() and found[5].isfinite().all() and by_onednn
