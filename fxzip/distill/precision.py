"""Steps in bfloat16: the same networks with parameters, constants and inputs of that dtype.

Weights, curvature and speed stay in the models' own precision, as in Micikevicius et al., "Mixed Precision Training"
(ICLR 2018); bfloat16 has the range of float32, so that derivatives need no scale. Convolutions of a processor with
instructions for it, and of GPUs, are several times as fast, above all with channels last.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..solve.lanes import Lane

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Lower:
    """Takes lanes and arguments from `own` to `dtype`."""

    dtype: torch.dtype
    own: torch.dtype
    _made: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)  # what lanes share, they still do

    def lane(self, lane: Lane) -> Lane:
        """The same network; what it holds of values stays behind."""
        state = {k: self._made.setdefault(id(v), (v, self.tensor(v)))[1] for k, v in lane.state.items()}
        return _Moved(lane.lowered, lane.nodes, state, lane.store, lower=self)

    def module(self, op: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """What gives a model its own features back."""
        return copy.deepcopy(op).to(self.dtype) if isinstance(op, nn.Module) else op

    def args(self, args: tuple) -> tuple:
        """Positional arguments, [samples, channels, ...] with channels last."""
        return tree_map(lambda x: self.tensor(x, LAST.get(x.dim())) if isinstance(x, Tensor) else x, args)

    def tensor(self, x: Tensor, layout: torch.memory_format | None = None) -> Tensor:
        if x.dtype is not self.own:
            return x
        return x.to(self.dtype, memory_format=layout) if layout else x.to(self.dtype)


@dataclass
class _Moved(Lane):
    """A lane in another precision than the one its graph was lowered in: constants and dtypes follow."""

    lower: Lower | None = None

    def written(self, x: Any) -> Any:
        assert self.lower is not None
        if isinstance(x, Tensor):
            return self.lower.tensor(x)
        return self.lower.dtype if x is self.lower.own else x
