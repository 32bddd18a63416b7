"""Random networks: a few draws decide what is built, the same ones for hypothesis (which shrinks) and for thousands.

`build(pick)` makes a RandomNet; pick(n) is a number below n. Its steps are made here and in random_layers.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from random_layers import (
    activation,
    attention,
    channel_attention,
    cut,
    dense,
    fold,
    grouped,
    mix,
    mixer,
    norm,
    pad,
    pixels,
    pool,
    recurrent,
    reuse,
    scale,
    shuffle,
    squeeze,
    turn,
    upconv,
)
from random_net import LENGTH, SIDE, WIDTHS, Pick, RandomNet
from torch import Tensor, nn
from toys import randomise


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


# ------------------------------------------------------------------------------------------------- the net


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


def _halves(n: RandomNet, x: Tensor) -> list[Tensor]:
    parts = x.chunk(2, n.axis)
    return [parts[0], parts[1]]  # indexed: symbolic tracing cannot iterate
