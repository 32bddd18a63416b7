"""The way from a layer to where its target is taken: how far it goes, and that walking it back inverts it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from fxzip.solve.affine import Link, chain, packet, undo
from fxzip.solve.lanes import dynamic_nodes
from fxzip.trace import lower

torch.set_num_threads(1)
T = 6  # tokens, features, rows and columns alike: only the order of axes tells them apart


class Net(nn.Module):
    """tanh of what `way` makes of a layer's output y: tokens [3, T, T] of a Linear, or an image [3, T, T, T]."""

    def __init__(self, way: Way, images: bool) -> None:
        super().__init__()
        self.way = way
        self.layer, self.other = (nn.Conv2d(2, T, 3) if images else nn.Linear(5, T) for _ in range(2))
        self.norm, self.norm2d, self.plain = nn.BatchNorm1d(T), nn.BatchNorm2d(T), nn.BatchNorm1d(T, affine=False)
        self.scale, self.token, self.image = (nn.Parameter(torch.rand(s) + 0.5) for s in ((T,), (T, 1), (T, 1, 1)))
        self.one, self.full, self.pair = (nn.Parameter(torch.rand(s) + 0.5) for s in ((1,), (T, T), (2, 1, 1, 1)))
        self.register_buffer("constant", torch.rand(T), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.way(self, self.layer(x), self.other(x)))

    def normed(self, y: Tensor, training: bool = False) -> tuple[Tensor, ...]:
        m = self.norm
        stats = m.weight, m.bias, m.running_mean, m.running_var
        return torch.ops.aten.native_batch_norm(y, *stats, training, 0.1, 1e-5)


Way = Callable[[Any, Tensor, Tensor], Tensor]  # (the net, y, another layer's output of its shape)


def unused(y: Tensor) -> Tensor:
    y.exp()
    return y


TOKENS: list[tuple[str, Way]] = [
    ("add", lambda n, y, o: y + o),
    ("add", lambda n, y, o: o + y),
    ("subtract", lambda n, y, o: y - o),
    ("", lambda n, y, o: o - y),
    ("", lambda n, y, o: y + y),
    ("", lambda n, y, o: y + 1.5),
    ("", lambda n, y, o: torch.add(y, o, alpha=2)),
    ("", lambda n, y, o: torch.sub(y, o, alpha=0)),
    ("scalar", lambda n, y, o: y * 3),
    ("scalar", lambda n, y, o: y / 4),
    ("", lambda n, y, o: y * 0.0),
    ("", lambda n, y, o: y * float("inf")),
    ("", lambda n, y, o: torch.div(y, 2.0, rounding_mode="floor")),
    ("", lambda n, y, o: y / o),
    ("", lambda n, y, o: y * o),
    ("", lambda n, y, o: y * y),
    ("move", lambda n, y, o: y.transpose(0, 2)),
    ("move", lambda n, y, o: y.permute(1, -1, 0)),
    ("move", lambda n, y, o: y.reshape(9, 12)),
    ("move move", lambda n, y, o: y.unsqueeze(1).squeeze(1)),
    ("move move", lambda n, y, o: y.flatten(0, 1).t()),
    ("move add move", lambda n, y, o: (y.transpose(1, 2) + o).flatten()),
    ("move scalar subtract move", lambda n, y, o: (y.permute(2, 0, 1) / 4 - o.permute(1, 0, 2)).reshape(T, -1)),
    ("scale", lambda n, y, o: y * n.scale),
    ("scale", lambda n, y, o: n.scale * y),
    ("", lambda n, y, o: y / n.scale),
    ("move scale", lambda n, y, o: y.transpose(1, 2) * n.token),
    ("move scale add", lambda n, y, o: o + y.transpose(1, 2) * n.token),
    ("", lambda n, y, o: y * n.token),
    ("", lambda n, y, o: y * n.one),
    ("", lambda n, y, o: y * n.full),
    ("", lambda n, y, o: y * n.constant),
    ("", lambda n, y, o: y * n.scale.exp()),
    ("", lambda n, y, o: y * n.scale + n.scale),  # used twice
    ("scalar", lambda n, y, o: y * 3 * n.scale),
    ("scale", lambda n, y, o: y * n.scale * n.one),
    ("add", lambda n, y, o: (y + o) * n.scale),
    ("", lambda n, y, o: y + torch.zeros(2, 3, T, T)),  # in more than one place
    ("move", lambda n, y, o: y.unsqueeze(0) * n.pair),
    ("", lambda n, y, o: y + y.mean(1, keepdim=True)),
    ("add", lambda n, y, o: unused(y) + o),
    ("", lambda n, y, o: n.norm(y)),  # by token
    ("move norm move", lambda n, y, o: n.norm(y.transpose(1, 2)).transpose(1, 2)),
    ("move norm", lambda n, y, o: n.norm(y.flatten(0, 1))),
    ("move", lambda n, y, o: n.plain(y.transpose(1, 2))),
    ("move", lambda n, y, o: n.norm(y.transpose(1, 2)) + n.norm.bias.mean()),
    ("move", lambda n, y, o: n.normed(y.transpose(1, 2), training=True)[0]),
    ("move norm", lambda n, y, o: n.normed(y.transpose(1, 2))[0]),
    ("move", lambda n, y, o: o + n.normed(y.transpose(1, 2))[1].sum()),
    ("move norm scalar", lambda n, y, o: n.norm(y.transpose(1, 2)) / 4),
    ("move norm", lambda n, y, o: n.norm(y.transpose(1, 2)) * n.token),
    ("move scalar", lambda n, y, o: n.norm(y.transpose(1, 2) / 4)),
]
IMAGES: list[tuple[str, Way]] = [
    ("norm", lambda n, y, o: n.norm2d(y)),
    ("norm add", lambda n, y, o: o + n.norm2d(y)),
    ("move norm", lambda n, y, o: n.norm(y.flatten(2))),
    ("move", lambda n, y, o: n.norm2d(y.transpose(1, 2))),
    ("scale", lambda n, y, o: y * n.image),
    ("", lambda n, y, o: y * n.scale),
    ("move scale", lambda n, y, o: y.permute(0, 2, 3, 1) * n.scale),
    ("move", lambda n, y, o: y.flatten(1) * n.full.reshape(-1).repeat(6)),
]


def values(net: Net, lowered: Any, x: Tensor, given: dict[fx.Node, Tensor], skipped: list[Link]) -> dict[fx.Node, Any]:
    """What every node of the graph is, with the given ones as they are given and without what is `skipped`."""
    folded = {k.node: k.source for k in skipped}
    found: dict[fx.Node, Any] = dict(zip(lowered.inputs, [x], strict=True))
    for node in lowered.graph.nodes:
        if node in given:
            found[node] = given[node]
        elif node in folded:
            found[node] = found[folded[node]]
        elif node.op == "call_function":
            found[node] = node.target(*map_arg(node.args, found.get), **map_arg(node.kwargs, found.get))
        elif node.op == "placeholder" and node not in found:
            found[node] = node.meta.get("value", node.meta.get("const"))
    return found


@pytest.mark.parametrize("shape, kinds, way", [
    *(((3, T, 5), *case) for case in TOKENS), *(((3, 2, T + 2, T + 2), *case) for case in IMAGES)
])  # fmt: skip
@torch.no_grad()
def test_walking_back_from_a_target_gives_what_leads_to_it(shape, kinds, way):
    torch.manual_seed(0)
    net, x = Net(way, len(shape) == 4).eval(), torch.randn(shape)
    lowered = lower(fx.symbolic_trace(net), (x,))
    dynamic = dynamic_nodes(lowered)
    start = next(n for n in dynamic.values() if packet(n) in ("linear", "convolution"))
    links = chain(start, dynamic, frozenset(dynamic), lambda n: n.meta["shape"])
    assert " ".join(k.kind for k in links) == kinds
    for k, link in enumerate(links):
        reader = link.other if link.kind == "norm" else link.node
        assert chain(start, dynamic, frozenset(dynamic) - {reader.name}, lambda n: n.meta["shape"]) == links[:k]

    plain = values(net, lowered, x, {}, [])
    last = links[-1].node if links else start
    wanted = target = torch.randn(last.meta["shape"])
    for link in reversed(links):
        target = undo(link, target, link.source.meta["shape"], plain[link.other] if link.other else None)
    folded = [k for k in links if k.kind in ("norm", "scale")]
    torch.testing.assert_close(values(net, lowered, x, {start: target}, folded)[last], wanted)
