"""The smallest module that exercises each rule, and small nets that combine them.

Generic tests run over EXAMPLES: labelled text, invariants, and soundness (a random element of the inferred
group leaves the output unchanged). Every registered op is reached by an example or listed in UNREACHABLE.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import layer_examples
import op_examples
import reduction_examples
import torch
import toy_attention
import toys
from torch import Tensor, nn
from toys import randomise

# Op -> why no example reaches it.
UNREACHABLE = {
    "_scaled_dot_product_cudnn_attention": "needs a GPU; same rule and schema as the CPU kernel",
    "_scaled_dot_product_efficient_attention": "needs a GPU; same rule and schema as the CPU kernel",
    "_scaled_dot_product_flash_attention": "needs a GPU; same rule and schema as the CPU kernel",
    "_scaled_dot_product_fused_attention_overrideable": "needs an out-of-tree device",
}


@dataclass(frozen=True)
class Example:
    """build: a module with PyTorch's initial values; frozen: the op that no rule covers, if there is one."""

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[], tuple]
    frozen: str = ""

    def make(self) -> nn.Module:
        """The module in eval mode, with random parameters and statistics: nothing holds by chance."""
        torch.manual_seed(0)
        return randomise(self.build()).eval()

    def inputs(self) -> tuple:
        """Two samples."""
        torch.manual_seed(1)
        return self.data()

    def __str__(self) -> str:
        return self.name


class Around(nn.Module):
    """after(op(self, before(x))), with the attributes that the case gives its op."""

    def __init__(self, case: op_examples.Case) -> None:
        super().__init__()
        before, after, _ = LAYERS[case.kind]
        self.op, self.before = case.op, before()
        self.after = after(case.width) if case.width else nn.Identity()
        for name, value in case.attributes.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value.clone())
            elif isinstance(value, tuple):
                setattr(self, name, nn.Parameter(torch.randn(value)))
            else:
                setattr(self, name, copy.deepcopy(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.op(self, self.before(x)))


def _around(case: op_examples.Case) -> Example:
    shape = LAYERS[case.kind][2]
    return Example(
        f"{case.kind}: {case.name}", lambda: Around(case), lambda: (torch.randn(2, *shape),), case.frozen
    )


# kind -> layer before, layer after (by its input width), shape of one sample. Eight features each.
LAYERS: dict[str, tuple[Callable, Callable, tuple[int, ...]]] = {
    "features": (lambda: nn.Linear(6, 8), lambda c: nn.Linear(c, 3), (6,)),
    "tokens": (lambda: nn.Linear(6, 8), lambda c: nn.Linear(c, 3), (5, 6)),
    "signal": (lambda: nn.Conv1d(3, 8, 3, padding=1), lambda c: nn.Conv1d(c, 2, 1), (3, 6)),
    "image": (lambda: nn.Conv2d(3, 8, 3, padding=1), lambda c: nn.Conv2d(c, 2, 1), (3, 6, 6)),
    "volume": (lambda: nn.Conv3d(2, 8, 3, padding=1), lambda c: nn.Conv3d(c, 2, 1), (2, 4, 4, 4)),
}

EXAMPLES = [
    *(_around(case) for case in [*op_examples.CASES, *reduction_examples.CASES, *layer_examples.CASES]),
    *(Example(name, build, data, frozen) for name, build, data, frozen in [*toys.TOYS, *toy_attention.TOYS]),
]
