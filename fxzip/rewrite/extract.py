"""One task's network out of a merged one, under the original names."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from ..errors import InputError
from .modules import attribute, has_path, persistent, set_path
from .outputs import own_output
from .tails import meet
from .zipped import KEY, Zipped, notes


def extract(zipped: fx.GraphModule, task: str | int) -> fx.GraphModule:
    """The network of one task: its output only, suffixes dropped, a copy that shares nothing with `zipped`.

    task: a task name, or the position of its model. What the merged graph never used (auxiliary heads) comes
    back from that task's model, so after a full same-width merge the state_dict loads with strict=True into
    the user's class. Where the task reads merged features through an operator of its own, the state_dict has its
    buffers (`..._unmerge_<task>.`): the class lacks it, and load_state_dict says so. So with private stems (`since=`):
    what is shared reads the stems of all tasks, and the others' are in it under their names here. Works on a deepcopy
    or an unpickled copy, too. Mode (train or eval) is kept.
    Raises InputError for an unknown task, or a module that fxzip.merge did not make.
    """
    info = notes(zipped)
    name = _task(info["tasks"], task)
    output = _output(zipped, info, name)
    others = {target for target, (owner, _) in info["targets"].items() if owner != name}
    keep = _kept(zipped, output, others)
    graph, moved = _graph(zipped, info, name, output, keep)
    root, memo = nn.Module(), {}
    for old, new in moved.items():
        if not has_path(root, new):
            found = copy.deepcopy(attribute(zipped, old), memo)
            assert isinstance(found, (nn.Module, Tensor))
            set_path(root, new, found, persistent(zipped, old))
    single = Zipped(root, graph, class_name="Extracted")
    _restore(single, info["untouched"].get(name, {}), info["aliases"])
    _forget(single, info["state_names"], {*info.get("unmerges", ()), *others})
    for path, version in info["versions"].items():
        if not path or isinstance(single.get_submodule(path) if has_path(single, path) else None, nn.Module):
            single.get_submodule(path)._version = version
    for module in single.modules():
        if module is single or type(module) is nn.Module:  # leaf modules keep their own mode
            module.training = zipped.training
    single.meta[KEY] = {"task": name}
    graph.lint()
    return single


def _task(tasks: tuple[str, ...], task: str | int) -> str:
    if isinstance(task, int) and not isinstance(task, bool) and -len(tasks) <= task < len(tasks):
        return tasks[task]
    if task in tasks:
        return str(task)
    close = difflib.get_close_matches(str(task), tasks, n=1)
    hint = f", did you mean {close[0]!r}?" if close else ""
    raise InputError(f"extract: no task {task!r}{hint} Tasks: {', '.join(map(repr, tasks))}")


def _output(zipped: fx.GraphModule, info: Mapping[str, Any], task: str) -> Any:
    """The task's part of the output structure, as nodes."""
    value = next(n for n in zipped.graph.nodes if n.op == "output").args[0]
    place = info["tasks"].index(task)
    if info["heads"] != "separate":
        return map_arg(value, lambda joined: own_output(joined, place, info["heads"]))
    return value[task] if info["as_dict"] else value[place]


def _kept(zipped: fx.GraphModule, output: Any, others: set[str]) -> set[fx.Node]:
    """Inputs, ancestors of `output`, and what leads to no output (asserts, in-place ops) if it can stay."""
    nodes = list(zipped.graph.nodes)
    mine: set[fx.Node] = set()
    map_arg(output, lambda n: mine.add(n) or n)
    useful = {n for n in nodes if n.op == "output"}
    for node in reversed(nodes):
        useful |= set(node.all_input_nodes) if node in useful else set()
        mine |= set(node.all_input_nodes) if node in mine else set()
    keep: set[fx.Node] = set()
    for node in nodes:
        idle = (
            node not in useful
            and str(node.target) not in others
            and all(i in keep for i in node.all_input_nodes)
        )
        if node in mine or node.op == "placeholder" or (idle and node.all_input_nodes):
            keep.add(node)
    return keep


def _graph(
    zipped: fx.GraphModule, info: Mapping[str, Any], task: str, output: Any, keep: set[fx.Node]
) -> tuple[fx.Graph, dict[str, str]]:
    """The kept nodes under their original names, and target in `zipped` -> target in the new module."""
    graph, env, moved = fx.Graph(), {}, {}
    targets = {str(n.target) for n in keep if n.op in ("call_module", "get_attr")}
    shared = {t for t in targets if t not in info["targets"]}
    stems = info.get("stems", {})
    foreign = frozenset().union(*(names for t, names in stems.items() if t != task))
    stem = {str(n.target) for n in keep if n.name in stems.get(task, ())} & info["targets"].keys()
    taken = {info["targets"][t][1] for t in stem}
    for node in zipped.graph.nodes:
        if node not in keep:
            continue
        target = node.target
        if node.op in ("call_module", "get_attr"):
            owner, original = info["targets"].get(str(target), (task, str(target)))
            rivals = set() if str(target) in shared else shared if str(target) in stem else taken
            if owner != task or any(meet(original, t) for t in rivals):
                original = str(target)  # another's stem, or what was one with a part of this task's and no longer is
            # a module that both parts use keeps its suffix: the original name belongs to the shared copy
            target = original if original not in shared or str(target) in shared else str(target)
            moved[str(node.target)] = target
        args = map_arg(node.args, lambda n: env[n])
        kwargs = map_arg(node.kwargs, lambda n: env[n])
        name = node.name if node.name in foreign else info["nodes"].get(node.name, node.name)
        env[node] = graph.create_node(node.op, target, args, kwargs, name=name, type_expr=node.type)
        env[node].meta = copy.copy(node.meta)
    graph.output(map_arg(output, lambda n: env[n]))
    return graph, moved


def _restore(module: nn.Module, untouched: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
    """Add what the graph never used: floats as parameters without gradient, the rest as buffers."""
    for name, value in untouched.items():
        fresh = value.detach().clone()
        if has_path(module, name):
            here = attribute(module, name)
            trainable = isinstance(here, nn.Parameter) and here.requires_grad
            parameter = isinstance(here, nn.Parameter)
        else:
            trainable, parameter = False, fresh.is_floating_point() or fresh.is_complex()
        set_path(module, name, nn.Parameter(fresh, requires_grad=trainable) if parameter else fresh)
    for name, first in aliases.items():
        if not has_path(module, first):  # of another task's own end
            continue
        found = attribute(module, first)
        assert isinstance(found, Tensor)
        set_path(module, name, found)


def _forget(module: nn.Module, state_names: tuple[str, ...] | None, ours: Collection[str]) -> None:
    """Buffers that the user's state_dict does not list stay out of this one too; but for those of `ours`, modules
    without which the network would be another."""
    if state_names is None:
        return
    for path, inner in module.named_modules():
        for name in inner._buffers if not any(f"{path}.".startswith(f"{o}.") for o in ours) else ():
            if (f"{path}.{name}" if path else name) not in state_names:
                inner._non_persistent_buffers_set.add(name)
