"""Operands of ATen ops and the parameters they come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .lanes import Lane


@dataclass(frozen=True)
class Slot:
    """Where an operand made from one parameter by data movement lives: operand == parameter.flatten()[index]."""

    name: str
    index: Tensor  # int64, shape of the operand

    @classmethod
    def of(cls, lane: Lane, node: Any) -> Slot | None:
        """None when the operand is not moved from exactly one parameter that nothing else uses."""
        if not isinstance(node, fx.Node):
            return None
        sources, stack = [], [node]
        while stack:
            current = stack.pop()
            if len(current.users) != 1 or "const" in current.meta or current in lane.lowered.inputs:
                return None
            if "parameter" in current.meta:
                sources.append(current)
            stack.extend(current.all_input_nodes)
        if len(sources) != 1:
            return None
        name = lane.parameter(sources[0])
        tensor = lane.state[name]
        numbered = torch.arange(tensor.numel(), device=tensor.device).reshape(tensor.shape)
        try:
            index = lane.static(node, {name: numbered})
        except RuntimeError:  # an op that does not take integers is no data movement
            return None
        distinct = index.dtype == torch.int64 and len(index.unique()) == index.numel()
        if not distinct or not ((index >= 0) & (index < tensor.numel())).all():
            return None
        # not on what it holds: abs(w) is w while all of w is positive, which the fit need not be
        other = (1000 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))).to(tensor)
        return cls(name, index) if torch.equal(lane.static(node, {name: other}), other.flatten()[index]) else None

    def write(self, lane: Lane, value: Tensor) -> None:
        flat = lane.state[self.name].flatten().clone()
        flat[self.index.flatten()] = value.flatten().to(flat)
        lane.write(self.name, flat.reshape(lane.state[self.name].shape))


def argument(node: fx.Node, name: str | None) -> Any:
    """An argument of an ATen op by its schema name; None if absent."""
    return arguments(node).get(name) if name else None


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an ATen op by schema name, defaults filled in."""
    found = {}
    for i, a in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        given = node.args[i] if i < len(node.args) else node.kwargs.get(a.name)
        found[a.name] = a.default_value if given is None else given  # None where there is no default
    return found
