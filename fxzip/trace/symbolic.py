"""First rung of the ladder: torch.fx symbolic tracing. Names, module types, train and eval are kept."""

from __future__ import annotations

import inspect
import linecache
import sys
from collections.abc import Mapping
from functools import cache
from itertools import dropwhile
from traceback import FrameSummary, StackSummary, walk_stack
from types import CodeType
from typing import Any

from torch import fx, nn

from ..errors import TraceError
from .call import Call
from .norm import norms_as_modules


class _Tracer(fx.Tracer):
    def __init__(self, fixed: Mapping[str, Any], leaf_modules: tuple[str | type, ...]):
        super().__init__()
        self.fixed = fixed
        self.leaf_names = {x for x in leaf_modules if isinstance(x, str)}
        self.leaf_types = tuple(x for x in leaf_modules if isinstance(x, type))
        self.shown = cache(_shown)  # of one trace: the next may find other text in the files

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        named = module_qualified_name in self.leaf_names or isinstance(m, self.leaf_types)
        return named or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        # the user's line; fx would record it, too (record_stack_traces), but imports the compiler for it: 2 seconds
        frames = []
        for frame, line in walk_stack(sys._getframe(1)):
            linecache.lazycache(frame.f_code.co_filename, frame.f_globals)  # of a module in an archive
            frames.append((frame.f_code, line))
        inside = dropwhile(lambda at: at[0].co_name != "forward", reversed(frames))  # the model's own code
        node.stack_trace = "".join(self.shown(*at) for at in inside).strip() or None
        return node

    def _proxy_placeholder(self, name: str, concrete_args, sig, fn_for_analysis) -> Any:
        # fx keeps a placeholder and an assertion for a concrete argument; ours leaves the signature.
        if name in self.fixed:
            return self.fixed[name]
        return super()._proxy_placeholder(name, concrete_args, sig, fn_for_analysis)


def _shown(code: CodeType, line: int) -> str:
    """The lines of a traceback for one frame."""
    linecache.checkcache(code.co_filename)
    return "".join(StackSummary.from_list([FrameSummary(code.co_filename, line, code.co_name)]).format())


def symbolic(model: nn.Module, call: Call) -> fx.GraphModule:
    """`model` as a GraphModule over the same modules; arguments that `call` fixes become constants."""
    if call.forward_fn is not None:
        raise TraceError("forward_fn: only torch.export traces a function of a model")
    graph = _Tracer(call.fixed, call.leaves).trace(model)
    graph_module = fx.GraphModule(model, graph, type(model).__name__)
    saved = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._buffers.keys() - module._non_persistent_buffers_set
    }
    for name, _ in graph_module.named_buffers(remove_duplicate=False):
        if name not in saved:  # fx registers plain tensor attributes, and torch 2.13 forgets what is not persistent
            path, _, last = name.rpartition(".")
            graph_module.get_submodule(path)._non_persistent_buffers_set.add(last)
    norms_as_modules(graph_module, model)
    return graph_module


def frozen_functionals(graph_module: fx.GraphModule) -> list[fx.Node]:
    """Function calls with `training=False` baked in: train() cannot switch them on again."""
    return [n for n in graph_module.graph.nodes if n.op == "call_function" and _training(n) is False]


def _training(node: fx.Node) -> Any:
    if not callable(node.target):
        return None
    try:
        signature = inspect.signature(node.target)
        bound = signature.bind(*node.args, **node.kwargs)
    except (ValueError, TypeError):  # builtins without a signature
        return node.kwargs.get("training")
    bound.apply_defaults()
    return bound.arguments.get("training")
