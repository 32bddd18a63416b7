"""Random networks: a few draws decide what is built, the same ones for hypothesis (which shrinks) and for thousands.

`build(pick)` makes a RandomNet; pick(n) is a number below n. A net is a list of steps on a growing list of values,
all of one layout: images [b, c, 4, 4] or tokens [b, 5, c]. `str(net)` is its program, to reproduce a failure.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import randomise

Pick = Callable[[int], int]
WIDTHS = (4, 6, 8, 12)
SIDE, LENGTH = 4, 5


@dataclass(frozen=True)
class Step:
    """text: as printed; run: (net, values) -> value; width: channels of the result."""

    text: str
    run: Callable[[RandomNet, list[Tensor]], Tensor]
    width: int


class RandomNet(nn.Module):
    """See above. image: the layout; steps run in order, then a head reads the last value."""

    def __init__(self, image: bool) -> None:
        super().__init__()
        self.image, self.axis = image, 1 if image else -1
        self.layers = nn.ModuleList()
        self.steps: list[Step] = []
        self.widths = [3 if image else 6]
        self.linear: list[tuple[int, int, int]] = []  # (layer, channels in, channels out), to reuse and tie

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step in self.steps:
            values.append(step.run(self, values))
        return values[-1]

    def __str__(self) -> str:
        lines = [f"v{k + 1} [{s.width}] = {s.text}" for k, s in enumerate(self.steps)]
        return "\n".join([f"v0 [{self.widths[0]}] = {'image' if self.image else 'tokens'}", *lines])

    def inputs(self, rows: int, seed: int = 1) -> Tensor:
        """float64 [rows, 3, 4, 4] or [rows, 5, 6]"""
        shape = (3, SIDE, SIDE) if self.image else (LENGTH, 6)
        return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed)).double()

    # ------------------------------------------------------------------------------------ what builders use

    def own(self, layer: nn.Module) -> int:
        self.layers.append(layer)
        return len(self.layers) - 1

    def dense(self, i: int, o: int, kernel: int = 1, bias: bool = True, groups: int = 1) -> int:
        """A layer that mixes channels: a convolution, or a linear layer for tokens."""
        layer = nn.Conv2d(i, o, kernel, padding=kernel // 2, bias=bias, groups=groups)
        index = self.own(layer if self.image else nn.Linear(i, o, bias=bias))
        if groups == 1 and kernel == 1:
            self.linear.append((index, i, o))
        return index

    def per_channel(self, vector: Tensor) -> Tensor:
        return vector[:, None, None] if self.image else vector

    def add(self, text: str, width: int, run: Callable[[RandomNet, list[Tensor]], Tensor]) -> int:
        self.steps.append(Step(text, run, width))
        self.widths.append(width)
        return len(self.widths) - 1


def build(pick: Pick, size: int = 8) -> RandomNet:
    """A net of about `size` random steps in eval mode, float64, with random parameters and statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = RandomNet(pick(2) == 0)
        mix(net, 0, WIDTHS[pick(4)], pick)
        for _ in range(1 + pick(size)):
            recent = len(net.widths) - 1 - (pick(2) and pick(min(3, len(net.widths) - 1)))
            makers = [m for m, needs in MAKERS if needs is None or needs == net.image]
            makers[pick(len(makers))](net, max(recent, 1), pick)
        head(net, pick)
        return randomise(net, pick(1000)).double().eval()


def seeded(seed: int, size: int = 8) -> RandomNet:
    """The net of one seed, for runs of thousands."""
    generator = random.Random(seed)
    return build(generator.randrange, size)


# ------------------------------------------------------------------------------------------------ layers


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


# ---------------------------------------------------------------------------------------- several values


def join(net: RandomNet, v: int, pick: Pick) -> None:
    """Two values of one width, added, multiplied, subtracted, or the larger."""
    c = net.widths[v]
    same = [u for u in range(1, len(net.widths)) if net.widths[u] == c and u != v]
    other = same[pick(len(same))] if same and pick(4) else mix(net, pick(len(net.widths)), c, pick)
    name, f = [("+", torch.add), ("*", torch.mul), ("-", torch.sub), ("max", torch.maximum)][pick(4)]
    net.add(f"v{v} {name} v{other}", c, lambda n, x: f(x[v], x[other]))


def residual(net: RandomNet, v: int, pick: Pick) -> None:
    c, inside = net.widths[v], WIDTHS[pick(4)]
    a = mix(net, v, inside, pick)
    activation(net, a, pick)
    b = mix(net, len(net.widths) - 1, c, pick)
    net.add(f"v{v} + v{b}", c, lambda n, x: x[v] + x[b])


def cat(net: RandomNet, v: int, pick: Pick) -> None:
    u = 1 + pick(len(net.widths) - 1)
    order = [v, u] if pick(2) else [u, v]
    if net.widths[u] + net.widths[v] > 24:
        return dense(net, v, pick)
    width = net.widths[u] + net.widths[v]
    net.add(f"cat(v{order[0]}, v{order[1]})", width, lambda n, x: torch.cat([x[i] for i in order], n.axis))
    return None


def gate(net: RandomNet, v: int, pick: Pick) -> None:
    """Two halves: GLU, swapped, added, or one of them changed."""
    c = net.widths[v]
    if c % 2:
        return dense(net, v, pick)
    kind = pick(4)
    if kind == 0:
        net.add(f"glu(v{v})", c // 2, lambda n, x: _halves(n, x[v])[0] * _halves(n, x[v])[1].sigmoid())
    elif kind == 1:
        net.add(f"swapped halves(v{v})", c, lambda n, x: torch.cat(_halves(n, x[v])[::-1], n.axis))
    elif kind == 2:
        net.add(f"sum of halves(v{v})", c // 2, lambda n, x: _halves(n, x[v])[0] + _halves(n, x[v])[1])
    else:
        net.add(
            f"relu of the first half(v{v})", c,
            lambda n, x: torch.cat([F.relu(_halves(n, x[v])[0]), _halves(n, x[v])[1]], n.axis),
        )  # fmt: skip
    return None


def split(net: RandomNet, v: int, pick: Pick) -> None:
    """Uneven parts, put together in another order."""
    c = net.widths[v]
    if c < 2:
        return dense(net, v, pick)
    at = 1 + pick(c - 1)

    def run(n: RandomNet, x: list[Tensor]) -> Tensor:
        a, b = torch.split(x[v], [at, c - at], n.axis)
        return torch.cat([b.tanh(), a], n.axis)

    net.add(f"split(v{v}, at {at}), tanh of the second, swapped", c, run)
    return None


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


def head(net: RandomNet, pick: Pick) -> None:
    """Pooled, flattened with the positions, or applied at every position."""
    v, kind = len(net.widths) - 1, pick(3)
    c = net.widths[v]
    places = SIDE * SIDE if net.image else LENGTH
    k = net.own(nn.Linear(c * places if kind == 1 else c, 3))

    def run(n: RandomNet, x: list[Tensor]) -> Tensor:
        if kind == 0:
            return n.layers[k](x[v].mean((2, 3)) if n.image else x[v].mean(1))
        if kind == 1:
            return n.layers[k](x[v].flatten(1))
        return n.layers[k](x[v].permute(0, 2, 3, 1) if n.image else x[v])

    net.add(f"head{k}(v{v}, {('pooled', 'flattened', 'everywhere')[kind]})", 3, run)


# What may come next, and for which layout.
MAKERS: list[tuple[Callable[[RandomNet, int, Pick], None], bool | None]] = [
    (dense, None), (activation, None), (norm, None), (join, None), (residual, None), (cat, None), (gate, None),
    (split, None), (pad, None), (cut, None), (turn, None), (shuffle, None), (fold, None), (attention, None),
    (channel_attention, None), (squeeze, None), (reuse, None), (scale, None), (grouped, True), (upconv, True),
    (pool, True), (pixels, True), (mixer, False), (recurrent, False),
]  # fmt: skip


def _divisor(c: int, pick: Pick, most: int | None = None) -> int:
    found = [d for d in range(1, max(c if most is None else most, 1) + 1) if c % d == 0]
    return found[pick(len(found))]


def _halves(n: RandomNet, x: Tensor) -> list[Tensor]:
    parts = x.chunk(2, n.axis)
    return [parts[0], parts[1]]  # indexed: symbolic tracing cannot iterate


def _channels_first(n: RandomNet, x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x) if n.image else layer(x.transpose(1, 2)).transpose(1, 2)


def _channels_last(n: RandomNet, x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if n.image else layer(x)
