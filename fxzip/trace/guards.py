"""What a trace would drop silently: wrappers are taken off with a notice, hooks and the like are refused."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune

_HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}
# Hook classes of torch.nn.utils that recompute a weight before each forward -> how to make it plain again.
_REPARAMETRISED = {
    "WeightNorm": "torch.nn.utils.remove_weight_norm",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm",
}


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
    """Hooks, parametrizations, lazy parameters and scripted modules, one sentence each with the way out."""
    problems = []
    for name, module in model.named_modules():
        label = name or "the model"
        if isinstance(module, torch.jit.ScriptModule):
            return [*problems, f"{label} is a ScriptModule: pass the nn.Module that was scripted"]
        if any(is_lazy(p) for p in module._parameters.values() if p is not None):
            problems.append(f"{label} has uninitialised parameters: run one forward pass first")
            continue
        if parametrize.is_parametrized(module):
            for tensor in module.parametrizations:  # pyright: ignore[reportGeneralTypeIssues]
                problems.append(
                    f"{label}.{tensor} is parametrized: make it plain before merging"
                    f" (torch.nn.utils.parametrize.remove_parametrizations({label}, {tensor!r}))"
                )
        for attribute, kind in _HOOKS.items():
            for hook in getattr(module, attribute, {}).values():
                problems.append(_hook_problem(label, kind, hook))
    return problems


def _hook_problem(label: str, kind: str, hook: object) -> str:
    tensor = getattr(hook, "name", "weight")
    removal = _REPARAMETRISED.get(type(hook).__name__)
    if removal:
        kind = type(hook).__name__
        return f"{label}.{tensor} is computed by {kind}: make it plain before merging ({removal}({label}))"
    if isinstance(hook, prune.BasePruningMethod):
        tensor = getattr(hook, "_tensor_name", "weight")
        return (
            f"{label}.{tensor} is pruned by a mask: make it plain before merging"
            f" (torch.nn.utils.prune.remove({label}, {tensor!r}))"
        )
    return f"{label} has a {kind}: remove it before merging (handle.remove())"


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
