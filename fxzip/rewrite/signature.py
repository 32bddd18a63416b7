"""What a merged network is apart from its values: recorded when built, compared when saved and loaded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.fx.node import map_aggregate

from ..trace import state_by_all_names

SETTINGS = (bool, int, float, str, tuple, list, type(None))  # types of attributes that set what a leaf does


@dataclass(frozen=True)
class Signature:
    """nodes: (name, op, target, arguments) in graph order. modules: path of each module that a node calls,
    and of those inside -> its class and settings. tensors: name -> shape, of all parameters and buffers."""

    nodes: tuple[tuple[str, str, str, str], ...]
    modules: Mapping[str, Mapping[str, str]]
    tensors: Mapping[str, tuple[int, ...]]


def signature(graph_module: fx.GraphModule) -> Signature:
    """The Signature of a graph module.

    >>> signature(fx.symbolic_trace(nn.Sequential(nn.ReLU()))).nodes[1]
    ('_0', 'call_module', '0', '((%input_1,), {})')
    """
    nodes = tuple((n.name, n.op, _plain(n.target), _arguments(n)) for n in graph_module.graph.nodes)
    modules: dict[str, Mapping[str, str]] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            leaf = graph_module.get_submodule(str(node.target))
            inner = leaf.named_modules(prefix=str(node.target), remove_duplicate=False)
            modules.update((path, _settings(m)) for path, m in inner)
    return Signature(nodes, modules, {n: tuple(t.shape) for n, t in state_by_all_names(graph_module).items()})


def difference(a: Signature, b: Signature, first: str, second: str, ordered: bool = True) -> str:
    """The first thing that differs, or "". first, second: where each is from, for the sentence.

    ordered: compare nodes one by one; otherwise calls only, in any order and under any name (unpickling
    renames nodes and moves those that read attributes).
    """
    tensors = _tensors_differ(a.tensors, b.tensors, first, second)
    nodes = _nodes_differ(a, b, first, second) if ordered else _calls_differ(a, b, first, second)
    return tensors or nodes or _modules_differ(a, b, first, second)


def _tensors_differ(
    a: Mapping[str, tuple[int, ...]], b: Mapping[str, tuple[int, ...]], first: str, second: str
) -> str:
    for name in (*a, *b):
        if name not in b or name not in a:
            here, there = (first, second) if name in a else (second, first)
            return f"{name} is a tensor {here} and missing {there}"
        if a[name] != b[name]:
            return f"{name} is {list(a[name])} {first} and {list(b[name])} {second}"
    return ""


def _nodes_differ(a: Signature, b: Signature, first: str, second: str) -> str:
    for x, y in zip(a.nodes, b.nodes, strict=False):
        if x != y:
            return f"node %{x[0]} is {_show(x)} {first} and {_show(y)} {second}"
    if len(a.nodes) != len(b.nodes):
        return f"the graph has {len(a.nodes)} nodes {first} and {len(b.nodes)} {second}"
    return ""


def _calls_differ(a: Signature, b: Signature, first: str, second: str) -> str:
    calls = [Counter(n[1:3] for n in s.nodes if n[1].startswith("call")) for s in (a, b)]
    for call in (*calls[0], *calls[1]):
        if calls[0][call] != calls[1][call]:
            return f"{call[1]} is called {calls[0][call]} times {first} and {calls[1][call]} times {second}"
    return ""


def _modules_differ(a: Signature, b: Signature, first: str, second: str) -> str:
    for path in (*a.modules, *b.modules):
        if path not in a.modules or path not in b.modules:
            here, there = (first, second) if path in a.modules else (second, first)
            return f"{path} is a module {here} and missing {there}"
        left, right = a.modules[path], b.modules[path]
        for key in left:  # a setting that only one side knows is from another version of torch
            if key in right and left[key] != right[key]:
                label = path if key == "type" else f"{path}.{key}"
                return f"{label} is {left[key]} {first} and {right[key]} {second}"
    return ""


def _show(node: tuple[str, str, str, str]) -> str:
    name, op, target, arguments = node
    return f"{op} %{name} {target} {arguments}" if len(arguments) < 80 else f"{op} %{name} {target}"


def _settings(module: nn.Module) -> dict[str, str]:
    """Class, and attributes that are plain values or functions, as text."""
    found = {"type": _plain(type(module))}
    for key, value in vars(module).items():
        known = isinstance(value, SETTINGS) or (callable(value) and hasattr(value, "__qualname__"))
        if known and key != "training" and not key.startswith("_"):
            found[key] = _text(value)
    return found


def _arguments(node: fx.Node) -> str:
    return _text((tuple(node.args), dict(node.kwargs)))


def _text(value: Any) -> str:
    def plain(x: Any) -> Any:
        if isinstance(x, fx.Node):
            return _Bare(f"%{x.name}")
        return _Bare(_plain(x)) if callable(x) and hasattr(x, "__qualname__") else x

    return re.sub(r" at 0x[0-9a-f]+", "", repr(map_aggregate(value, plain)))


class _Bare(str):
    """Text that repr shows without quotes."""

    __repr__ = str.__str__


def _plain(target: Any) -> str:
    """A target as text: functions and classes by their full name."""
    if isinstance(target, str) or not hasattr(target, "__qualname__"):
        return str(target)
    return f"{getattr(target, '__module__', None) or 'torch'}.{target.__qualname__}"
