"""What a change of a layer's matrix does to all outputs: one Kronecker product per layer.

    F ~ S x G,    S = E[x x^T] of the layer's input,    G = E[sum over rows of g g^T],  g = d r / d y

with r all residuals and y the layer's output; g of random sums of r, so that one pass backward does. The step
G^-1 (dL/dW) S^-1 is a natural gradient (Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored
Approximate Curvature", ICML 2015; of convolutions, Grosse and Martens, ICML 2016).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .network import Layer, Place, derived

INPUT = 1e-3  # damping of the inputs' factor, relative to its mean diagonal
ROWS = 8_192  # design rows of one chunk, at most


@dataclass
class Curvature:
    """The two factors of every layer, summed over samples; then their inverses. damping: of the outputs' factor."""

    layers: Mapping[Place, Layer]
    damping: float = 0.1
    inputs: dict[Place, Tensor] = field(default_factory=dict)  # [g, p, p]
    outputs: dict[Place, Tensor] = field(default_factory=dict)  # [g, o, o]
    samples: int = 0

    def add(
        self, tape: Mapping[Place, tuple[dict[str, Any], Tensor]], residuals: list[Tensor], samples: int,
        generator: torch.Generator,
    ) -> None:  # fmt: skip
        """One pass backward of random sums of the residuals."""
        places, by = list(tape), [torch.randn(r.shape, generator=generator).to(r) for r in residuals]
        found = derived(residuals, by, [tape[p][1] for p in places])
        for place, grad in zip(places, found, strict=True):
            layer, given = self.layers[place], {k: _cut(v) for k, v in tape[place][0].items()}
            x = layer.design.rows(given, ROWS, generator).x
            x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], -1) if layer.intercept else x
            self._sum(self.inputs, place, x, 1 / len(x))
            self._sum(self.outputs, place, layer.rows_of(grad), 1 / samples)
        self.samples += 1

    def _sum(self, sums: dict[Place, Tensor], place: Place, rows: Tensor, scale: float) -> None:
        rows = rows.transpose(0, 1)  # [g, r, n]
        product = (rows.mT @ rows).double() * scale
        sums[place] = sums[place] + product if place in sums else product

    def invert(self) -> None:
        """In place: both factors become inverses, damped."""
        for factors, damping in ((self.inputs, INPUT), (self.outputs, self.damping)):
            for place, total in factors.items():
                factor = total / self.samples
                weight = damping * factor.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-20)
                factor.diagonal(dim1=-2, dim2=-1).add_(weight[:, None])
                factors[place] = torch.linalg.inv(factor).to(self.layers[place].matrix.dtype)

    def step(self, place: Place, gradient: Tensor) -> Tensor:
        """The natural step against a gradient [g, o, p]."""
        return -(self.outputs[place] @ gradient @ self.inputs[place])


def _cut(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
