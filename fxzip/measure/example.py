"""What inputs look like, without their contents: enough to trace a model again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Form = tuple[Any, ...]  # per argument: {"shape": [2, 3, 8, 8], "dtype": "float32"}, or {"value": plain value}


def form_of(args: Sequence[Any]) -> Form | None:
    """The form of positional arguments; None when one is neither a tensor nor a plain value.

    >>> form_of((torch.zeros(2, 3), None))
    ({'shape': [2, 3], 'dtype': 'float32'}, {'value': None})
    """
    found = []
    for x in args:
        if isinstance(x, Tensor):
            found.append({"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")})
        elif isinstance(x, (bool, int, float, str, type(None))):
            found.append({"value": x})
        else:
            return None
    return tuple(found)


def invent(form: Form, seed: int = 0) -> tuple[Any, ...]:
    """Arguments of this form: normal floats, and ones (a valid index, an open mask) where they are not floats.

    >>> [x.shape for x in invent(form_of((torch.zeros(2, 3),)))]
    [torch.Size([2, 3])]
    """
    generator = torch.Generator().manual_seed(seed)

    def made(item: dict[str, Any]) -> Any:
        if "value" in item:
            return item["value"]
        dtype = getattr(torch, item["dtype"])
        if dtype.is_floating_point:
            return torch.randn(item["shape"], generator=generator).to(dtype)
        return torch.ones(item["shape"], dtype=dtype)

    return tuple(made(item) for item in form)
