"""Weights that are computed before each forward (weight norm, spectral norm, any parametrization), made plain."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import TraceError
from .guards import kept_rng, unwrap

# Hook classes of torch.nn.utils that set an attribute from parameters of the module, and how they are removed.
_HOOKED = {"WeightNorm": nn.utils.remove_weight_norm, "SpectralNorm": nn.utils.remove_spectral_norm}


def plain(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """`unwrap`, then a copy with plain weights where `model` computes some; a notice for each kind of either.

    >>> torch.manual_seed(0); model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    <torch._C.Generator object at ...>
    >>> bare, notices = plain(model)
    >>> list(bare.state_dict()), list(model.state_dict())[1:]
    (['bias', 'weight'], ['parametrizations.weight.original0', 'parametrizations.weight.original1'])
    """
    model, notices = unwrap(model)
    if next(_computed(model), None) is None:
        return model, notices
    model = duplicate(model)
    return model, (*notices, *make_plain(model))


def duplicate(model: nn.Module) -> nn.Module:
    """A deep copy; weights that hooks compute, which torch does not copy, are copied as values."""
    memo = {}
    for module, tensor, kind in _computed(model):
        value = vars(module).get(tensor)
        if kind in _HOOKED and isinstance(value, Tensor):
            memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


@torch.no_grad()
def make_plain(model: nn.Module) -> tuple[str, ...]:
    """Put the values that computed tensors have in eval mode in their place, in `model` itself; a notice for each
    kind. Raises TraceError where two evaluations differ or one fails."""
    names = {id(m): n for n, m in model.named_modules()}
    found = list(_computed(model))
    modes = [(m, m.training) for m in model.modules()]
    kinds: dict[str, list[str]] = {}
    with kept_rng([*model.parameters(), *model.buffers()]):
        model.eval()
        values = []  # all of them first: parametrizations may share what they are computed from
        for module, tensor, kind in found:
            label = f"{names[id(module)]}.{tensor}".removeprefix(".")
            kinds.setdefault(kind, []).append(label)
            values.append(_value(module, tensor, kind, label))
    for (module, tensor, kind), value in zip(found, values, strict=True):
        _install(module, tensor, kind, value)
    for module, training in modes:
        module.training = training
    return tuple(_notice(kind, labels) for kind, labels in kinds.items())


def _computed(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """(module, name of the tensor, by what it is computed) of each."""
    for module in list(model.modules()):
        if isinstance(module, torch.jit.ScriptModule):
            continue
        if parametrize.is_parametrized(module):
            lists: nn.ModuleDict = module.parametrizations  # pyright: ignore[reportAssignmentType]
            for tensor, steps in lists.items():
                yield module, tensor, " and ".join(type(s).__name__.lstrip("_") for s in steps.children())
        for hook in module._forward_pre_hooks.values():
            if _is_ours(hook):
                yield module, getattr(hook, "name", "weight"), type(hook).__name__


def _is_ours(hook: object) -> bool:
    return type(hook).__module__.startswith("torch.nn.utils.") and type(hook).__name__ in _HOOKED


def _value(module: nn.Module, tensor: str, kind: str, label: str) -> Tensor:
    def once() -> Tensor:
        for hook in module._forward_pre_hooks.values():
            if _is_ours(hook) and getattr(hook, "name", "") == tensor:
                hook(module, ())
        return getattr(module, tensor).detach().clone()

    try:
        first, second = once(), once()
    except Exception as error:
        raise TraceError(f"{label} cannot be computed by {kind}: {type(error).__name__}: {error}") from error
    if not first.is_meta and not torch.equal(first, second):
        raise TraceError(
            f"{label} is computed by {kind}, which is random in eval mode: make it plain before merging"
            f" (torch.nn.utils.parametrize.remove_parametrizations)"
        )
    return first


def _install(module: nn.Module, tensor: str, kind: str, value: Tensor) -> None:
    if parametrize.is_parametrized(module, tensor):
        # A copy shares its injected class with the module it was copied from, which removing would change.
        own = type(module)
        made: Any = type(own.__name__, own.__bases__, dict(own.__dict__))
        module.__class__ = made
        steps = module.get_submodule(f"parametrizations.{tensor}")
        originals = [p for p in steps._parameters.values() if p is not None]
        learned, trained = bool(originals), any(p.requires_grad for p in originals)
        parametrize.remove_parametrizations(module, tensor, leave_parametrized=True)
    else:
        hook = next(h for h in module._forward_pre_hooks.values() if _is_ours(h) and getattr(h, "name", "") == tensor)
        originals = [p for n, p in module._parameters.items() if p is not None and n.startswith(f"{tensor}_")]
        learned, trained = True, any(p.requires_grad for p in originals)
        _HOOKED[type(hook).__name__](module, tensor)
    # Under no_grad torch takes a value of several originals for a buffer.
    for place in (module._buffers, module._parameters, vars(module)):
        place.pop(tensor, None)
    if learned:
        module.register_parameter(tensor, nn.Parameter(value, requires_grad=trained))
    else:
        module.register_buffer(tensor, value)


def _notice(kind: str, labels: list[str], most: int = 3) -> str:
    more = f" and {len(labels) - most} more" if len(labels) > most else ""
    are = "are" if len(labels) > 1 else "is"
    return (
        f"{', '.join(labels[:most])}{more} {are} computed by {kind}: the value in eval mode counts, and the result has"
        " plain weights"
    )
