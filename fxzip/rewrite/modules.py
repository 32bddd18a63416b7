"""Copy leaf modules and parameters into a new tree under new names, with new values, ties kept."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx, nn

from ..errors import SpaceError
from ..trace import state_by_all_names

# How far a kernel reaches: no width, though it may equal one, and a wrong one need not show in any shape.
_REACH = frozenset({"kernel_size", "stride", "padding", "dilation", "output_padding"})


class Tensors:
    """The new parameters and buffers of one owner (the shared part, or one model), each made once.

    values: new values by name; names without one keep what `source` has. Tied names (one object under several
    names in `source`) give one object again.
    """

    def __init__(self, source: nn.Module, values: Mapping[str, Tensor]) -> None:
        self.values = values
        self.made: dict[str, Tensor] = {}
        self.first: dict[str, str] = {}
        seen: dict[int, str] = {}
        for name, tensor in state_by_all_names(source).items():
            self.first[name] = seen.setdefault(id(tensor), name)

    def get(self, name: str, like: Tensor) -> Tensor:
        """A Parameter or a plain tensor as `like` is, with its requires_grad, dtype and device."""
        first = self.first.get(name, name)
        if first not in self.made:
            value = self.values.get(name, like).detach().clone().to(like.device, like.dtype)
            if isinstance(like, nn.Parameter):
                value = nn.Parameter(value, requires_grad=like.requires_grad)
            self.made[first] = value
        return self.made[first]


def install(root: nn.Module, source: nn.Module, old: str, new: str, tensors: Tensors) -> None:
    """Put a copy of `source`'s attribute `old` (module, parameter or buffer) at `new` in `root`."""
    found = attribute(source, old)
    # a bare container was made for one parameter of the module, which the graph reads beside calling it
    bare = has_path(root, new) and type(attribute(root, new)) is nn.Module and isinstance(found, nn.Module)
    if has_path(root, new) and not bare:
        return  # part of a leaf that is already there
    if isinstance(found, nn.Module):
        fresh = copy.deepcopy(found)
        fill(fresh, old, tensors)
        set_path(root, new, fresh)
    elif isinstance(found, Tensor):
        set_path(root, new, tensors.get(old, found), persistent=persistent(source, old))
    else:
        raise SpaceError(
            f"the graph reads attribute {old}, a {type(found).__name__}: only modules and tensors can be kept"
        )


def fill(module: nn.Module, prefix: str, tensors: Tensors) -> None:
    """Give every parameter and buffer below `module` (at `prefix`) its new value."""
    for path, inner in list(module.named_modules(remove_duplicate=False)):
        base = ".".join(filter(None, (prefix, path)))
        sizes: dict[int, set[int]] = {}
        for name, old in [*inner._parameters.items(), *inner._buffers.items()]:
            if old is not None:
                new = tensors.get(f"{base}.{name}" if base else name, old)
                for a, b in zip(old.shape, new.shape, strict=False):
                    sizes.setdefault(a, set()).add(b)
                setattr(inner, name, new)
        _follow(inner, {a: b.pop() for a, b in sizes.items() if len(b) == 1})


def _follow(module: nn.Module, sizes: Mapping[int, int]) -> None:
    """Give integer attributes that equal an old size (groups, normalized_shape) the one new size it has.

    A size that became two different ones is left alone. Whether the module then computes what it should is
    not assumed: `widths.probe` runs the result and compares every shape with what the types say.
    """
    if all(a == b for a, b in sizes.items()):
        return

    def renewed(value: object) -> object:
        if type(value) is int:
            return sizes.get(value, value)
        if isinstance(value, (tuple, list)) and value and all(type(v) is int for v in value):
            return type(value)(sizes.get(v, v) for v in value)
        return value

    for name, value in list(vars(module).items()):
        if not name.startswith("_") and name != "training" and name not in _REACH:
            setattr(module, name, renewed(value))


def attribute(root: nn.Module, path: str) -> object:
    found: object = root
    for part in path.split("."):
        found = getattr(found, part)
    return found


def has_path(root: nn.Module, path: str) -> bool:
    found: object = root
    for part in path.split("."):
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def set_path(root: nn.Module, path: str, value: nn.Module | Tensor, persistent: bool = True) -> None:
    """Set `value` at `path`; modules on the way are made. Plain tensors become buffers."""
    *parents, last = path.split(".")
    for part in parents:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    if isinstance(value, nn.Module):
        root.add_module(last, value)
    elif isinstance(value, nn.Parameter):
        root.register_parameter(last, value)
    elif isinstance(value, torch.Tensor):
        root.register_buffer(last, value, persistent=persistent)


def persistent(root: nn.Module, path: str) -> bool:
    """Whether state_dict would list the buffer at `path`."""
    parent, _, last = path.rpartition(".")
    owner = root.get_submodule(parent)
    return last not in owner._non_persistent_buffers_set


def rooted(
    graph: fx.Graph, parts: Iterable[tuple[str, nn.Module, str]], make: type[fx.GraphModule] = fx.GraphModule,
    name: str = "GraphModule",
) -> fx.GraphModule:  # fmt: skip
    """A GraphModule, in eval mode, over tensors and modules of others; nothing is copied.

    parts: (path here, whose it is, path there). Buffers stay persistent or not, as they are there."""
    root, passing = nn.Module(), []
    for new, source, old in sorted(parts, key=lambda p: (not isinstance(attribute(p[1], p[2]), nn.Module), p[0])):
        if not has_path(root, new):  # a parameter that is also part of a module is there already
            found = attribute(source, old)
            assert isinstance(found, (nn.Module, Tensor))
            set_path(root, new, found)
            passing += [new] * (not isinstance(found, (nn.Module, nn.Parameter)) and not persistent(source, old))
    module = make(root, graph, class_name=name).eval()
    for new in passing:  # a GraphModule makes every buffer a persistent one
        path, _, last = new.rpartition(".")
        module.get_submodule(path)._non_persistent_buffers_set.add(last)
    module.graph.lint()
    return module


def versions(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Module path -> version of its part of a state_dict. `load_state_dict` of classes whose format has changed
    asks for it, and reads a file without one as the oldest."""
    metadata = getattr(state, "_metadata", None) or {}
    return {path: local["version"] for path, local in metadata.items() if local.get("version") is not None}
