"""Lower a GraphModule to a functional graph of ATen operators.

The GraphModule runs once, by an fx Interpreter, beneath `torch.func.functionalize`; a dispatch mode below
that sees every ATen call with in-place writes already turned into pure operators. Parameters and inputs are
arguments of the functionalised function, so writes on them are functional too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._pytree import tree_flatten, tree_map

from ..errors import FxzipError, InputError, TraceError
from .guards import kept_rng, plain_kernels
from .interpreter import Interpreter
from .linear import whole_linear
from .lines import where
from .recorder import Recorder, random_forward
from .state import state_by_all_names


@dataclass(frozen=True)
class Lowered:
    """The functional ATen graph of one GraphModule at one input shape.

    graph: placeholders (parameters, buffers, inputs, constants), `call_function` nodes of OpOverloads (and
        `operator.getitem` for operators with several results), output. Nothing mutates.
    parameters: name of every parameter and buffer -> its placeholder; tied tensors once, by first name.
    tied: every other name of a tied tensor -> its first name.
    inputs: placeholders of the tensors among the arguments, in pytree order.
    outputs: the model's output with each tensor replaced by its node.
    values: FX node name -> nodes of its tensor outputs, flattened.

    Every node has meta "shape", "dtype", "origin" (FX node name or None), "line" (`net.py:41: x = ...`).
    "const" holds the tensor where the value depends on no parameter, saved floating buffer or input *value*
    ("fixed" if not on their shapes or on other buffers either);
    "results" is (shape, dtype) or None per result of an operator with several. Parameter placeholders also
    have "parameter" (name), "kind" ("parameter" or "buffer") and "value" (the tensor lowered with).
    """

    graph: fx.Graph
    parameters: Mapping[str, fx.Node]
    tied: Mapping[str, str]
    inputs: tuple[fx.Node, ...]
    outputs: Any
    values: Mapping[str, tuple[fx.Node, ...]]


def lower(graph_module: fx.GraphModule, args: tuple) -> Lowered:
    """Functional ATen graph of `graph_module(*args)`; module, arguments, modes and RNG stay as they are.

    Operators are recorded beneath the composite ones, with fused CPU, cuDNN and attention kernels off, so
    that the graph runs on any device. Raises TraceError (naming node and line) for a random forward, for a
    write that stays in place, and for a parameter-dependent value that is read into Python.

    >>> gm = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 2), nn.ReLU(inplace=True)).eval())
    >>> [n.name for n in lower(gm, (torch.ones(1, 3),)).graph.nodes if n.op == "call_function"]
    ['linear_default', 'relu_default']
    """
    if graph_module.training:
        raise InputError("lower: the module is in training mode; call eval() first")
    names, tied = _named_tensors(graph_module)
    recorder = Recorder()
    kinds = {name for name, _ in graph_module.named_parameters()}
    learned = _learned(graph_module)
    parameters = {
        name: recorder.parameter(name, x, "parameter" if name in kinds else "buffer", id(x) not in learned)
        for name, x in names.items()
    }
    # Inputs are copied: functionalize writes in-place changes of its arguments back to them.
    args = tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, args)
    inputs = tuple(recorder.input(x) for x in tree_flatten(args)[0] if isinstance(x, Tensor))
    interpreter = _Interpreter(graph_module, recorder)

    def forward(state: dict[str, Tensor], args: tuple) -> None:
        with _reparametrize_module(graph_module, state, tie_weights=True):
            outputs.append(tree_map(recorder.node_behind, interpreter.run(*args)))
        recorder.closed = True

    outputs: list[Any] = []
    plain = {name: tensor.detach() for name, tensor in names.items()}
    for name, node in parameters.items():
        recorder.bind(plain[name], node)
    with torch.no_grad(), plain_kernels(), kept_rng(names.values()), recorder, whole_linear():
        torch.func.functionalize(forward)(plain, args)
    return _finish(recorder, parameters, tied, inputs, outputs[0], interpreter.values)


class _Interpreter(Interpreter):
    """Runs the GraphModule, telling the recorder whose operators come next and noting what came out."""

    def __init__(self, graph_module: fx.GraphModule, recorder: Recorder):
        super().__init__(graph_module)
        self.extra_traceback = False
        self.recorder = recorder
        self.values: dict[str, tuple[fx.Node, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.recorder.origin = n
        try:
            result = super().run_node(n)
        except FxzipError:
            raise
        except Exception as error:
            raise TraceError(f"lowering stopped at {where(n)}: {type(error).__name__}: {error}") from error
        if n.op != "output":
            tensors = [x for x in tree_flatten(result)[0] if isinstance(x, Tensor)]
            self.values[n.name] = tuple(self.recorder.node_behind(x) for x in tensors)
        return result


def _named_tensors(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parameters and buffers by first name, and every other name -> first name."""
    first: dict[int, str] = {}
    names: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in state_by_all_names(module).items():
        if first.setdefault(id(tensor), name) == name:
            names[name] = tensor
        else:
            tied[name] = first[id(tensor)]
    return names, tied


def _learned(module: nn.Module) -> set[int]:
    """Ids of parameters and of buffers that a checkpoint holds. Others (rotary tables, masks) are part of the
    code: no permutation of the checkpoint may move their entries."""
    found = {id(p) for p in module.parameters()}
    for inner in module.modules():
        saved = inner._buffers.keys() - inner._non_persistent_buffers_set
        found |= {id(inner._buffers[name]) for name in saved}
    return found


def _finish(recorder: Recorder, parameters, tied, inputs, outputs, values) -> Lowered:
    """Close the graph, drop what neither outputs nor FX values need, refuse random outputs."""
    graph = recorder.graph
    graph.output(outputs).meta.update(shape=None, dtype=None, origin=None, line="")
    leaves = [x for x in tree_flatten(outputs)[0] if isinstance(x, fx.Node)]
    for node in ancestors(leaves):
        if node.meta.get("random"):
            raise random_forward(node.target, recorder.origins[node])
    live = ancestors([*leaves, *(n for nodes in values.values() for n in nodes)])
    for node in reversed(list(graph.nodes)):
        named = node in inputs or "parameter" in node.meta
        if node not in live and not named and node.op != "output":
            graph.erase_node(node)
    graph.lint()
    return Lowered(graph, parameters, tied, inputs, outputs, values)


def ancestors(nodes) -> set[fx.Node]:
    """`nodes` and everything they are computed from."""
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen


def corresponding(a: Lowered, b: Lowered) -> dict[str, str]:
    """Node names of `a` -> names of the same nodes in `b`, a lowering at another batch size.

    Raises TraceError at the first node whose operator or FX origin differs: the forward then takes another
    path at the other shape.
    """
    left, right = list(a.graph.nodes), list(b.graph.nodes)
    for k, (x, y) in enumerate(zip(left, right, strict=False)):
        if _signature(x) != _signature(y):
            raise TraceError(f"the graphs differ at node {k}: {_describe(x)} against {_describe(y)}")
    if len(left) != len(right):
        longer = (left if len(left) > len(right) else right)[min(len(left), len(right))]
        raise TraceError(f"the graphs have {len(left)} and {len(right)} nodes; {_describe(longer)} is in one only")
    return {x.name: y.name for x, y in zip(left, right, strict=True)}


def _signature(node: fx.Node) -> tuple:
    inputs = tuple(n.name for n in node.all_input_nodes)
    return node.op, str(node.target), node.name, node.meta.get("origin"), inputs


def _describe(node: fx.Node) -> str:
    line = node.meta.get("line")
    return f"%{node.name} = {node.target}" + (f" at {line}" if line else "")
