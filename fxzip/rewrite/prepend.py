"""The merged body behind the networks' own stems: one network again."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map

from ..trace import batch_size, state_by_all_names, watched
from .modules import has_path, rooted
from .signature import signature
from .stems import Stems, fresh
from .zipped import KEY, Zipped


def prepend(zipped: fx.GraphModule, stems: Stems, names: Sequence[str]) -> fx.GraphModule:
    """The merged body behind copies of all stems, on the networks' inputs; names in stems end in _<task>."""
    graph, inputs, beside = fx.Graph(), [], []
    for node in stems.own[0].graph_module.graph.nodes:
        if node.op == "placeholder":
            inputs.append(graph.node_copy(node))
            inputs[-1].meta[KEY] = {"type": "", "spaces": (), "state": "merged"}  # as `annotate` says of inputs
    taken = {n.name for n in zipped.graph.nodes}
    targets: dict[str, tuple[str, str]] = {}
    owned: dict[str, dict[str, str]] = {}  # task -> node -> the network's own
    parts: list[tuple[str, nn.Module, str]] = [
        (str(n.target), zipped, str(n.target)) for n in zipped.graph.nodes if n.op in ("call_module", "get_attr")
    ]
    for name, part in zip(names, stems.parts, strict=True):
        suffix, types = re.sub(r"\W", "_", name), _types(part, stems.args)
        own, env, given, owned[name] = copy.deepcopy(part), {}, iter(inputs), {}
        for node in part.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(given)
            elif node.op == "output":
                beside.append([env[n] for n in node.args[0]])  # type: ignore[union-attr]
            else:
                new = env[node] = graph.node_copy(node, lambda n, env=env: env[n])
                new.name = _free(f"{node.name}_{suffix}", taken)
                new.meta[KEY] = {"type": types.get(node, ""), "spaces": (), "state": "per model"}
                owned[name][new.name] = node.name
                if node.op in ("call_module", "get_attr"):
                    new.target = _target(zipped, targets, name, suffix, str(node.target))
                    parts.append((new.target, own, str(node.target)))
    _behind(graph, zipped, stems, inputs, list(zip(*beside, strict=True)))
    whole = rooted(graph, parts, Zipped, "Zipped")
    whole.meta.update({k: v for k, v in zipped.meta.items() if k != KEY})
    whole.meta[KEY] = _notes(whole, zipped.meta[KEY], stems, names, targets, owned)
    with torch.no_grad():
        whole(*fresh(stems.args))
    return whole


def _behind(
    graph: fx.Graph, zipped: fx.GraphModule, stems: Stems, inputs: Sequence[fx.Node], beside: Sequence[tuple]
) -> None:
    """Copy the merged body, behind the stems' values side by side."""
    env: dict[fx.Node, fx.Node] = {}
    given = iter([*zip(beside, stems.entries, strict=True), *(inputs[k] for k in stems.inputs)])
    for node in zipped.graph.nodes:
        if node.op == "placeholder":
            here = next(given)
            if isinstance(here, fx.Node):
                env[node] = here
                here.meta = copy.copy(node.meta)
            else:
                values, (_, axis) = here
                env[node] = graph.create_node("call_function", torch.cat, (list(values), axis), name=node.name)
                env[node].meta = {KEY: {**node.meta.get(KEY, {}), "state": "per model"}}
        elif node.op == "output":
            graph.output(map_arg(node.args[0], lambda n: env[n]))
        else:
            env[node] = graph.node_copy(node, lambda n: env[n])


def _notes(
    whole: fx.GraphModule, info: dict[str, Any], stems: Stems, names: Sequence[str],
    targets: dict[str, tuple[str, str]], owned: dict[str, dict[str, str]],
) -> dict[str, Any]:  # fmt: skip
    """See `Zipped`. What a stem holds is no longer aside, nor another name of what the body holds."""
    held = {n: state_by_all_names(part) for n, part in zip(names, stems.parts, strict=True)}
    every = set().union(*held.values())
    return info | {
        "targets": info["targets"] | targets,
        "nodes": info["nodes"] | {new: old for nodes in owned.values() for new, old in nodes.items()},
        "stems": {name: frozenset(nodes) for name, nodes in owned.items()},
        "since": (stems.since, stems.entries),
        "untouched": {n: {k: v for k, v in u.items() if k not in held[n]} for n, u in info["untouched"].items()},
        "aliases": {k: v for k, v in info["aliases"].items() if k not in every},
        "example": tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, stems.args),
        "originals": tuple(
            {n: (tuple(t.shape), t.dtype) for n, t in state_by_all_names(t.graph_module).items()} for t in stems.own
        ),
        "signature": signature(whole),
    }


def _types(part: fx.GraphModule, args: tuple) -> dict[fx.Node, str]:
    """Shapes for one sample, as types are written."""
    found: dict[fx.Node, str] = {}

    def see(node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor):
            whole = value.dim() and len(value) == batch_size(args)
            found[node] = str([1, *value.shape[1:]] if whole else [*value.shape])

    watched(part, fresh(args), see)
    return found


def _target(
    zipped: fx.GraphModule, targets: dict[str, tuple[str, str]], name: str, suffix: str, old: str
) -> str:
    """The path of a task's module, which no other part of the network has."""
    found = next((new for new, owner in targets.items() if owner == (name, old)), "")
    new = found or f"{old}_{suffix}"
    while not found and (new in targets or has_path(zipped, new)):
        new += "_"
    targets[new] = (name, old)
    return new


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name
