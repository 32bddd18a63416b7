"""Forward hooks that only look on are left out of what is traced; those that may change anything are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

_KINDS = {"_forward_pre_hooks": "forward pre-hook", "_forward_hooks": "forward hook"}


def without_onlookers(
    model: nn.Module, forward: Callable[[nn.Module], list[Tensor]]
) -> tuple[nn.Module, tuple[str, ...], list[str]]:
    """(a copy of `model` without forward hooks and pre-hooks, a notice, problems); `model` itself if it has none.

    A hook only looks on when, in one `forward` of a copy in eval mode, it returns None, writes to no tensor that is
    passed to it and sets no attribute of a module, and when the output is the same, bit for bit, without all of them.
    What hooks write down elsewhere (a list of the user's) they write down for that copy, too.

    >>> seen = []; model = nn.Linear(2, 1); handle = model.register_forward_hook(lambda m, args, out: seen.append(out))
    >>> bare, notices, problems = without_onlookers(model, lambda m: [m(torch.ones(3, 2))])
    >>> len(bare._forward_hooks), notices, problems, len(model._forward_hooks)
    (0, ('left out 1 hook that only looks on: a forward hook of the model',), [], 1)
    """
    hooks = [(name or "the model", name, attribute) for name, attribute, _, _ in _hooks(model)]
    if not hooks:
        return model, (), []
    watched, bare = copy.deepcopy(model).eval(), copy.deepcopy(model)
    problems = _watch(watched)
    modes = [(m, m.training) for m in bare.modules()]
    for _, _, table, key in _hooks(bare):
        del table[key]
    with_them, without = forward(watched), forward(bare.eval())
    for module, training in modes:
        module.training = training
    found = list(dict.fromkeys(problems))
    if not found and not _same(with_them, without):
        found = [_refusal(label, name, attribute, "the output depends on") for label, name, attribute in hooks]
    if found:
        return model, (), found
    some = ", ".join(f"a {_KINDS[attribute]} of {label}" for label, _, attribute in hooks[:3])
    more = f" and {len(hooks) - 3} more" if len(hooks) > 3 else ""
    count = "1 hook that only looks on" if len(hooks) == 1 else f"{len(hooks)} hooks that only look on"
    return bare, (f"left out {count}: {some}{more}",), []


def _hooks(model: nn.Module) -> Iterator[tuple[str, str, dict[int, Any], int]]:
    """(module, kind, table, key) of every forward hook and pre-hook."""
    for name, module in model.named_modules():
        for attribute in _KINDS:
            table = getattr(module, attribute, {})
            yield from ((name, attribute, table, key) for key in list(table))


def _watch(model: nn.Module) -> list[str]:
    """Put a watcher around every hook; the list grows while the model runs."""
    problems: list[str] = []

    def watcher(hook: Callable[..., Any], name: str, attribute: str) -> Callable[..., Any]:
        def watch(*args: Any) -> Any:
            passed = tree_flatten(args[1:])[0]
            before = [(id(x), _version(x)) for x in passed], _attributes(model)
            result = hook(*args)
            after = [(id(x), _version(x)) for x in tree_flatten(args[1:])[0]], _attributes(model)
            deeds = ["returns a value"] * (result is not None)
            deeds += ["writes to what is passed to it"] * (after[0] != before[0])
            deeds += [f"sets {key}" for key, value in after[1].items() if before[1].get(key) != value][:1]
            problems.extend(_refusal(name or "the model", name, attribute, "", deed) for deed in deeds)
            return result

        return watch

    for name, attribute, table, key in _hooks(model):
        table[key] = watcher(table[key], name, attribute)
    return problems


def _attributes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Which object every attribute of every module is, and how often it was written to."""
    found = {}
    for name, module in model.named_modules():
        for place in (vars(module), module._parameters, module._buffers):
            found |= {f"{name}.{k}".removeprefix("."): (id(v), _version(v)) for k, v in place.items()}
    return found


def _version(x: Any) -> int:
    return x._version if isinstance(x, Tensor) and not x.is_inference() else 0


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bit for bit, NaN equal to NaN."""
    return len(a) == len(b) and all(
        x.shape == y.shape and x.dtype == y.dtype and (x.is_meta or torch.equal(x, y) or _equal_but_nan(x, y))
        for x, y in zip(a, b, strict=True)
    )


def _equal_but_nan(x: Tensor, y: Tensor) -> bool:
    return x.is_floating_point() and torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)


def _refusal(label: str, name: str, attribute: str, before: str, deed: str = "") -> str:
    all_of_them = ".".join(filter(None, ("model", name, attribute)))
    way_out = f"remove it before merging (handle.remove(), or {all_of_them}.clear())"
    if before:
        return f"{before} what a {_KINDS[attribute]} of {label} writes down: {way_out}"
    return f"{label} has a {_KINDS[attribute]} that {deed}: {way_out}"
