"""The merged network as a function of the matrices that solve fitted, differentiable.

Batch norms and scales behind a layer are folded into its matrix, as in the fit; all else is as solve left it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from ..errors import FxzipError
from ..solve.affine import packet
from ..solve.design import Design, design_of
from ..solve.fit import Parts
from ..solve.folding import Point, folded, write_back
from ..solve.lanes import Lane
from ..solve.slots import argument, arguments
from .precision import Lower

Unmerge = Mapping[str, Sequence[Callable[[Tensor], Tensor]]]  # value at the boundary -> what each model reads it by
Place = tuple[str, int | None]  # name of a value, and of which model it is; None: shared


@dataclass
class Layer:
    """One fitted contraction. matrix: [g, o, p], with a last column for the shift if there is one."""

    point: Point
    parts: Parts
    design: Design
    groups: int
    intercept: bool
    matrix: Tensor

    @classmethod
    def of(cls, point: Point, parts: Parts) -> Layer:
        node = point.lane.nodes[point.name]
        design = design_of(node)
        assert design is not None  # it was fitted
        intercept = parts.bias is not None or point.normed
        groups = int(argument(node, "groups") or 1)
        matrix = folded(point, design, parts.weight, parts.bias, groups, intercept)
        precision = torch.promote_types(point.lane.state[parts.weight.name].dtype, torch.float32)
        return cls(point, parts, design, groups, intercept, matrix.to(precision))

    def __call__(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        """The contraction's output, with the shift. given: its arguments by name."""
        matrix = self.matrix[..., :-1] if self.intercept else self.matrix
        weight, precision = self.design.operand(matrix, self.parts.weight.index.shape), given[self.design.weight].dtype
        given = given | {self.design.weight: weight.to(precision)}
        shift = self.matrix[..., -1].flatten().to(precision) if self.intercept else None
        if shift is not None and self.design.bias is not None:
            given[self.design.bias] = shift
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        plain = [given[a.name] for a in schema if not a.kwarg_only]
        made = node.target(*plain, **{a.name: given[a.name] for a in schema if a.kwarg_only})  # type: ignore[operator]
        return made if shift is None or self.design.bias is not None else made + shift

    def rows_of(self, value: Tensor) -> Tensor:
        """A tensor in the layout of the output, [rows, g, o]."""
        if packet(self.point.lane.nodes[self.point.name]) == "convolution":
            value = value.movedim(1, -1)
        return value.reshape(-1, self.groups, value.shape[-1] // self.groups)

    def write(self, mean: Tensor, var: Tensor) -> None:
        """Into the lane's parameters. mean, var: of the output without the shift, for a norm that was folded."""
        statistics = (mean, var) if self.point.normed else None
        write_back(
            self.point, self.design, self.parts.weight, self.parts.bias, self.matrix.detach().double(), statistics,
            self.intercept,
        )  # fmt: skip


@dataclass
class Network:
    """layers: by name and model. dynamic: what is computed, in order. owners: whose values those are, [None] where they
    are shared."""

    merged: Lane
    private: Sequence[Lane]
    dynamic: Mapping[str, fx.Node]
    owners: Mapping[str, Sequence[int | None]]
    unmerged: Unmerge
    layers: Mapping[Place, Layer]
    folded: Mapping[Place, str] = field(init=False)  # first result of a norm that a layer holds -> what it reads

    def __post_init__(self) -> None:
        self.folded = {
            (k.node.name, model): k.source.name
            for (_, model), layer in self.layers.items() for k in layer.point.links if k.kind == "norm"
        }  # fmt: skip

    def lowered(self, lower: Lower) -> Network:
        """The same layers in another precision, for inputs of that."""
        return replace(
            self, merged=lower.lane(self.merged), private=[lower.lane(k) for k in self.private],
            unmerged={name: [lower.module(op) for op in ops] for name, ops in self.unmerged.items()},
        )  # fmt: skip

    def __call__(self, tensors: Sequence[Tensor], tape: dict[Place, tuple[dict, Tensor]] | None = None) -> dict:
        """Place -> value, of all that is computed. tape: arguments and output of every layer go there."""
        inputs = {self.merged.names[n]: t for n, t in zip(self.merged.lowered.inputs, tensors, strict=True)}
        values: dict[Place, Any] = {(name, None): t for name, t in inputs.items()}
        for name in self.dynamic:
            if name not in inputs:
                for model in self.owners[name]:
                    values[name, model] = self._value(name, model, values, tape)
        return values

    def _value(self, name: str, model: int | None, values: dict[Place, Any], tape: dict | None) -> Any:
        lane = self.merged if model is None else self.private[model]
        node = lane.nodes[name]
        if (name, model) in self.folded:
            return values[self.folded[name, model], model]

        def read(n: Any) -> Any:
            own = lane.names.get(n)
            if own is None or own not in self.dynamic:
                with torch.no_grad():
                    return lane.static(n)
            if (own, model) in values:
                return values[own, model]
            shared = values[own, None]
            return self.unmerged[own][model](shared) if own in self.unmerged and model is not None else shared

        layer = self.layers.get((name, model))
        if layer is None:  # not by `Lane.apply`, whose kernels are for what has no derivatives
            args = map_aggregate(node.args, lambda x: read(x) if isinstance(x, fx.Node) else lane.written(x))
            kwargs = map_aggregate(node.kwargs, lambda x: read(x) if isinstance(x, fx.Node) else lane.written(x))
            return node.target(*args, **kwargs)  # type: ignore[operator]
        given = {k: read(v) if isinstance(v, fx.Node) else v for k, v in arguments(node).items()}
        made = layer(node, given)
        if tape is not None:
            tape[name, model] = given, made
        return made


def derived(values: Sequence[Tensor], by: Sequence[Tensor], of: Sequence[Tensor]) -> list[Tensor]:
    """d sum(values * by) / d each of `of`; zeros where nothing depends on it. Values that have no derivative do not
    count, such as what a forward detaches."""
    used = [(v, b) for v, b in zip(values, by, strict=True) if v.requires_grad]
    if not used:
        return [torch.zeros_like(x) for x in of]
    try:
        found = torch.autograd.grad([v for v, _ in used], list(of), [b for _, b in used], allow_unused=True)
    except RuntimeError as error:
        if "derivative" not in str(error):  # such as no memory
            raise
        raise FxzipError(f"distill: this network cannot be differentiated: {error}; use method='solve'") from error
    return [torch.zeros_like(x) if g is None else g for x, g in zip(of, found, strict=True)]
