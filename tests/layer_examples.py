"""One case per op that contracts or normalises with weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from op_examples import Case, case
from torch import Tensor, nn

aten = torch.ops.aten


_CONTRACT = [
    case("features", "mm", lambda m, h: torch.mm(h, m.w), 4, w=(8, 4)),
    case("tokens", "bmm", lambda m, h: torch.bmm(torch.bmm(h, h.mT).relu(), h)),
    case("features", "mv", lambda m, h: torch.mv(h, m.w)[:, None], 1, w=(8,)),
    case("features", "dot", lambda m, h: h * torch.dot(h[0], m.w), w=(8,)),
    case("features", "vdot", lambda m, h: h * torch.vdot(h[0], m.w), w=(8,)),
    case("features", "addmm", lambda m, h: torch.addmm(m.b, h, m.w), 4, w=(8, 4), b=(4,)),
    case(
        "features",
        "_addmm_activation",
        lambda m, h: aten._addmm_activation(m.b, h, m.w, use_gelu=True),
        4,
        w=(8, 4),
        b=(4,),
    ),
    case("tokens", "baddbmm", lambda m, h: torch.baddbmm(m.b, h, h.mT) @ h, b=(1, 5, 5)),
    case("tokens", "addbmm", lambda m, h: torch.addbmm(m.b, h.mT, h), b=(8, 8)),
    case("features", "addmv", lambda m, h: h * torch.addmv(h[0], m.w, h[0]), w=(8, 8)),
    case("features", "addr", lambda m, h: torch.addr(m.b, h[0], m.w(h)[0]), 4, b=(8, 4), w=nn.Linear(8, 4)),
    case("tokens", "linear", lambda m, h: F.linear(h, m.w, m.b), 4, w=(4, 8), b=(4,)),
    case("features", "linear of a vector", lambda m, h: F.linear(h, m.w)[:, None], 1, w=(8,)),
    case("features", "_trilinear", lambda m, h: m.bilinear(h, h.tanh()), 4, bilinear=nn.Bilinear(8, 8, 4)),
    case("tokens", "_cdist_forward", lambda m, h: torch.cdist(h, m.w, p=1.0), 4, w=(4, 8)),
    case(
        "tokens",
        "_euclidean_dist",
        lambda m, h: torch.cdist(h, m.w, compute_mode="use_mm_for_euclid_dist"),
        4,
        w=(4, 8),
    ),
    case(
        "tokens",
        "_scaled_dot_product_flash_attention_for_cpu",
        lambda m, h: _attention(m, h, False),
        qkv=nn.Linear(8, 24),
    ),
    case("tokens", "causal attention", lambda m, h: _attention(m, h, True), qkv=nn.Linear(8, 24)),
    case("tokens", "causal latents", lambda m, h: _latents(m, h, True), z=(1, 4, 8), qkv=nn.Linear(8, 24)),
    case("tokens", "latents", lambda m, h: _latents(m, h, False), z=(1, 4, 8), qkv=nn.Linear(8, 24)),
    case("tokens", "biased heads", lambda m, h: _attention(m, h, False, m.w), w=(1, 2, 5, 5), qkv=nn.Linear(8, 24)),
    case("tokens", "shared heads", lambda m, h: _grouped_attention(m.qkv(h)), 16, qkv=nn.Linear(8, 24)),
    case("tokens", "lora", lambda m, h: F.linear(h, m.w + m.b @ m.a), 6, w=(6, 8), b=(6, 2), a=(2, 8)),
    case("tokens", "learned queries", lambda m, h: m.k(m.q) @ h.mT @ h, q=(4, 6), k=nn.Linear(6, 8)),
]


def _attention(m: Any, h: Tensor, causal: bool, mask: Tensor | None = None) -> Tensor:
    q, k, v = m.qkv(h).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
    out = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask)[0]
    return out.transpose(1, 2).flatten(2)


def _latents(m: Any, h: Tensor, causal: bool) -> Tensor:
    return _attention(m, m.z * h.mean(1, keepdim=True), causal).tanh().sum(1)


def _grouped_attention(qkv: Tensor) -> Tensor:
    """Eight heads of queries share two of keys and values."""
    q, k, v = (x.unflatten(2, (-1, 2)).transpose(1, 2) for x in qkv.split([16, 4, 4], 2))
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0].transpose(1, 2).flatten(2)


_CONV = [
    case("signal", "convolution 1d", lambda m, h: m.conv(h), 4, conv=nn.Conv1d(8, 4, 3)),
    case(
        "image", "convolution strided", lambda m, h: m.conv(h), 4, conv=nn.Conv2d(8, 4, 3, 2, 1, bias=False)
    ),
    case("volume", "convolution 3d", lambda m, h: m.conv(h), 4, conv=nn.Conv3d(8, 4, (3, 1, 1))),
    case("image", "convolution grouped", lambda m, h: m.conv(h), 4, conv=nn.Conv2d(8, 4, 3, groups=2)),
    case("image", "convolution depthwise", lambda m, h: m.conv(h), 16, conv=nn.Conv2d(8, 16, 3, groups=8)),
    case("image", "convolution transposed", lambda m, h: m.conv(h), 4, conv=nn.ConvTranspose2d(8, 4, 2, 2)),
    case(
        "image",
        "convolution transposed grouped",
        lambda m, h: m.conv(h),
        4,
        conv=nn.ConvTranspose2d(8, 4, 2, 2, groups=2),
    ),
    case(
        "tokens",
        "convolution along features",
        lambda m, h: h * m.conv(h).amax(2, keepdim=True),
        conv=nn.Conv1d(5, 5, 3),
    ),
    case("tokens", "convolution over features", lambda m, h: m.conv(h), conv=nn.Conv1d(5, 7, 1)),
]

def _normalised(m: Any, h: Tensor) -> Tensor:
    return aten._native_batch_norm_legit_no_training(h, m.w, m.b, m.mean, m.var, 0.1, 1e-5)[0]


_NORM = [
    case("image", "native_batch_norm", lambda m, h: m.norm(h).relu(), norm=nn.BatchNorm2d(8)),
    case(
        "image", "native_batch_norm samples", lambda m, h: m.norm(h), norm=nn.InstanceNorm2d(8, affine=True)
    ),
    case(
        "features",
        "_native_batch_norm_legit_no_training",
        lambda m, h: _normalised(m, h),
        w=(8,),
        b=(8,),
        mean=torch.randn(8),
        var=torch.rand(8) + 0.5,
    ),
    case(
        "tokens",
        "_native_batch_norm_legit",
        lambda m, h: aten._native_batch_norm_legit(h, m.w, m.b, True, 0.1, 1e-5)[0],
        w=(5,),
        b=(5,),
    ),
    case(
        "image",
        "means of a batch norm",
        lambda m, h: h * aten._native_batch_norm_legit(h, m.w, m.b, True, 0.1, 1e-5)[1][:, None, None],
        w=(8,),
        b=(8,),
    ),
    case(
        "tokens",
        "batch norm of latents",
        lambda m, h: _normalised(m, m.z * h.mean(1, keepdim=True)).tanh().sum(1),
        z=(1, 4, 8),
        w=(4,),
        b=(4,),
        mean=torch.randn(4),
        var=torch.rand(4) + 0.5,
    ),
    case("tokens", "native_layer_norm", lambda m, h: m.norm(h), norm=nn.LayerNorm(8)),
    case("image", "native_layer_norm 3d", lambda m, h: m.norm(h), norm=nn.LayerNorm([8, 6, 6])),
    case("tokens", "rms norm", lambda m, h: F.rms_norm(h, (8,), m.w), w=(8,)),
    case("image", "native_group_norm", lambda m, h: m.norm(h), norm=nn.GroupNorm(2, 8)),
    case("image", "native_group_norm plain", lambda m, h: m.norm(h), norm=nn.GroupNorm(2, 8, affine=False)),
    case("image", "local response norm", lambda m, h: F.local_response_norm(h, 3)),
    case("tokens", "_softmax", lambda m, h: h.softmax(-1) + h.softmax(1)),
    case("tokens", "_log_softmax", lambda m, h: h.log_softmax(-1)),
    case("tokens", "_safe_softmax", lambda m, h: aten._safe_softmax(h, -1)),
    case(
        "features",
        "_weight_norm_interface",
        lambda m, h: F.linear(h, aten._weight_norm_interface(m.v, m.g, 0)[0]),
        4,
        v=(4, 8),
        g=(4, 1),
    ),
]

CASES: list[Case] = [*_CONTRACT, *_CONV, *_NORM]
