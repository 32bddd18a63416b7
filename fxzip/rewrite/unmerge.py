"""The op that gives one model its own features back from the merged ones: f_i = U_i z."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .axes import AxisMap, Run


class Unmerge(nn.Module):
    """f_i = U_i z along the feature axes of a value, other axes untouched.

    axes: feature axes, flattened jointly in row-major order; `axis_map` maps that flat axis. Rows of U with a
    single 1 only copy features, and then the whole op is one exact gather; otherwise one product per space.
    Several axes at once keep their sizes, so they need equal widths before and after.

    >>> from fxzip.rewrite.axes import axis_map
    >>> import numpy as np
    >>> swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> Unmerge((1,), axis_map([("s0", np.arange(2), swap)], 2, "z"))(torch.tensor([[3.0, 4.0]]))
    tensor([[4., 3.]])
    """

    index: Tensor | None
    order: Tensor | None
    rest: Tensor | None

    def __init__(self, axes: Sequence[int], axis_map: AxisMap, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.axes = tuple(axes)
        self.groups = 0
        self.register_buffer("index", _gather_index(axis_map))
        self.register_buffer("rest", None)
        self.register_buffer("order", None)
        if self.index is None:
            self._add_groups(axis_map, dtype)

    @classmethod
    def from_buffers(cls, axes: Sequence[int], buffers: Mapping[str, Tensor]) -> Unmerge:
        """The op with these buffers, as `named_buffers` of another one gives them."""
        op = cls.__new__(cls)
        nn.Module.__init__(op)
        op.axes = tuple(axes)
        op.groups = sum(name.startswith("matrix_") for name in buffers)
        for name in ("index", "rest", "order"):
            op.register_buffer(name, buffers.get(name))
        for k in range(op.groups):
            op.register_buffer(f"matrix_{k}", buffers[f"matrix_{k}"])
            op.register_buffer(f"source_{k}", buffers[f"source_{k}"])
        return op

    def _add_groups(self, axis_map: AxisMap, dtype: torch.dtype) -> None:
        """One matrix per space, with the indices of all its runs; `order` puts the results in place."""
        spaces: dict[str, list[Run]] = {}
        for run in axis_map.runs:
            spaces.setdefault(run.space, []).append(run)
        targets = []
        for k, runs in enumerate(spaces.values()):
            self.register_buffer(f"matrix_{k}", runs[0].matrix.to(dtype))  # [n, m]
            self.register_buffer(f"source_{k}", torch.stack([r.source for r in runs]))  # [runs, m]
            targets += [r.target for r in runs]
        self.groups = len(spaces)
        self.rest = axis_map.rest_source  # [r]
        self.order = torch.cat([*targets, axis_map.rest_target]).argsort()  # [length]

    def forward(self, z: Tensor) -> Tensor:
        if self.index is not None and len(self.axes) == 1:
            return z.index_select(self.axes[0], self.index)
        last = tuple(range(-len(self.axes), 0))
        flat = z.movedim(self.axes, last)
        sizes = flat.shape[flat.dim() - len(self.axes) :]
        flat = flat.flatten(-len(self.axes))  # [.., length in]
        out = self._unmerged(flat)
        if len(self.axes) > 1:
            out = out.unflatten(-1, sizes)
        return out.movedim(last, self.axes).contiguous()

    def _unmerged(self, flat: Tensor) -> Tensor:
        if self.index is not None:
            return flat.index_select(-1, self.index)
        assert self.rest is not None and self.order is not None
        parts = []
        for k in range(self.groups):
            matrix, source = self.get_buffer(f"matrix_{k}"), self.get_buffer(f"source_{k}")
            read = flat.index_select(-1, source.flatten()).unflatten(-1, source.shape)  # [.., runs, m]
            parts.append((read @ matrix.T).flatten(-2))  # [.., runs * n]
        parts.append(flat.index_select(-1, self.rest))
        return torch.cat(parts, -1).index_select(-1, self.order)

    def extra_repr(self) -> str:
        how = "gather" if self.index is not None else f"{self.groups} matrices"
        return f"axes={self.axes}, {how}"


def copies(matrix: Tensor) -> bool:
    """Whether every row has a single non-zero entry, a 1."""
    return bool(((matrix != 0).sum(1) == 1).all() and (matrix.sum(1) == 1).all())


def is_identity(axis_map: AxisMap) -> bool:
    index = _gather_index(axis_map)
    return (
        index is not None
        and axis_map.length == axis_map.length_in
        and torch.equal(index, torch.arange(len(index)))
    )


def _gather_index(axis_map: AxisMap) -> Tensor | None:
    """int64 [length]: which entry each output copies; None if some output is no plain copy."""
    if not all(copies(r.matrix) for r in axis_map.runs):
        return None
    index = torch.empty(axis_map.length, dtype=torch.int64)
    index[axis_map.rest_target] = axis_map.rest_source
    for run in axis_map.runs:
        index[run.target] = run.source[run.matrix.argmax(1)]
    return index
