"""Batches as loaders give them -> positional arguments of a forward."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from ..errors import InputError

M = TypeVar("M", bound=nn.Module)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_KEYWORD_ONLY = (
    "forward takes {!r} by keyword only: {}. Wrap the model in a module whose forward takes it by position"
)
_LABELS = ("labels", "label", "targets", "target")


def bind(batch: Any, parameters: inspect.Signature | Sequence[str]) -> tuple:
    """A loader's batch as positional arguments for a forward with these parameters.

    A tensor is the first argument. A tuple or list gives as many leading items as the forward requires (at
    least one): what follows is taken for labels. A mapping (dict, BatchEncoding, anything with `keys` and
    item access) is bound by name, gaps filled with defaults, keys the forward does not know and optional
    labels left out; so is a mapping that comes first in a tuple. A sequence of names stands for a signature
    in which all are required. Raises InputError naming the keys or the count, and the signature.

    >>> x, y = torch.zeros(2, 3), torch.tensor([0, 1])
    >>> len(bind((x, y), ["x"])), len(bind({"b": y, "a": x}, ["a", "b"]))
    (1, 2)
    """
    signature = parameters if isinstance(parameters, inspect.Signature) else _signature(parameters)
    if isinstance(batch, Tensor):
        return _items((batch,), signature)
    if _is_mapping(batch):
        return _by_name(batch, signature)
    if isinstance(batch, (tuple, list)) and batch:
        if _is_mapping(batch[0]):
            return _by_name(batch[0], signature)
        return _items(tuple(batch), signature)
    raise InputError(
        f"a batch must be a tensor, a non-empty tuple or list, or a mapping; got {describe(batch)}."
        f" forward takes {_show(signature)}"
    )


def on_meta(module: nn.Module) -> bool:
    """Whether a model has shapes and no values: all that it would learn is on the meta device."""
    return any(p.is_meta for p in module.parameters())


def on(device: torch.device | str, args: tuple) -> tuple:
    """Arguments, all their tensors on the device."""
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, args)


def to_meta(args: tuple) -> tuple:
    """Arguments for a model that has shapes alone."""
    return on("meta", args)


def beside(args: tuple, module: nn.Module) -> tuple:
    """Arguments on the device of a model's first tensor, as loaders give them on the CPU; of a model that has shapes
    alone, shapes."""
    if on_meta(module):
        return to_meta(args)
    device = next((t.device for t in (*module.parameters(), *module.buffers())), None)
    return args if device is None else on(device, args)


def faking() -> AbstractContextManager:
    """Within, what such a model makes is fake, as under `torch.export`: code that looks at values unless tensors are
    fake (transformers' masks do) does not try to, which fails on the meta device."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def shapes_only(module: M) -> M:
    """A copy of a model on the meta device; its values are not copied.

    >>> shapes_only(nn.Linear(2, 1)).weight.device
    device(type='meta')
    """
    memo = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()}
    memo |= {id(b): b.detach().to("meta") for b in module.buffers()}
    return copy.deepcopy(module, memo)


def describe(batch: Any) -> str:
    """`(float32[2, 3, 8, 8], int64[2])`: shapes and dtypes for messages."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')}{list(batch.shape)}"
    if _is_mapping(batch):
        return "{" + ", ".join(f"{k!r}: {describe(batch[k])}" for k in list(batch.keys())) + "}"
    if isinstance(batch, (tuple, list)):
        inner = ", ".join(describe(x) for x in batch[:8]) + (", ..." if len(batch) > 8 else "")
        return f"({inner})" if isinstance(batch, tuple) else f"[{inner}]"
    if batch is None or isinstance(batch, (bool, int, float, str)):
        return repr(batch)
    return type(batch).__name__


def plain_batch(args: tuple) -> None:
    """Raises InputError for tensors that cannot be computed with: none of a sample, sparse, without values."""
    for x in tree_flatten(args)[0]:
        if not isinstance(x, Tensor):
            continue
        if x.layout is not torch.strided or x.is_quantized:
            kind = str(x.layout).removeprefix("torch.") if x.layout is not torch.strided else "quantised"
            raise InputError(f"{describe(x)} is {kind}: give a plain tensor (to_dense(), dequantize())")
        if x.is_meta:
            raise InputError(f"{describe(x)} is on the meta device and has no values")
        if x.dim() and not x.shape[0]:
            raise InputError(f"{describe(x)} holds no sample: leave empty batches out")
        if x.is_floating_point() and bool(x.isnan().any()):
            raise InputError(f"{describe(x)} holds NaN ({int(x.isnan().sum())} of {x.numel()} entries): clean the data")


def batch_size(args: tuple) -> int:
    """Length of axis 0 of the first tensor with axes; 0 if there is none."""
    tensors = [x for x in tree_flatten(args)[0] if isinstance(x, Tensor) and x.dim() > 0]
    return tensors[0].shape[0] if tensors else 0


def rows(args: tuple, count: int) -> tuple:
    """`args` cut to `count` rows, or repeated up to them: tensors whose axis 0 is as long as the batch."""
    size = batch_size(args)

    def take(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[0] != size or size == 0:
            return x
        return x.index_select(0, torch.arange(count, device=x.device) % size)

    return tree_map(take, args)


def first_rows(batch: Any, count: int) -> Any:
    """`rows` of a batch as a loader gives it; mappings of any kind become dicts, so that names are kept.

    >>> first_rows({"x": torch.zeros(4, 3)}, 2)["x"].shape
    torch.Size([2, 3])
    """
    plain = {k: batch[k] for k in list(batch.keys())} if _is_mapping(batch) else batch
    if isinstance(plain, (tuple, list)) and plain and _is_mapping(plain[0]):
        plain = {k: plain[0][k] for k in list(plain[0].keys())}
    return rows((plain,), count)[0]


def _is_mapping(batch: Any) -> bool:
    return callable(getattr(batch, "keys", None)) and hasattr(batch, "__getitem__")


def _signature(names: Sequence[str]) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature([inspect.Parameter(name, kind) for name in names])


def _show(signature: inspect.Signature) -> str:
    return "(" + ", ".join(str(p).split(":")[0].split(" =")[0] for p in signature.parameters.values()) + ")"


def _items(items: tuple, signature: inspect.Signature) -> tuple:
    """Leading items, as many as are required."""
    everything = list(signature.parameters.values())
    required = [p for p in everything if p.kind in _POSITIONAL and p.default is p.empty]
    takes_all = any(p.kind is p.VAR_POSITIONAL for p in everything)
    count = len(items) if takes_all else max(1, len(required))
    if len(items) < count:
        raise InputError(
            f"the batch has {len(items)} item{'s' * (len(items) != 1)} {describe(items)}, forward requires"
            f" {count}: {_show(signature)}"
        )
    only = [p.name for p in everything if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if only:
        raise InputError(_KEYWORD_ONLY.format(only[0], _show(signature)))
    taken = items[:count]
    for k, item in enumerate(taken):
        if not any(isinstance(x, Tensor) for x in tree_flatten(item)[0]):
            raise InputError(
                f"item {k} of the batch holds no tensor but {describe(item)}; forward takes"
                f" {_show(signature)}. Convert it with torch.as_tensor"
            )
    return taken


def _by_name(batch: Any, signature: inspect.Signature) -> tuple:
    """Values by parameter name, defaults in the gaps."""
    keys = list(batch.keys())
    known = list(signature.parameters.values())
    required = [p.name for p in known if p.default is p.empty and p.kind in (*_POSITIONAL, p.KEYWORD_ONLY)]
    missing = [name for name in required if name not in keys]
    given = [p for p in known if p.name in keys and not (p.name in _LABELS and p.default is not p.empty)]
    if missing or not given:
        lacks = f"lacks {', '.join(map(repr, missing))}" if missing else "has none of forward's parameters"
        raise InputError(f"the batch with keys {keys} {lacks}; forward takes {_show(signature)}")
    only = [p.name for p in given if p.kind not in _POSITIONAL]
    if only:
        raise InputError(_KEYWORD_ONLY.format(only[0], _show(signature)))
    last = max(known.index(p) for p in given)
    return tuple(batch[p.name] if p in given else p.default for p in known[: last + 1])
