"""A second device, for machines that have none: tensors that say they are on it, compute on the CPU, and refuse to be
mixed with the CPU's, as a GPU's do.

It answers to "lazy", a device type that torch knows and has no kernels for. Values are real; what is of a GPU's own
(its kernels, its random numbers, its memory) is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "lazy"
_DEVICE = torch.device(NAME, 0)
_READS = ("_local_scalar_dense", "equal", "is_nonzero")  # numbers come back, whatever they are of
_INDEXES = ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_")  # theirs may be on the CPU


class There(Tensor):
    """On the device. inner: the same on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> There:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=_DEVICE,
        )  # fmt: skip
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """Within, tensors can be moved to the device and made on it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple, kwargs: dict) -> Any:
    name, to = func.overloadpacket.__name__, kwargs.get("device")
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = any(isinstance(x, There) for x in given)
    if name == "copy_":
        func(*map(_inner, args))
        return args[0]
    if there and func.namespace == "mkldnn":
        raise RuntimeError(f"{func} is of the CPU alone")
    if there and name != "_to_copy" and name not in _READS:
        _refuse_mixed(name, args, given)
    mapped = tree_map(_inner, kwargs)
    here = func(*tree_map(_inner, args), **{k: "cpu" if k == "device" else v for k, v in mapped.items()})
    if name in _READS or not (there if to is None else torch.device(to).type == NAME):
        return here
    known = {id(x.inner): x for x in given if isinstance(x, There)}  # what an op in place gives back
    return tree_map(lambda x: known.get(id(x), There(x)) if isinstance(x, Tensor) else x, here)


def _refuse_mixed(name: str, args: tuple, given: list[Tensor]) -> None:
    counted = [args[0], *args[2:]] if name in _INDEXES else given
    wrong = [x for x in counted if isinstance(x, Tensor) and not isinstance(x, There) and x.dim()]
    if wrong:
        raise RuntimeError(f"{name}: {tuple(wrong[0].shape)} is on the CPU, others are on {NAME}")


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, There) else x


def _moving(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(data: Any, *args: Any, device: Any = None, **more: Any) -> Tensor:
        found = make(data, *args, **more)
        return found if device is None else found.to(device)

    return made


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The device's name, where tests may use it."""
    for name in ("tensor", "as_tensor"):  # these allocate where no dispatch is seen
        monkeypatch.setattr(torch, name, _moving(getattr(torch, name)))
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # `param.data =` would leave `inner` behind
    monkeypatch.setattr("fxzip.trace.guards._not_plain", lambda model: [])  # a subclass, to be sure
    try:
        with Device():
            yield NAME
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
