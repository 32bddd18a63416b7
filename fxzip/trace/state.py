"""The tensors of a module by name: each once, or under every name it has."""

from __future__ import annotations

from torch import Tensor, nn


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of `module` by name (non-persistent buffers too), detached, not copied. A tied one
    comes once, under its first name."""
    return {name: t.detach() for name, t in (*module.named_parameters(), *module.named_buffers())}


def state_by_all_names(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of `module` (non-persistent buffers too), a tied one under each of its names; the
    module's own objects, so that `is` tells what is tied.

    >>> a = nn.Linear(2, 2, bias=False); twice = nn.Sequential(a, a)
    >>> list(state_of(twice)), list(state_by_all_names(twice))
    (['0.weight'], ['0.weight', '1.weight'])
    """
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def empty(module: nn.Module, but: nn.Module | None = None) -> None:
    """Take all tensors out of a module that is done with, but not out of parts that are `but`'s, too: modules that hold
    each other, as a GraphModule and its graph do, would keep theirs until Python's next collection of cycles."""
    kept = {id(part) for part in but.modules()} if but else set()
    for part in module.modules():
        if id(part) not in kept:
            part._parameters.clear()
            part._buffers.clear()
