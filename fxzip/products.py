"""Products of float32 matrices by oneDNN, which comes with torch and is on some processors far ahead of its BLAS.

On an AMD EPYC torch's MKL reaches 100 GFLOP/s a core, OpenBLAS 120, oneDNN 200 to 240. What torch gives to MKL, linear
layers among it, is therefore multiplied here, in the same precision, by the operator that torch.compile takes for
linear layers. Elsewhere, and for what is small, in another dtype or on another device, it is torch's own product; on
Intel's processors, too, where MKL is as fast, and does not copy a transposed operand first.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 1 << 22  # multiplications, below which starting oneDNN costs more than it saves
THIN = 8  # columns or rows, below which it is no product of matrices


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b: [..., m, k] @ [..., k, n] -> [..., m, n], of the same leading axes, or none.

    >>> a, b = torch.randn(200, 300), torch.randn(300, 100); torch.allclose(product(a, b), a @ b, atol=1e-4)
    True
    """
    if not _onednn(a, b, (a.shape[-2], *b.shape[-2:])) or a.shape[:-2] != b.shape[:-2]:
        return a @ b
    if a.dim() == 2:
        return _linear(a, b.mT, None)
    found = a.new_empty(*a.shape[:-1], b.shape[-1])
    for to, x, y in zip(*(t.flatten(0, -3) for t in (found, a, b)), strict=True):
        to.copy_(_linear(x, y.mT, None))
    return found


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: [..., k], [n, k], [n] -> [..., n]."""
    shape = (input.numel() // max(input.shape[-1], 1), *weight.shape) if weight.dim() == 2 and input.dim() > 1 else ()
    if not _onednn(input, weight, shape) or (bias is not None and bias.dtype != weight.dtype):
        return F.linear(input, weight, bias)
    return _linear(input, weight, bias)


def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, **scales: Any) -> Tensor:
    """`torch.addmm`: [n], [m, k], [k, n] -> [m, n]."""
    plain = input.dim() == 1 and len(input) == mat2.shape[1] and not scales
    return linear(mat1, mat2.mT, input) if plain else torch.addmm(input, mat1, mat2, **scales)


def exact() -> bool:
    """Whether torch multiplies float32 as float32."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # asked so since a backend has its own setting (fp32_precision), which is not "highest"
        return False


def _onednn(a: Tensor, b: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether oneDNN is to multiply a and b, three axes of `shape` in all."""
    if len(shape) != 3 or min(shape) < THIN or shape[0] * shape[1] * shape[2] < LEAST:
        return False
    plain = all(type(x) in (Tensor, torch.nn.Parameter) and x.dtype is torch.float32 and x.is_cpu for x in (a, b))
    return plain and not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)) and _there()


def _there() -> bool:
    return _built() and bool(torch.backends.mkldnn.enabled)


@cache
def _built() -> bool:
    x86 = platform.machine().lower() in ("x86_64", "amd64") and not _intel()
    if not (x86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    x, w, b = (torch.arange(n, dtype=torch.float32).view(s) for n, s in ((12, (3, 4)), (8, (2, 4)), (2, (2,))))
    try:  # an operator without promises: whether it does what it did
        return torch.equal(_linear(x, w, b), F.linear(x, w, b))  # of small integers, exact in any order
    except (RuntimeError, TypeError):
        return False


def _intel() -> bool:
    """Whether this is one of the processors that MKL is written for, as Linux and Windows tell."""
    told = Path("/proc/cpuinfo")
    return "GenuineIntel" in (told.read_text() if told.exists() else platform.processor())


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # Of some operands that are not dense oneDNN takes a thousand times as long: 512 columns of 4,096, say.
    if not (weight.is_contiguous() or weight.mT.is_contiguous()):
        weight = weight.contiguous()
    input = input.contiguous()
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
