"""Whether models share one graph and compatible shapes: they are compared, never recognised."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from .ladder import Traced
from .lines import where
from .state import state_by_all_names

_MANY = 4  # names shown before "and n more"
_SIZES = (int, tuple, list)


def compare_graphs(traced: Sequence[Traced], names: Sequence[str]) -> list[str]:
    """What keeps every model's graph from being the first one's: the first difference of each.

    Compared are names of parameters, operators, their targets and wiring, module types and settings. Sizes
    (integers) may differ where any parameter's shape does: `compare_sizes` looks at those once it is known what is
    shared.

    >>> import torch; from fxzip.trace import trace
    >>> a, b = (trace(nn.Sequential(nn.Linear(2, 2), f()), torch.ones(1, 2)) for f in (nn.ReLU, nn.Tanh))
    >>> compare_graphs([a, b], ["a", "b"])
    ['a and b are not the same architecture: 1 is ReLU in a and Tanh in b']
    """
    problems = []
    for name, other in zip(names[1:], traced[1:], strict=True):
        difference = _difference(traced[0].graph_module, other.graph_module, names[0], name)
        if difference:
            problems.append(f"{names[0]} and {name} are not the same architecture: {difference}")
    return problems


def compare_sizes(graph_modules: Sequence[fx.GraphModule], names: Sequence[str], shared: Collection[str]) -> list[str]:
    """As `compare_graphs`, for the nodes `shared` alone and with all integers: one program will run for all models."""
    problems = []
    for name, other in zip(names[1:], graph_modules[1:], strict=True):
        difference = _nodes_differ(graph_modules[0], other, names[0], name, sized=True, among=shared)
        if difference:
            problems.append(f"{names[0]} and {name} are not the same architecture: {difference}")
    return problems


def compare_shapes(
    states: Sequence[Mapping[str, Tensor]],
    names: Sequence[str],
    allowed: Collection[str] = (),
    unread: Collection[str] = (),
) -> list[str]:
    """Parameters and buffers whose shape or dtype differs from the first model's, each with both; and integer
    buffers (indices) whose values do.

    states: one per model. allowed: parameters (heads) whose sizes, not number of axes, may differ. unread: integers
    that nothing reads (counters of batches), whose values may.

    >>> import torch
    >>> compare_shapes([{"w": torch.ones(2, 3)}, {"w": torch.ones(2, 4)}], ["a", "b"])
    ['w is [2, 3] in a and [2, 4] in b']
    """
    first, reference, free = names[0], states[0], {*allowed, *unread}
    problems = []
    for name, state in zip(names[1:], states[1:], strict=True):
        for key, a in reference.items():
            b = state.get(key)
            if b is None:
                problems.append(f"{key} is missing in {name}")
            elif a.dim() != b.dim() or (a.shape != b.shape and key not in allowed):
                problems.append(f"{key} is {list(a.shape)} in {first} and {list(b.shape)} in {name}")
            elif a.dtype != b.dtype:
                problems.append(f"{key} is {a.dtype} in {first} and {b.dtype} in {name}")
            elif key not in free and not _number(a) and not _equal(a, b):
                problems.append(f"{key} holds other {_kind(a)} in {name} than in {first}: a mean has no meaning")
    return problems


def alike(a: fx.GraphModule, b: fx.GraphModule, x: fx.Node, y: fx.Node) -> bool:
    """Whether two nodes of one operator call modules of one kind with equal settings, and read tensors of one shape."""
    kinds = [{k: (t.shape, t.dtype) for k, t in _state_at(m, n).items()} for m, n in ((a, x), (b, y))]
    return kinds[0] == kinds[1] and not _modules_differ(a, b, x, y, "", "")


def _state_at(module: nn.Module, node: fx.Node) -> dict[str, Tensor]:
    own = (f"{node.target}.", str(node.target)) if node.op in ("call_module", "get_attr") else ()
    return {k: t for k, t in state_by_all_names(module).items() if k.startswith(own[:1]) or k in own} if own else {}


def _number(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _kind(x: Tensor) -> str:
    return "truth values" if x.dtype is torch.bool else "integers"


def _difference(a: fx.GraphModule, b: fx.GraphModule, first: str, name: str) -> str:
    """The first difference between two graph modules, or ""."""
    keys, others = list(a.state_dict()), list(b.state_dict())
    lacks = [k for k in keys if k not in others]
    more = [k for k in others if k not in keys]
    if lacks or more:
        parts = [f"{name} lacks {_listed(lacks)}"] * bool(lacks) + [f"{first} lacks {_listed(more)}"] * bool(more)
        if lacks and more and len(lacks) < len(keys):
            parts.append("if these are other heads on one trunk, name the layer where they begin: until=")
        return "; ".join(parts)
    constant = _constant_differs(a, b, first, name)
    if constant:
        return constant
    left, right = a.state_dict(), b.state_dict()
    sized = all(left[k].shape == right[k].shape for k in keys)  # then integers must be equal too
    node = _nodes_differ(a, b, first, name, sized)
    if node:
        return node
    if len(a.graph.nodes) != len(b.graph.nodes):
        return f"{first} has {len(a.graph.nodes)} nodes and {name} {len(b.graph.nodes)}"
    return ""


def _nodes_differ(
    a: fx.GraphModule, b: fx.GraphModule, first: str, name: str, sized: bool, among: Collection[str] | None = None
) -> str:
    """The first pair of nodes (of those `among`, by the first graph's names) that are not the same."""
    for k, (x, y) in enumerate(zip(a.graph.nodes, b.graph.nodes, strict=False)):
        if among is not None and x.name not in among:
            continue
        settings = _modules_differ(a, b, x, y, first, name)
        if settings:
            return settings
        if _signature(x, sized) != _signature(y, sized):
            return f"node {k} is {_show(x)} in {first} and {_show(y)} in {name}"
    return ""


def _constant_differs(a: nn.Module, b: nn.Module, first: str, name: str) -> str:
    """Tensors outside the checkpoint are part of the program, as numbers in the code are: they must be equal."""
    left, right = (dict(m.named_buffers()) for m in (a, b))
    saved = a.state_dict().keys()
    for key in (k for k in left if k in right and k not in saved):
        if left[key].shape == right[key].shape and not _equal(left[key], right[key]):
            return (
                f"{key}, a constant that is not part of the checkpoint, has other values in {name} than in {first};"
                " make it equal, or a persistent buffer if its mean has a meaning"
            )
    return ""


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.detach().cpu(), b.detach().cpu())


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MANY} more" if len(names) > _MANY else ""
    return ", ".join(names[:_MANY]) + more


def _signature(node: fx.Node, sized: bool) -> tuple:
    """Operator, target and arguments of a node; integers only where sizes must be equal."""

    def plain(x: Any) -> Any:
        if isinstance(x, fx.Node):
            return f"%{x.name}"
        return "integer" if isinstance(x, int) and not isinstance(x, bool) and not sized else x

    target = node.target if isinstance(node.target, str) else _qualified(node.target)
    return node.op, target, repr(map_aggregate((node.args, node.kwargs), plain))


def _qualified(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', function)}"


def _show(node: fx.Node) -> str:
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
    arguments = ", ".join(map(str, (*node.args, *(f"{k}={v}" for k, v in node.kwargs.items()))))
    return f"{where(node)} = {target}({arguments})"


def _modules_differ(a: nn.Module, b: nn.Module, x: fx.Node, y: fx.Node, first: str, name: str) -> str:
    """Types and settings of the modules that two nodes call."""
    if x.op != "call_module" or y.op != "call_module" or x.target != y.target:
        return ""
    left = dict(a.get_submodule(str(x.target)).named_modules(prefix=str(x.target)))
    right = dict(b.get_submodule(str(y.target)).named_modules(prefix=str(y.target)))
    if left.keys() != right.keys():
        return (
            f"{x.target} has submodules {_listed(list(left))} in {first} and {_listed(list(right))} in {name}"
        )
    for path, module in left.items():
        kinds = [f"{type(m).__module__}.{type(m).__qualname__}" for m in (module, right[path])]
        if kinds[0] != kinds[1]:
            short = [k.rsplit(".", 1)[-1] for k in kinds]
            return f"{path} is {short[0]} in {first} and {short[1]} in {name}"
        setting = _settings_differ(module, right[path], first, name)
        if setting:
            return f"{path}.{setting}"
    return ""


def _settings_differ(a: nn.Module, b: nn.Module, first: str, name: str) -> str:
    """Hyperparameters and functions in the modules' attributes; sizes only if all their tensors have equal shapes."""
    shapes = [{k: t.shape for k, t in m.state_dict().items()} for m in (a, b)]
    left, right = vars(a), vars(b)
    for key in dict.fromkeys((*left, *right)):
        x, y = left.get(key), right.get(key)
        size = type(x) in _SIZES or type(y) in _SIZES
        if key == "training" or key.startswith("_") or (size and shapes[0] != shapes[1]):
            continue
        if (_is_setting(x) or _is_setting(y)) and not _alike(x, y):
            return f"{key} is {_value(x)} in {first} and {_value(y)} in {name}"
    return ""


def _is_setting(value: Any) -> bool:
    return type(value) in (bool, float, str, *_SIZES) or (callable(value) and not isinstance(value, nn.Module))


def _alike(a: Any, b: Any) -> bool:
    """Equal values; of functions those of one place in the code that hold equal values."""
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, FunctionType) and isinstance(b, FunctionType):
        held = [[f.__defaults__, [c.cell_contents for c in f.__closure__ or ()]] for f in (a, b)]
        return a is b or (a.__code__ == b.__code__ and _alike(*held))
    if isinstance(a, partial) and isinstance(b, partial):
        return _alike(*([f.func, f.args, sorted(f.keywords.items())] for f in (a, b)))
    if isinstance(a, MethodType) and isinstance(b, MethodType):
        return a.__func__ is b.__func__
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and _equal(a, b)
    return a is b or bool(a == b)


def _value(x: Any) -> str:
    return getattr(x, "__name__", None) or repr(x)
