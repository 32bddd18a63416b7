"""What a trace would drop silently: wrappers are taken off with a notice, backward hooks and the like are refused
(weights that are computed before each forward: `plain`; forward hooks: `hooks`)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune
from torch.utils._pytree import tree_flatten

from ..errors import TraceError

_HOOKS = {"_backward_pre_hooks": "backward pre-hook", "_backward_hooks": "backward hook"}


def unwrap(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The module inside DataParallel, DistributedDataParallel and torch.compile, and a notice for each."""
    notices: list[str] = []
    while True:
        inner: Any
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            inner = model._orig_mod
        else:
            return model, tuple(notices)
        notices.append(f"unwrapped {type(model).__name__}: the merge sees the {type(inner).__name__} inside")
        model = inner


def untraceable(model: nn.Module) -> list[str]:
    """Backward hooks, masks, lazy parameters, scripted modules, tensors that are not plain and cycles of modules,
    one sentence each with the way out."""
    circle = _circle(model)
    if circle:
        return [f"{circle[-1]} contains {circle[0]}, which it is a part of: keep such a reference in a list or a tuple"]
    problems = _not_plain(model)
    for name, module in model.named_modules():
        label = name or "the model"
        if isinstance(module, torch.jit.ScriptModule):
            return [*problems, f"{label} is a ScriptModule: pass the nn.Module that was scripted"]
        if any(is_lazy(p) for p in module._parameters.values() if p is not None):
            problems.append(f"{label} has uninitialised parameters: run one forward pass first")
            continue
        for attribute, kind in _HOOKS.items():
            if getattr(module, attribute, {}):
                all_of_them = ".".join(filter(None, ("model", name, attribute)))
                way_out = f"remove it before merging (handle.remove(), or {all_of_them}.clear())"
                problems.append(f"{label} has a {kind}: {way_out}")
        for hook in getattr(module, "_forward_pre_hooks", {}).values():
            if isinstance(hook, prune.BasePruningMethod):
                tensor = getattr(hook, "_tensor_name", "weight")
                problems.append(
                    f"{label}.{tensor} is pruned by a mask: make it plain before merging"
                    f" (torch.nn.utils.prune.remove({label}, {tensor!r}))"
                )
    return problems


def _circle(model: nn.Module) -> tuple[str, str] | None:
    """(outer, inner) names of a module that is its own descendant: torch itself cannot walk that."""
    above: dict[int, str] = {}

    def walk(module: nn.Module, name: str) -> tuple[str, str] | None:
        if id(module) in above:
            return above[id(module)] or "the model", name
        above[id(module)] = name
        for key, child in module._modules.items():
            found = walk(child, f"{name}.{key}" if name else key) if child is not None else None
            if found:
                return found
        del above[id(module)]
        return None

    return walk(model, "")


def _not_plain(model: nn.Module) -> list[str]:
    """Tensors that are sparse, quantised, shards, or hidden in objects of their own; one of each kind is named."""
    found: dict[str, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            continue  # said elsewhere
        kind = type(tensor).__name__
        if tensor.is_quantized or isinstance(tensor, torch.ScriptObject):
            found.setdefault("quantised", f"{name} is quantised: pass the float model")
        elif type(tensor.data) is not Tensor:
            text = f"{name} is a {kind}, not a plain tensor: pass a model of plain tensors"
            found.setdefault(kind, text + " (of shards: full_tensor(), or a full state_dict)")
        elif tensor.layout is not torch.strided:
            layout = str(tensor.layout).removeprefix("torch.")
            found.setdefault("layout", f"{name} is a {layout} tensor: make it dense (to_dense()) before merging")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # said elsewhere
        packed = [k for k, v in vars(module).items() if isinstance(v, torch.ScriptObject)]
        if packed:
            where = f"{name}.{packed[0]}" if name else packed[0]
            found.setdefault("quantised", f"{where} is packed (quantised) data: pass the float model")
    return list(found.values())


@contextmanager
def unwritten(model: nn.Module, args: tuple, names: Sequence[str]) -> Iterator[None]:
    """Raises TraceError when the block writes to a parameter, or to a tensor among `args` (of these names).

    A merged network runs one batch through several models' parts, and parameters are what is merged.
    """
    tensors = {f"its own parameter {n}": p for n, p in model.named_parameters()}
    for name, value in zip(names, args, strict=False):
        tensors |= {f"its input {name}": x for x in tree_flatten(value)[0] if isinstance(x, Tensor)}
    before = {n: t._version for n, t in tensors.items() if not t.is_inference()}
    yield
    written = [n for n, version in before.items() if tensors[n]._version != version]
    if written:
        raise TraceError(
            f"{type(model).__name__}.forward writes to {', '.join(written)}: work on a copy (x = x.clone()),"
            " or use an operator that is not in place"
        )


@contextmanager
def kept_rng(tensors: Iterable[Tensor]) -> Iterator[None]:
    """torch's (CPU and the tensors' GPUs), Python's and numpy's random state, as they were before."""
    devices = sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})
    python, legacy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)


@contextmanager
def seeded(seed: int, tensors: Iterable[Tensor] = ()) -> Iterator[None]:
    """`kept_rng`, with the generators of torch at `seed`: the CPU's and those of the tensors' GPUs, no others, as
    `torch.manual_seed` would set all there are."""
    gpus = {t.device.index or 0: t for t in tensors if t.device.type == "cuda"}
    with kept_rng(gpus.values()):
        torch.default_generator.manual_seed(seed)
        for index in gpus:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Fused and vendor kernels off: inference and the FLOP counter cannot look into them, and they tie a graph to one
    device; and NNPACK, which would take over convolutions from them, is no faster, and never gives its memory back."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    mkldnn = torch._C._get_mkldnn_enabled()  # the public flags() warns about TF32 on every use
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        torch._C._set_mkldnn_enabled(False)
        nnpack = torch.backends.nnpack.flags(enabled=False)
        with torch.backends.cudnn.flags(enabled=False), nnpack, sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        torch._C._set_mkldnn_enabled(mkldnn)


def recorded(func: Callable[..., Any], args: tuple, kwargs: dict[str, Any], onednn: bool) -> Any:
    """What an operator gives while it is recorded, under `plain_kernels`. A convolution goes to oneDNN, where the user
    has that on (`onednn`): it is in the graph already, and without it a depthwise one takes ten times as long."""
    if not onednn or func is not torch.ops.aten.convolution.default:
        return func(*args, **kwargs)
    torch._C._set_mkldnn_enabled(True)
    try:
        return func(*args, **kwargs)
    finally:
        torch._C._set_mkldnn_enabled(False)
