"""One case per op that has no weights of its own: what stands between two layers of eight features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

aten = torch.ops.aten


@dataclass(frozen=True)
class Case:
    """What stands between two layers of `kind`: `op(module, h)`; frozen: its part that no rule covers.

    width: features of the result (0: no layer follows).
    attributes: of the module; a shape makes a parameter, a tensor a buffer, a module a child.
    """

    kind: str
    name: str
    op: Callable[[Any, Tensor], Tensor]
    width: int
    frozen: str
    attributes: dict[str, Any]


def case(
    kind: str,
    name: str,
    op: Callable[[Any, Tensor], Tensor],
    width: int = 8,
    frozen: str = "",
    **attributes: Any,
) -> Case:
    return Case(kind, name, op, width, frozen, attributes)


def _flat(h: Tensor) -> Tensor:
    return h.flatten(1)


def _mixed_twice(h: Tensor) -> Tensor:
    """Of (2, 2, 2) features: partitions by the first and second, and by the first and third index."""
    cube = h.reshape(-1, 2, 2, 2)
    return (cube.softmax(3) + cube.softmax(2)).flatten(1)


_POINTWISE = [
    case(
        "features", "tagged pointwise", lambda m, h: F.gelu(h) + torch.tanh(h) * h.clamp(min=-1).abs().sqrt()
    ),
    case("features", "where", lambda m, h: torch.where(h > 0, h, m.w), w=(8,)),
    case("features", "_prelu_kernel", lambda m, h: m.prelu(h), prelu=nn.PReLU(8)),
    case("image", "_prelu_kernel", lambda m, h: m.prelu(h), prelu=nn.PReLU(8)),
    case("features", "complex", lambda m, h: _flat(torch.view_as_real(torch.complex(h, h * h))), 16),
    case("features", "polar", lambda m, h: _flat(torch.view_as_real(torch.polar(h.abs(), h))), 16),
    case(
        "features",
        "_conj",
        lambda m, h: _flat(torch.view_as_real(torch.conj(torch.complex(h, h * h)) * 2)),
        16,
    ),
    case("features", "floor_divide", lambda m, h: torch.floor_divide(h, 0.3)),
    case("features", "hardswish", lambda m, h: F.hardswish(h)),
    case("features", "log_sigmoid_forward", lambda m, h: F.logsigmoid(h)),
    case("features", "masked_fill", lambda m, h: h.masked_fill(h > 0.2, m.v.sum()), v=(3,)),
    case("features", "rsub", lambda m, h: torch.rsub(h, m.w), w=(8,)),
    case("features", "_to_copy", lambda m, h: h + (h > 0).type_as(h)),
    case("features", "neg", lambda m, h: F.linear(h, -m.w), 4, w=(4, 8)),
    case("features", "copy", lambda m, h: torch.empty_like(h).copy_(h) + h.clone().copy_(m.w), w=(8,)),
    case("features", "fill", lambda m, h: h * h.tanh().fill_(2.0)),
    case("features", "fill pairs", lambda m, h: ((x := h.unflatten(1, (4, 2))) * x.tanh().fill_(2.0)).flatten(1)),
    case("features", "zero", lambda m, h: h + h.tanh().zero_()),
    case("features", "native_dropout", lambda m, h: torch.native_dropout(h, 0.5, False)[0]),
    case(
        "features",
        "rrelu_with_noise",
        lambda m, h: aten.rrelu_with_noise_functional(h, torch.zeros_like(h))[0],
    ),
    case(
        "features",
        "bincount",
        lambda m, h: h + torch.bincount((h[:1] > 0).flatten().long(), minlength=2).sum(),
    ),
    case("features", "bucketize", lambda m, h: h * torch.bucketize(h, m.b), b=torch.linspace(-1, 1, 4)),
    case(
        "features",
        "bucketize a scale",
        lambda m, h: h + torch.bucketize(h.mean(1, keepdim=True) * m.w, m.b),
        w=(8,),
        b=torch.linspace(-1, 1, 4),
    ),
    case("features", "searchsorted", lambda m, h: h * torch.searchsorted(m.b, h), b=torch.linspace(-1, 1, 4)),
    case("features", "histc", lambda m, h: h + torch.histc(h[:1], 8, -2, 2)),
    case(
        "features",
        "isin",
        lambda m, h: h * (1 + torch.isin((3 * h).floor(), m.b).type_as(h)),
        b=torch.arange(3.0),
    ),
    case("features", "nonzero", lambda m, h: h * torch.nonzero(h.abs() >= 0).reshape(-1, 8, 2).sum(-1)),
]

_SHAPE = [
    case("features", "reshape", lambda m, h: h.reshape(-1, 2, 4).softmax(-1).reshape(-1, 8)),
    case("features", "mixed along two axes", lambda m, h: _mixed_twice(h)),
    case("features", "mixed along two axes again", lambda m, h: _mixed_twice(m.f(_mixed_twice(h))), f=nn.Linear(8, 8)),
    case(
        "features",
        "mixed along two axes and both",
        lambda m, h: _mixed_twice(h) + h.reshape(-1, 2, 4).softmax(2).flatten(1),
    ),
    case("features", "squeeze unsqueeze", lambda m, h: h.unsqueeze(1).tanh().squeeze(1)),
    case("tokens", "permute", lambda m, h: h.permute(0, 2, 1).relu().permute(0, 2, 1)),
    case("tokens", "transpose", lambda m, h: h.mT.relu().mT),
    case("features", "t", lambda m, h: (m.w.t() * h.t()).t(), w=(1, 8)),
    case("features", "expand", lambda m, h: (h[:, :, None].expand(-1, -1, 4) * m.w).sum(2), w=(8, 4)),
    case("features", "repeat", lambda m, h: h.repeat(1, 2) * m.w, 16, w=(16,)),
    case("features", "repeat_interleave", lambda m, h: h.repeat_interleave(2, 1), 16),
    case("features", "split", lambda m, h: h.split(4, 1)[0] * h.chunk(2, 1)[1], 4),
    case(
        "features",
        "split_with_sizes",
        lambda m, h: h.split([3, 5], 1)[1] * torch.unsafe_split_with_sizes(h, [3, 5], 1)[1].tanh(),
        5,
    ),
    case(
        "features",
        "unsafe_split",
        lambda m, h: torch.unsafe_split(h, 4, 1)[0] * torch.unsafe_split(h, 4, 1)[1],
        4,
    ),
    case(
        "features",
        "unbind",
        lambda m, h: h.reshape(-1, 2, 4).unbind(1)[0].sigmoid() * h.reshape(-1, 2, 4).unbind(1)[1],
        4,
    ),
    case("features", "view_as_complex", lambda m, h: torch.view_as_complex(h.reshape(-1, 4, 2)).abs(), 4),
    case("features", "view_as_real", lambda m, h: torch.view_as_real(torch.polar(h.abs(), h)).sum(-1)),
    case("image", "pixel_shuffle", lambda m, h: F.pixel_shuffle(h, 2), 2),
    case("image", "pixel_unshuffle", lambda m, h: F.pixel_unshuffle(h, 2), 32),
    case(
        "image",
        "channel_shuffle",
        lambda m, h: m.conv(F.channel_shuffle(h, 2)),
        conv=nn.Conv2d(8, 8, 1, groups=4),
    ),
]

_INDEX = [
    case("features", "slice", lambda m, h: torch.cat([h[:, ::2], h[:, 1::2].relu()], 1)),
    case("features", "select", lambda m, h: h.reshape(-1, 2, 4).select(1, -1) + h[:, 2, None], 4),
    case("features", "flip", lambda m, h: h.flip(1) * m.w, w=(8,)),
    case("features", "flip and itself", lambda m, h: h + h.flip(1)),
    case("features", "roll", lambda m, h: h.roll(2, 1) + m.w, w=(8,)),
    case("tokens", "roll flat", lambda m, h: h.roll(8).tanh()),
    case("features", "index_select", lambda m, h: h.index_select(1, m.i), 5, i=torch.tensor([0, 7, 7, 2, 3])),
    case(
        "features",
        "index const",
        lambda m, h: h[:, m.i].amax(2),
        4,
        i=torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]]),
    ),
    case("tokens", "index by data", lambda m, h: h[:, h.mean((0, 2)).argsort()]),
    case("tokens", "index two", lambda m, h: h[:, m.i, m.i], 3, i=torch.tensor([0, 2, 4])),
    case(
        "image",
        "index two adjacent",
        lambda m, h: h * h[:, :, m.i, m.i].sum(2)[:, :, None, None],
        i=torch.tensor([0, 2, 4]),
    ),
    case(
        "image",
        "index two apart",
        lambda m, h: h * h.transpose(1, 2)[:, m.i, :, m.i].sum(0)[:, :, None, None],
        i=torch.tensor([0, 2, 4]),
    ),
    case("features", "argmax of votes", lambda m, h: h * h.reshape(-1, 4, 2).mean(2).argmax(1, keepdim=True)),
    case("features", "max of votes", lambda m, h: h * h.reshape(-1, 4, 2).mean(2).max(1, keepdim=True)[1]),
    case("features", "tril", lambda m, h: h.unflatten(1, (4, 2)).tril().flatten(1)),
    case(
        "features", "index mask", lambda m, h: h[:, m.k], 3, k=torch.tensor([1, 0, 0, 1, 0, 1, 0, 0]).bool()
    ),
    case("features", "index mask of weights", lambda m, h: h * h[:, m.w > 0].amax(1, keepdim=True), w=(8,)),
    case(
        "image",
        "_unsafe_index",
        lambda m, h: aten._unsafe_index(h, [None, None, m.i]),
        i=torch.tensor([0, 2, 2]),
    ),
    case("features", "embedding", lambda m, h: h + m.table((h[:, 0] > 0).long()), table=nn.Embedding(4, 8)),
    case(
        "features",
        "embedding of features",
        lambda m, h: h + m.table((h > 0).long()).tanh().sum(2),
        table=nn.Embedding(4, 3),
    ),
    case("tokens", "gather", lambda m, h: h.gather(1, h.argsort(1))),
    case("tokens", "index_add", lambda m, h: h.index_add(1, m.i, h[:, :2]), i=torch.tensor([3, 0])),
    case("tokens", "index_add by features", lambda m, h: h.index_add(1, (h[0, 0, :2] > 0).long(), h[:, :2])),
    case(
        "tokens",
        "index_copy",
        lambda m, h: h.index_copy(1, m.i, m.w.expand_as(h[:, :2])),
        i=torch.tensor([3, 0]),
        w=(1, 2, 8),
    ),
    case(
        "tokens",
        "index_reduce",
        lambda m, h: h.index_reduce(1, m.i, h[:, :2] * 2, "amax"),
        i=torch.tensor([3, 0]),
    ),
    case("tokens", "index_fill", lambda m, h: h.index_fill(1, m.i, 0.5), i=torch.tensor([3, 0])),
    case("features", "index_fill", lambda m, h: h.index_fill(1, m.i, 0.5), i=torch.tensor([3, 0])),
    case("tokens", "index_fill by features", lambda m, h: h.index_fill(1, (h[0, 0] > 0).long(), 0.5)),
    case("tokens", "scatter", lambda m, h: torch.scatter(h, 1, h.argsort(1), h * 2)),
    case(
        "tokens",
        "gather features",
        lambda m, h: h * h.gather(2, m.i.expand_as(h[:, :, :3])).amax(2, keepdim=True),
        i=torch.tensor([[[0, 7, 7]]]),
    ),
    case(
        "tokens",
        "scatter features",
        lambda m, h: h * torch.scatter(h, 2, m.i.expand_as(h[:, :, :3]), 3.0).prod(2, keepdim=True),
        i=torch.tensor([[[0, 7, 6]]]),
    ),
    case("tokens", "scatter value", lambda m, h: torch.scatter(h, 1, h.argmax(1, keepdim=True), 3.0)),
    case("tokens", "scatter_add", lambda m, h: torch.scatter_add(h, 1, h.argsort(1), h * 2)),
    case("tokens", "scatter_reduce", lambda m, h: torch.scatter_reduce(h, 1, h.argsort(1), h * 2, "amax")),
]

_JOIN = [
    case("features", "cat", lambda m, h: torch.cat([h, m.other(h), h], 1), 20, other=nn.Linear(8, 4)),
    case(
        "tokens", "cat tokens", lambda m, h: torch.cat([m.cls.expand(h.size(0), -1, -1), h], 1), cls=(1, 1, 8)
    ),
    case(
        "tokens",
        "cat heads",
        lambda m, h: torch.cat([h.unflatten(2, (4, 2)), h.unflatten(2, (4, 2)).relu()], 3).flatten(2),
        16,
    ),
    case(
        "features",
        "cat heads of two",
        lambda m, h: torch.cat([h.unflatten(1, (4, 2)), m.other(h).unflatten(1, (4, 2))], 2).flatten(1),
        16,
        other=nn.Linear(8, 8),
    ),
    case(
        "features",
        "cat halves and their means",
        lambda m, h: torch.cat([x := h.unflatten(1, (2, 4)), x.mean(2, keepdim=True)], 2).flatten(1),
        10,
    ),
    case("features", "cat constant", lambda m, h: torch.cat([h, torch.zeros_like(h)[:, :3]], 1), 11),
    case(
        "features",
        "stack",
        lambda m, h: torch.stack([h, m.other(h)], 2).flatten(1),
        16,
        other=nn.Linear(8, 8),
    ),
    case("features", "stack pairs", lambda m, h: torch.stack([-h[:, 1::2], h[:, ::2]], 2).flatten(1) + h),
    case("image", "constant_pad_nd", lambda m, h: F.pad(h, (1, -1, 0, 1, 2, 3)), 13),
    case("features", "constant_pad_nd crop", lambda m, h: F.pad(h, (-2, 1), value=0.5), 7),
    case(
        "features",
        "slice_scatter",
        lambda m, h: torch.slice_scatter(h, m.w.expand(h.size(0), -1), 1, 2, 8, 2),
        w=(3,),
    ),
    case("tokens", "slice_scatter tokens", lambda m, h: torch.slice_scatter(h, h[:, 2:4] * 2, 1, 0, 2)),
    case("features", "select_scatter", lambda m, h: torch.select_scatter(h, h[:, 3] * 2, 1, 5)),
    case("tokens", "select_scatter tokens", lambda m, h: torch.select_scatter(h, h[:, 3] * 2, 1, 0)),
    case("tokens", "diagonal", lambda m, h: torch.diagonal(h, 0, 1, 2), 5, frozen="diagonal"),
    case(
        "tokens",
        "as_strided",
        lambda m, h: h[:, 0] + torch.as_strided(h.contiguous(), (1, 8), (40, 1)),
        frozen="as_strided",
    ),
]

_REFUSED = [
    case("signal", "fft", lambda m, h: torch.fft.rfft(h, dim=1).abs(), 5, frozen="fft"),
    case("features", "view dtype", lambda m, h: h.view(torch.uint8).sum(1, keepdim=True) * h, frozen="view"),
]

CASES = [*_POINTWISE, *_SHAPE, *_INDEX, *_JOIN, *_REFUSED]
