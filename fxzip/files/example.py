"""Example inputs as JSON, without their data, and new ones made from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .plan import dtype_name, dtype_of

SCALARS = (bool, int, float, str, type(None))
LIMIT = 1 << 28  # elements of all invented tensors together


def example_to_json(value: Any) -> Any:
    """Structure, shapes and dtypes of `value`: every level is an object with one key that says what it is.

    Raises InputError for anything but tensors and plain values in tuples, lists and dicts.

    >>> example_to_json((torch.zeros(2, 3),))
    {'tuple': [{'tensor': [[2, 3], 'float32']}]}
    """
    if isinstance(value, Tensor):
        return {"tensor": [list(value.shape), dtype_name(value.dtype)]}
    if isinstance(value, SCALARS):
        return {"value": value}
    if type(value) in (tuple, list):
        return {type(value).__name__: [example_to_json(v) for v in value]}
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {"dict": {k: example_to_json(v) for k, v in value.items()}}
    raise InputError(
        f"save: an input of type {type(value).__name__} cannot be written to JSON; inputs may be tensors and"
        " plain values, in tuples, lists and dicts"
    )


def example_from_json(data: Any, device: torch.device, generator: torch.Generator) -> Any:
    """Arguments of the structure that `example_to_json` wrote: floats normal, integers and booleans 0."""
    left = [LIMIT]
    return _made(data, lambda shape, dtype: _tensor(shape, dtype, device, generator, left))


def _made(data: Any, tensor: Callable[[Any, torch.dtype], Tensor]) -> Any:
    if not isinstance(data, dict) or len(data) != 1:
        raise InputError(f"load: plan.json is malformed: example holds {str(data)[:60]}")
    kind, value = next(iter(data.items()))
    try:
        if kind == "tensor":
            return tensor(value[0], dtype_of(value[1], "example"))
        if kind in ("tuple", "list"):
            items = [_made(v, tensor) for v in value]
            return tuple(items) if kind == "tuple" else items
        if kind == "dict":
            return {k: _made(v, tensor) for k, v in value.items()}
    except (TypeError, AttributeError, LookupError, RuntimeError) as error:
        raise InputError(f"load: plan.json is malformed: example holds {str(data)[:60]} ({error})") from error
    if kind == "value" and isinstance(value, SCALARS):
        return value
    raise InputError(f"load: plan.json is malformed: example holds {str(data)[:60]}")


def _tensor(
    shape: Any, dtype: torch.dtype, device: torch.device, generator: torch.Generator, left: list[int]
) -> Tensor:
    left[0] -= math.prod(shape)
    if left[0] < 0:
        raise RuntimeError(f"more than {LIMIT:,} elements")
    if dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.complex64).to(device, dtype)
    if not dtype.is_floating_point:  # 0 is a valid index whatever is looked up
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.randn(shape, generator=generator).to(device, dtype)
