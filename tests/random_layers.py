"""Steps of random networks that take one value: layers, norms, functions, attention, renumberings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from random_net import LENGTH, SIDE, WIDTHS, Pick, RandomNet
from torch import Tensor, nn


def mix(net: RandomNet, v: int, width: int, pick: Pick) -> int:
    kernel, bias = (3, 1)[pick(2)], bool(pick(2))
    k = net.dense(net.widths[v], width, kernel if net.image else 1, bias)
    return net.add(f"dense{k}(v{v}, kernel {kernel}, bias {bias})", width, lambda n, x: n.layers[k](x[v]))


def dense(net: RandomNet, v: int, pick: Pick) -> None:
    mix(net, v, WIDTHS[pick(4)], pick)


def grouped(net: RandomNet, v: int, pick: Pick) -> None:
    """Grouped or depthwise, with one or two outputs per input."""
    c = net.widths[v]
    groups = _divisor(c, pick)
    out = c * (1 + pick(2))
    k = net.dense(c, out, 3, bool(pick(2)), groups)
    net.add(f"conv{k}(v{v}, groups {groups})", out, lambda n, x: n.layers[k](x[v]))


def upconv(net: RandomNet, v: int, pick: Pick) -> None:
    c, out = net.widths[v], WIDTHS[pick(4)]
    groups = 2 if c % 2 == 0 and pick(2) else 1
    k = net.own(nn.ConvTranspose2d(c, out, 3, padding=1, groups=groups))
    net.add(f"conv_transpose{k}(v{v}, groups {groups})", out, lambda n, x: n.layers[k](x[v]))


def reuse(net: RandomNet, v: int, pick: Pick) -> None:
    """A layer applied again, or its weight transposed (tied)."""
    c = net.widths[v]
    again = [(k, o, False) for k, i, o in net.linear if i == c]
    again += [(k, i, True) for k, i, o in net.linear if o == c]
    if not again:
        return dense(net, v, pick)
    k, width, back = again[pick(len(again))]
    if not back:
        net.add(f"dense{k}(v{v}) again", width, lambda n, x: n.layers[k](x[v]))
        return None

    def tied(n: RandomNet, x: list[Tensor]) -> Tensor:
        w: Any = n.layers[k].weight
        return F.conv2d(x[v], w.transpose(0, 1)) if n.image else F.linear(x[v], w.t())

    net.add(f"dense{k}(v{v}) with its weight transposed", width, tied)
    return None


def norm(net: RandomNet, v: int, pick: Pick) -> None:
    c = net.widths[v]
    kind = pick(4)
    if kind == 0:
        k = net.own(nn.BatchNorm2d(c) if net.image else nn.BatchNorm1d(c))
        net.add(f"batch_norm{k}(v{v})", c, lambda n, x: _channels_first(n, x[v], n.layers[k]))
    elif kind == 1:
        k = net.own(nn.LayerNorm(c))
        net.add(f"layer_norm{k}(v{v})", c, lambda n, x: _channels_last(n, x[v], n.layers[k]))
    elif kind == 2:
        groups = _divisor(c, pick, most=c // 2)
        k = net.own(nn.GroupNorm(groups, c))
        net.add(f"group_norm{k}(v{v}, {groups} groups)", c, lambda n, x: _channels_first(n, x[v], n.layers[k]))
    else:
        net.add(f"normalize(v{v})", c, lambda n, x: F.normalize(x[v], dim=n.axis))


def activation(net: RandomNet, v: int, pick: Pick) -> None:
    c = net.widths[v]
    kinds: list[tuple[str, Callable[[RandomNet, Tensor], Tensor]]] = [
        ("relu", lambda n, x: F.relu(x)),
        ("gelu", lambda n, x: F.gelu(x)),
        ("silu", lambda n, x: F.silu(x)),
        ("tanh", lambda n, x: torch.tanh(x)),
        ("hardswish", lambda n, x: F.hardswish(x)),
        ("leaky_relu", lambda n, x: F.leaky_relu(x, 0.1)),
        ("abs", lambda n, x: x.abs()),
        ("softmax over channels", lambda n, x: x.softmax(n.axis)),
        ("minus mean over channels", lambda n, x: x - x.mean(n.axis, keepdim=True)),
        ("cumsum over channels", lambda n, x: x.cumsum(n.axis)),
    ]
    if net.image:
        k = len(net.layers)
        kinds += [("prelu", lambda n, x: n.layers[k](x))]
    name, f = kinds[pick(len(kinds))]
    if name == "prelu":
        net.own(nn.PReLU(c))
    net.add(f"{name}(v{v})", c, lambda n, x: f(n, x[v]))


def scale(net: RandomNet, v: int, pick: Pick) -> None:
    """A parameter per channel, times or plus."""
    c, times = net.widths[v], bool(pick(2))
    holder = nn.Module()
    holder.vector = nn.Parameter(torch.ones(c))
    k = net.own(holder)

    def run(n: RandomNet, x: list[Tensor]) -> Tensor:
        p = n.per_channel(n.layers[k].vector)  # type: ignore[arg-type]
        return x[v] * p if times else x[v] + p

    net.add(f"v{v} {'*' if times else '+'} p{k}", c, run)


# --------------------------------------------------------------------------------------------- attention


def attention(net: RandomNet, v: int, pick: Pick) -> None:
    """Over pixels or tokens, with heads, perhaps fewer for keys and values; q, k, v from one layer or three."""
    c, heads, width = net.widths[v], (1, 2, 4)[pick(3)], 2 + pick(2)
    shared = (1, 2)[pick(2)] if heads > 1 else 1
    kv = heads // shared * width
    together, causal = pick(2) and shared == 1, bool(pick(2))
    ks = (
        [net.own(nn.Linear(c, 3 * kv))]
        if together
        else [net.own(nn.Linear(c, o)) for o in (heads * width, kv, kv)]
    )
    out = net.own(nn.Linear(heads * width, c))

    def run(n: RandomNet, x: list[Tensor]) -> Tensor:
        tokens = x[v].flatten(2).transpose(1, 2) if n.image else x[v]
        every = n.layers[ks[0]](tokens).chunk(3, -1) if together else [n.layers[k](tokens) for k in ks]
        parts = [every[0], every[1], every[2]]
        q, k, w = (p.unflatten(-1, (-1, width)).transpose(1, 2) for p in parts)
        k, w = (t.repeat_interleave(shared, 1) if shared > 1 else t for t in (k, w))
        y = F.scaled_dot_product_attention(q, k, w, is_causal=causal)
        y = n.layers[out](y.transpose(1, 2).flatten(2))
        return y.transpose(1, 2).unflatten(2, (SIDE, SIDE)) if n.image else y

    net.add(f"attention(v{v}, {heads} heads of {width}, {shared} share, one layer {bool(together)})", c, run)


def channel_attention(net: RandomNet, v: int, pick: Pick) -> None:
    """Channels attend to channels (XCiT)."""
    c = net.widths[v]

    def run(n: RandomNet, x: list[Tensor]) -> Tensor:
        y = x[v].flatten(2) if n.image else x[v].transpose(1, 2)  # [b, c, positions]
        z = (y @ y.transpose(1, 2) / y.shape[-1]).softmax(-1) @ y
        return z.unflatten(2, (SIDE, SIDE)) if n.image else z.transpose(1, 2)

    net.add(f"channel attention(v{v})", c, run)


def squeeze(net: RandomNet, v: int, pick: Pick) -> None:
    """Squeeze and excite."""
    c = net.widths[v]
    a, b = net.own(nn.Linear(c, 4)), net.own(nn.Linear(4, c))

    def run(n: RandomNet, x: list[Tensor]) -> Tensor:
        pooled = x[v].mean((2, 3)) if n.image else x[v].mean(1)
        s = n.layers[b](F.relu(n.layers[a](pooled))).sigmoid()
        return x[v] * (s[:, :, None, None] if n.image else s[:, None])

    net.add(f"squeeze-excite(v{v})", c, run)


def mixer(net: RandomNet, v: int, pick: Pick) -> None:
    """A linear layer over tokens."""
    k = net.own(nn.Linear(LENGTH, LENGTH))
    net.add(f"token mixing{k}(v{v})", net.widths[v], lambda n, x: n.layers[k](x[v].transpose(1, 2)).transpose(1, 2))


def recurrent(net: RandomNet, v: int, pick: Pick) -> None:
    out = WIDTHS[pick(2)]
    kind = (nn.LSTM, nn.GRU, nn.RNN)[pick(3)]
    k = net.own(kind(net.widths[v], out, batch_first=True))
    net.add(f"{kind.__name__}{k}(v{v})", out, lambda n, x: n.layers[k](x[v])[0])


# ------------------------------------------------------------------------------------------- renumbering


def pad(net: RandomNet, v: int, pick: Pick) -> None:
    c, before, after = net.widths[v], pick(3), pick(3)
    sides = (0, 0, 0, 0, before, after) if net.image else (before, after)
    net.add(f"pad(v{v}, {before}, {after})", c + before + after, lambda n, x: F.pad(x[v], sides))


def cut(net: RandomNet, v: int, pick: Pick) -> None:
    """A slice of the channels, perhaps every second, perhaps backwards."""
    c = net.widths[v]
    step, start = 1 + pick(2), pick(max(c // 2, 1))
    width = len(range(start, c, step))

    def run(n: RandomNet, x: list[Tensor]) -> Tensor:
        return x[v][:, start::step] if n.image else x[v][..., start::step]

    net.add(f"v{v}[{start}::{step}]", width, run)


def turn(net: RandomNet, v: int, pick: Pick) -> None:
    name, f = [("flip", lambda t, a: t.flip(a)), ("roll", lambda t, a: t.roll(1, a))][pick(2)]
    net.add(f"{name} channels(v{v})", net.widths[v], lambda n, x: f(x[v], n.axis))


def shuffle(net: RandomNet, v: int, pick: Pick) -> None:
    c, g = net.widths[v], _divisor(net.widths[v], pick)
    axis = 1 if net.image else 2

    def run(n: RandomNet, x: list[Tensor]) -> Tensor:
        return x[v].unflatten(axis, (g, c // g)).transpose(axis, axis + 1).flatten(axis, axis + 1)

    net.add(f"shuffle(v{v}, {g} groups)", c, run)


def fold(net: RandomNet, v: int, pick: Pick) -> None:
    """Channels as (groups, rest), one of the two averaged or maximised away."""
    c, g = net.widths[v], _divisor(net.widths[v], pick)
    axis, away = 1 if net.image else 2, pick(2)
    name, f = [("mean", torch.mean), ("max", torch.amax)][pick(2)]
    width = c // g if away == 0 else g

    def run(n: RandomNet, x: list[Tensor]) -> Tensor:
        return f(x[v].unflatten(axis, (g, c // g)), axis + away)

    net.add(f"{name} over axis {away} of ({g}, {c // g})(v{v})", width, run)


def pool(net: RandomNet, v: int, pick: Pick) -> None:
    name, f = [("max_pool", F.max_pool2d), ("avg_pool", F.avg_pool2d)][pick(2)]
    net.add(f"{name}(v{v})", net.widths[v], lambda n, x: f(x[v], 3, 1, 1))


def pixels(net: RandomNet, v: int, pick: Pick) -> None:
    """Pixels into channels and, after a convolution, back."""
    c = net.widths[v]
    k = net.own(nn.Conv2d(4 * c, 16, 1))
    run = lambda n, x: F.pixel_shuffle(F.relu(n.layers[k](F.pixel_unshuffle(x[v], 2))), 2)  # noqa: E731
    net.add(f"pixel_shuffle(relu(conv{k}(pixel_unshuffle(v{v}))))", 4, run)


def _divisor(c: int, pick: Pick, most: int | None = None) -> int:
    found = [d for d in range(1, max(c if most is None else most, 1) + 1) if c % d == 0]
    return found[pick(len(found))]


def _channels_first(n: RandomNet, x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x) if n.image else layer(x.transpose(1, 2)).transpose(1, 2)


def _channels_last(n: RandomNet, x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if n.image else layer(x)
