"""Second rung of the ladder: torch.export. Control flow on shapes works; the graph is one of ATen operators.

The exported program is brought to the form of the first rung: parameters under the model's own names, tied ones
tied, positional inputs, any batch size, batch norms as modules that keep statistics, no assertions.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.node import map_arg
from torch.utils._pytree import MappingKey, SequenceKey, tree_flatten, tree_flatten_with_path, tree_map, tree_unflatten

from ..errors import TraceError
from .call import Call
from .inputs import batch_size, rows
from .norm import RunningNorm, norm_of
from .state import state_by_all_names

aten = torch.ops.aten
BATCH = 5  # of the example while exporting: 0 and 1 are special to torch.export, 2 to 4 are sizes of other axes
_PREFIX = "model."
# What checks the export's assumptions, or does nothing in eval mode.
_CHECKS = frozenset(
    {
        "_assert_async", "_assert_scalar", "_assert_tensor_metadata", "_functional_assert_async",
        "_functional_assert_scalar", "_functional_sym_constrain_range", "sym_constrain_range",
        "sym_constrain_range_for_size",
    }
)  # fmt: skip
_IDENTITIES = frozenset({aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default,
                         aten.feature_alpha_dropout.default, aten.lift_fresh_copy.default})  # fmt: skip
NOTICE = "traced by torch.export in eval mode: train() brings back batch norms, no dropout or the like"


def exported(model: nn.Module, call: Call) -> fx.GraphModule:
    """`model` as a GraphModule of ATen operators over its own parameters, for any batch size."""
    if call.leaves:
        raise TraceError("leaf_modules: torch.export keeps no module whole")
    program = _export(model, call)
    body = _Body(model, call, program)
    return body.finish(list(body.copy(program.graph, {})))


class _Arguments(nn.Module):
    """The model as a function of its tensor arguments alone."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *args: Any) -> Any:
        return self.call.run(self.model, args)


def _export(model: nn.Module, call: Call) -> ExportedProgram:
    from torch.fx.experimental.symbolic_shapes import free_symbols  # brings sympy: half a second

    size = batch_size(call.args)
    args = rows(call.args, BATCH) if call.resizable else call.args

    def dynamic(x: Any) -> Any:
        is_batch = isinstance(x, Tensor) and x.dim() and x.shape[0] == size
        return {0: Dim.AUTO} if is_batch and call.resizable else None

    shapes = tree_map(dynamic, call.args)
    with _attention_in_parts():
        program = torch.export.export(_Arguments(model, call).eval(), args, dynamic_shapes=(shapes,), strict=False)
    inputs = {s.arg.name for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT}
    values = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in inputs]
    wanted = tree_flatten(shapes, is_leaf=lambda x: x is None or isinstance(x, dict) and Dim.AUTO in x.values())[0]
    for value, axes in zip(values, wanted, strict=True):
        if isinstance(axes, dict) and not free_symbols(value.shape[0]):
            raise TraceError(
                "the forward fixes the batch size: it loops over the batch, or makes a number of its size"
                " (int(x.shape[0]), len(x), a list of that length). Write it with tensor operations"
            )
    return program


@contextmanager
def _attention_in_parts() -> Iterator[None]:
    """Without the fused inference kernels of nn.MultiheadAttention, which no rule covers."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@dataclass(frozen=True)
class _Named:
    """A tensor of the model, not yet read."""

    name: str


@dataclass
class _Body:
    """The graph being written, and the tensors and modules it names."""

    model: nn.Module
    call: Call
    program: ExportedProgram
    graph: fx.Graph = field(default_factory=fx.Graph)
    root: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, fx.Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tensors = state_by_all_names(self.model)
        self.aliases: dict[int, list[str]] = {}
        for name, tensor in self.tensors.items():
            self.aliases.setdefault(id(tensor), []).append(name)
        self.at = next((t.device for t in self.tensors.values()), torch.device("cpu"))
        self.inputs = self._inputs()
        self.device: fx.Node | None = None
        self.specs = {s.arg.name: s for s in self.program.graph_signature.input_specs if hasattr(s.arg, "name")}

    def _inputs(self) -> list[fx.Node]:
        """A placeholder per argument; leaves of nested arguments, in order, by getitem."""
        found = []
        for name, value in zip(self.call.names, self.call.args, strict=True):
            whole = self.graph.placeholder(name)
            for path, _ in tree_flatten_with_path(value)[0]:
                node = whole
                for key in path:
                    if not isinstance(key, (SequenceKey, MappingKey)):
                        raise TraceError(f"input {name} holds a {type(value).__name__}: pass its tensors in a dict")
                    index = key.idx if isinstance(key, SequenceKey) else key.key
                    node = self.graph.call_function(operator.getitem, (node, index))
                found.append(node)
        return found

    def copy(self, source: fx.Graph, env: dict[fx.Node, Any]) -> Any:
        """Write the nodes of `source`, whose placeholders are in `env` or known from the signature."""
        waiting = iter(self.inputs)
        for node in source.nodes:
            if node.op == "output":
                return map_arg(node.args[0], lambda n, reader=node: self._read(env[n], reader))  # type: ignore[arg-type]
            if node in env:
                continue
            if node.op == "placeholder":
                env[node] = self._placeholder(node, waiting)
            elif node.op == "get_attr":
                owner: Any = source.owning_module
                env[node] = getattr(owner, str(node.target))  # the body of a higher-order operator
            else:
                env[node] = self._call(node, env)
                if isinstance(env[node], fx.Node) and env[node] not in self.inputs:
                    _describe(env[node], node)
        raise TraceError("torch.export gave a graph without an output")

    def _placeholder(self, node: fx.Node, waiting: Any) -> Any:
        spec = self.specs[node.name]
        if spec.kind is InputKind.USER_INPUT:
            return next(waiting)
        if not node.users:
            return None
        target = str(spec.target).removeprefix(_PREFIX)
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            return _Named(target)
        if spec.kind is InputKind.CONSTANT_TENSOR:
            while target in self.tensors or target in self.root:
                target += "_"
            constant: Any = self.program.constants[str(spec.target)]
            self.tensors[target] = constant.detach()
            return _Named(target)
        raise TraceError(f"torch.export lifts {spec.target} as {spec.kind.name.lower()}, which is no tensor")

    def _read(self, value: Any, reader: fx.Node) -> Any:
        """A tensor of the model as the node that reads it names it: a tied one goes by its module's name."""
        if not isinstance(value, _Named):
            return value
        aliases = self.aliases.get(id(self.tensors[value.name]), ())
        stack = [path.removeprefix(_PREFIX) for path, _ in (reader.meta.get("nn_module_stack") or {}).values()]
        own = [n for n in aliases if stack and n.rpartition(".")[0] == stack[-1]]
        name = own[0] if own else value.name
        if name not in self.attributes:
            self.root[name] = self.tensors[name]
            self.attributes[name] = self.graph.get_attr(name)
        return self.attributes[name]

    def _call(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        target: Any = node.target
        args: Any
        kwargs: Any
        norm = norm_of(node, self._name, self.tensors) if target is aten.batch_norm.default else None
        if norm is not None:
            path, momentum, eps = norm
            self.root[path] = RunningNorm(path, self.tensors, momentum, eps)
            return self.graph.call_module(path, (env[node.args[0]],))  # type: ignore[index]
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: self._read(env[n], node))
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._inline(node, args)
        if target is operator.getitem and not isinstance(args[0], fx.Node):
            return args[0][args[1]]  # of an inlined body
        if str(target).split(".")[1:2] and target.__name__.split(".")[0] in _CHECKS:
            return None
        if target in _IDENTITIES:
            return args[0]
        if target is aten.sym_size.int:
            return self.graph.call_method("size", args)
        target = aten.detach.default if target is aten.detach_.default else target  # fails on a leaf with gradient
        args, kwargs = self._movable((args, kwargs))
        return self.graph.create_node("call_function", target, args, kwargs, name=node.name)

    def _name(self, node: Any) -> str:
        """The parameter or buffer behind a placeholder of the program, or ""."""
        spec = self.specs.get(node.name) if isinstance(node, fx.Node) else None
        known = spec is not None and spec.kind in (InputKind.PARAMETER, InputKind.BUFFER)
        return str(spec.target).removeprefix(_PREFIX) if spec is not None and known else ""

    def _movable(self, value: Any) -> Any:
        """The device that the model is on is asked of its input, so that the graph can move."""
        if isinstance(value, torch.device) and value == self.at and self.inputs:
            if self.device is None:
                with self.graph.inserting_after(self.inputs[-1]):
                    self.device = self.graph.call_function(getattr, (self.inputs[0], "device"))
            return self.device
        if isinstance(value, (list, tuple)):
            return type(value)(self._movable(v) for v in value)
        return {k: self._movable(v) for k, v in value.items()} if isinstance(value, dict) else value

    def _inline(self, node: fx.Node, args: tuple) -> Any:
        """The body of `with torch.no_grad()` or of a disabled autocast; others change what is computed."""
        name = node.target._name if hasattr(node.target, "_name") else str(node.target)  # type: ignore[union-attr]
        place = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}.get(str(name))
        if place is None or (place == 4 and node.args[2]):
            raise TraceError(f"torch.export keeps {name} as an operator of its own, which fxzip cannot merge")
        body = args[place]
        holders = [n for n in body.graph.nodes if n.op == "placeholder"]
        return self.copy(body.graph, dict(zip(holders, args[place + 1 :], strict=True)))

    def finish(self, outputs: list[Any]) -> fx.GraphModule:
        """The module around the graph; what nothing uses is dropped."""
        spec = self.program.call_spec.out_spec
        self.graph.output(outputs[0] if spec is None else tree_unflatten(outputs, spec))
        self.graph.eliminate_dead_code(_has_effect)
        used = {str(n.target) for n in self.graph.nodes if n.op in ("get_attr", "call_module")}
        root = {name: value for name, value in self.root.items() if name in used}
        graph_module = fx.GraphModule(root, self.graph, type(self.model).__name__).eval()
        saved = set(self.model.state_dict(keep_vars=True))
        for path, module in graph_module.named_modules():
            for name in module._buffers:
                if (f"{path}.{name}" if path else name) not in saved:
                    module._non_persistent_buffers_set.add(name)
        return graph_module


def _has_effect(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op in ("placeholder", "output") or (schema is not None and schema.is_mutable)


def _describe(new: fx.Node, old: fx.Node) -> None:
    """The user's line and the modules that were running; values of the export stay behind."""
    if old.stack_trace:
        new.meta["stack_trace"] = old.stack_trace
    stack = {}
    for key, (path, kind) in (old.meta.get("nn_module_stack") or {}).items():
        inner = path.removeprefix(_PREFIX) if path.startswith(_PREFIX) else ""
        if inner:
            stack[key] = (inner, kind)
    new.meta["nn_module_stack"] = stack
