"""One graph of several models: the shared part once, the private parts side by side."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map

from ..errors import InputError, SpaceError
from ..trace import state_by_all_names
from .comparable import Comparable
from .heads import Heads
from .lists import fresh_lists
from .modules import Tensors, has_path, install, versions
from .outputs import HEADS, joined, same_outputs
from .partition import Partition
from .signature import signature
from .tails import Tails
from .zipped import KEY, Zipped


def build(
    graph_modules: Sequence[fx.GraphModule],
    cut: Partition,
    merged: Mapping[str, Tensor],
    private: Heads,
    names: Sequence[str],
    example_args: tuple,
    *,
    as_dict: bool = False,
    heads: str = "separate",
    originals: Sequence[Mapping[str, Tensor]] | None = None,
    shares: Sequence[float] | None = None,
    tails: Tails | None = None,
) -> fx.GraphModule:
    """The merged GraphModule, in eval mode.

    graph_modules: the N traced models, nodes named alike. merged: name -> tensor of the shared parameters and
    buffers (from merge_parameters). private: from head_parameters. names: one task name per model.
    example_args: run once at the end, to see that the result runs. originals: the users' state_dicts; what of
    them the graph does not use is kept aside for extract. Shared nodes, modules and parameters keep their
    names, private ones end in _<task>. forward returns a tuple (as_dict: a dict by task name) of the models'
    outputs; with heads="concat" these along axis 1, with heads="joint" so and each behind a `Comparable`, with
    heads="average" their mean, in which model i counts shares[i] (default: all alike). tails: of joined graphs; every
    model keeps its own. Nothing of the inputs is aliased.
    Raises InputError (names, heads, different graphs) and SpaceError (the result does not run).
    """
    suffixes = _check(graph_modules, names, heads)
    joint: list[Comparable] = []
    if heads != "separate":
        outputs = same_outputs(tails.own if tails else graph_modules, names, example_args, heads)
        joint = [Comparable.like(logits) for logits, *_ in outputs if heads == "joint"]
    equal = not shares or len(set(shares)) == 1
    plan = _Plan(graph_modules, cut, private, tuple(suffixes), () if equal else tuple(shares or ()), tails, joint)
    graph = _graph(plan, names, as_dict, heads)
    fresh_lists(graph)
    root = _modules(plan, merged)
    zipped = Zipped(root, graph, class_name="Zipped")
    zipped.eval()
    targets = {new: (names[i], plan.original(old)) for (i, old), new in plan.targets.items()}
    zipped.meta[KEY] = {
        "tasks": tuple(names),
        "as_dict": as_dict,
        "heads": heads,
        "shares": plan.shares,
        "targets": targets,
        "nodes": dict(plan.nodes),
        **_leftovers(plan, {*merged, *private.states[0]}, names, originals),
        **_recipe(plan, zipped, names, example_args),
    }
    graph.lint()
    _check_runs(zipped, example_args)
    return zipped


@dataclass(frozen=True)
class _Plan:
    graph_modules: Sequence[fx.GraphModule]
    cut: Partition
    private: Heads
    suffixes: tuple[str, ...]
    shares: tuple[float, ...] = ()  # of each model in the mean of the outputs; (): all alike
    tails: Tails | None = None
    joint: Sequence[Comparable] = ()  # behind each model's output
    targets: dict[tuple[int, str], str] = field(
        default_factory=dict
    )  # (model, original target) -> new target
    nodes: dict[str, str] = field(default_factory=dict)  # new private node name -> original name
    unmerges: dict[str, nn.Module] = field(default_factory=dict)  # new target -> module

    def target(self, i: int, target: str) -> str:
        """The private target of model i: the original name and the task, made unique."""
        if (i, target) not in self.targets:
            new = f"{self.original(target)}_{self.suffixes[i]}"
            while new in self.targets.values() or has_path(self.graph_modules[0], new):
                new += "_"
            self.targets[i, target] = new
        return self.targets[i, target]

    def compared(self) -> list[str]:
        """The targets of `joint`."""
        names = [f"joint_{suffix}" for suffix, _ in zip(self.suffixes, self.joint, strict=False)]
        for k, name in enumerate(names):
            while name in self.targets.values() or has_path(self.graph_modules[0], name):
                names[k] = name = f"{name}_"
        return names

    def original(self, target: str) -> str:
        """The name that the model itself has for it."""
        return self.tails.targets.get(target, target) if self.tails else target

    def owners(self, node: str) -> list[int]:
        """The models that have this private node."""
        everyone = range(len(self.suffixes))
        return [i for i in everyone if self.tails is None or node not in self.tails.foreign(i)]

    def output(self, i: int) -> Any:
        """What model i returns, as nodes of its graph."""
        found = next(n for n in self.graph_modules[i].graph.nodes if n.op == "output").args[0]
        return cast(Any, found)[i] if self.tails else found


def _check(graph_modules: Sequence[fx.GraphModule], names: Sequence[str], heads: str) -> list[str]:
    """Problems of the call, all at once; otherwise one identifier per task."""
    suffixes = [re.sub(r"\W", "_", str(n)) for n in names]
    problems = []
    if heads not in HEADS:
        problems.append(f"heads={heads!r} is unknown, take one of {', '.join(map(repr, HEADS))}")
    if len(names) != len(graph_modules):
        problems.append(f"{len(names)} names for {len(graph_modules)} models")
    if len(set(suffixes)) != len(suffixes):
        problems.append(f"task names must differ in letters, digits and underscores, got {list(names)}")
    first = [(n.name, n.op) for n in graph_modules[0].graph.nodes]
    for i, other in enumerate(graph_modules[1:], 1):
        here = [(n.name, n.op) for n in other.graph.nodes]
        if here != first:
            odd = next(
                (f"%{a[0]} / %{b[0]}" for a, b in zip(first, here, strict=False) if a != b), "its length"
            )
            problems.append(f"model {i} has another graph than model 0, first difference: {odd}")
    if problems:
        raise InputError.listing("build", problems)
    return suffixes


def _graph(plan: _Plan, names: Sequence[str], as_dict: bool, heads: str) -> fx.Graph:
    """Original node order, so that in-place ops keep their meaning; private nodes once per model."""
    graph, shared = fx.Graph(), {}
    own: list[dict[str, fx.Node]] = [{} for _ in plan.suffixes]
    by_name = [{n.name: n for n in g.graph.nodes} for g in plan.graph_modules]
    for node in plan.graph_modules[0].graph.nodes:
        if node.op == "output":
            continue
        if node.name in plan.cut.shared:
            shared[node.name] = graph.node_copy(node, lambda n: shared[n.name])
        if node.name in plan.cut.private or node.name in plan.cut.copied:
            for i in plan.owners(node.name):
                own[i][node.name] = _private_copy(plan, graph, by_name[i][node.name], i, shared, own[i])
    outputs = []
    for i, env in enumerate(own):
        outputs.append(map_arg(plan.output(i), lambda n, i=i, env=env: _read(plan, graph, n, i, shared, env)))
    if heads != "separate":
        graph.output(joined(graph, outputs, heads, plan.shares, plan.compared()))
    else:
        graph.output(dict(zip(names, outputs, strict=True)) if as_dict else tuple(outputs))
    for node in graph.nodes:
        if isinstance(node.type, str):  # of `from __future__ import annotations`: torch 2.13 cannot pickle such a graph
            node.type = None
    return graph


def _private_copy(
    plan: _Plan,
    graph: fx.Graph,
    node: fx.Node,
    i: int,
    shared: Mapping[str, fx.Node],
    env: dict[str, fx.Node],
) -> fx.Node:
    def read(n: fx.Node) -> fx.Node:
        return _read(plan, graph, n, i, shared, env)

    args, kwargs = map_arg(node.args, read), map_arg(node.kwargs, read)
    target = plan.target(i, str(node.target)) if node.op in ("call_module", "get_attr") else node.target
    name = f"{node.name}_{plan.suffixes[i]}"
    new = graph.create_node(node.op, target, args, kwargs, name=name, type_expr=node.type)
    new.meta = copy.copy(node.meta)
    plan.nodes[new.name] = node.name
    return new


def _read(
    plan: _Plan,
    graph: fx.Graph,
    node: fx.Node,
    i: int,
    shared: Mapping[str, fx.Node],
    env: dict[str, fx.Node],
) -> fx.Node:
    """Original `node` as model i's private part sees it: its own, unmerged, cloned, or shared."""
    name = node.name
    if name in env:
        return env[name]
    if name in plan.private.unmerge:
        target = f"{name}_unmerge_{plan.suffixes[i]}"
        while has_path(plan.graph_modules[0], target):
            target += "_"
        plan.unmerges[target] = plan.private.unmerge[name][i]
        env[name] = graph.create_node("call_module", target, (shared[name],), name=target)
        env[name].meta = copy.copy(node.meta)
        return env[name]
    if name in plan.private.cloned:
        env[name] = graph.call_method("clone", (shared[name],))
        env[name].meta = copy.copy(node.meta)
        return env[name]
    return shared[name]


def _modules(plan: _Plan, merged: Mapping[str, Tensor]) -> nn.Module:
    """Copies of all leaf modules and parameters under their new names; ties inside one owner stay ties."""
    root = nn.Module()
    source = plan.graph_modules[0]
    tensors = Tensors(source, merged)
    for node in source.graph.nodes:
        if node.op in ("call_module", "get_attr") and node.name in plan.cut.shared:
            install(root, source, str(node.target), str(node.target), tensors)
    for i, model in enumerate(plan.graph_modules):
        tensors = Tensors(model, plan.private.states[i])
        for (owner, old), new in plan.targets.items():
            if owner == i:
                install(root, model, old, new, tensors)
    for target, module in (*plan.unmerges.items(), *zip(plan.compared(), plan.joint, strict=True)):
        root.add_module(target, module)
    return root


def _leftovers(
    plan: _Plan, used: set[str], names: Sequence[str], originals: Sequence[Mapping[str, Tensor]] | None
) -> dict[str, Any]:
    """What extract needs to give back a complete state_dict.

    used: names that the graph uses, of models that do not end differently. untouched: per task, its entries that the
    graph does not use (auxiliary heads and the like). aliases: entries of the user's state_dict that are other names of
    used ones. state_names: all keys of any. versions: of its modules' formats, see `versions`.
    """
    if originals is None:
        return {"untouched": {}, "aliases": {}, "state_names": None, "versions": {}}
    untouched, aliases, formats = {}, {}, {}
    for i, (name, state) in enumerate(zip(names, originals, strict=True)):
        like = state if plan.tails else originals[0]
        first = {k: v for k, v in like.items() if isinstance(v, Tensor)}
        inside = set(state_by_all_names(plan.tails.own[i] if plan.tails else plan.graph_modules[0]))
        here = inside if plan.tails else used
        place = {(v.data_ptr(), v.shape): k for k, v in first.items() if k in here and v.numel()}
        same = {k: place[v.data_ptr(), v.shape] for k, v in first.items() if (v.data_ptr(), v.shape) in place}
        aliases |= {k: found for k, found in same.items() if k not in inside}
        untouched[name] = _others(state, {*here, *aliases})
        formats |= versions(like)
    return {
        "untouched": untouched,
        "aliases": aliases,
        "state_names": tuple(dict.fromkeys(k for state in originals for k in state)),
        "versions": formats,
    }


def _others(state: Mapping[str, Any], known: set[str]) -> dict[str, Tensor]:
    """Copies of the tensors that are not `known`; what a graph does not use may be in one model and not in another."""
    return {k: v.detach().clone() for k, v in state.items() if isinstance(v, Tensor) and k not in known}


def _recipe(plan: _Plan, zipped: fx.GraphModule, names: Sequence[str], args: tuple) -> dict[str, Any]:
    """What fxzip.save needs so that fxzip.load can call build again; see Zipped."""
    unmerges = {
        target: (node, names[i])
        for node, ops in plan.private.unmerge.items()
        for i, op in enumerate(ops)
        for target, module in plan.unmerges.items()
        if module is op
    }
    return {
        "cut": plan.cut,
        "cloned": plan.private.cloned,
        "unmerges": unmerges,
        "example": tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, args),
        "originals": tuple(
            {n: (tuple(t.shape), t.dtype) for n, t in state_by_all_names(g).items()}
            for g in (plan.tails.own if plan.tails else plan.graph_modules)
        ),
        "signature": signature(zipped),
    }


def _check_runs(zipped: fx.GraphModule, args: tuple) -> None:
    """A leaf module that does not take its new width shows here, not at the user's first batch."""
    try:
        with torch.no_grad():
            zipped.forward(*args)  # not by `__call__`: that of FX prints a traceback where it fails
    except Exception as error:
        raise SpaceError(
            f"the merged network does not run: {error}. If widths were changed, a module or a constant "
            "of the graph insists on the old one: keep the width of the spaces it touches"
        ) from error
