"""What a merge did, gathered into its Report."""

from __future__ import annotations

import operator
import platform
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import fx, nn

from .evaluate import cost
from .heatmap import heat_maps
from .infer import Spaces
from .match import Matching
from .measure.moments import Moments
from .prepared import Prepared
from .report import LayerRow, NodeRow, Report, Size, SpaceRow
from .rewrite.zipped import KEY
from .solve import Record
from .trace import on, rows
from .trace.lines import user_line
from .version import installed


def describe(
    p: Prepared,
    zipped: fx.GraphModule,
    method: str,
    matchings: Mapping[str, Matching],
    moments: Moments,
    records: Sequence[Record],
    notices: Sequence[str],
    settings: Mapping[str, str],
) -> Report:
    """The Report of `zipped`; without the seconds."""
    device = next((t.device for t in zipped.parameters()), torch.device("cpu"))
    one = rows(on(device, p.args), 1)
    sizes = [Size(n, *_cost(m.to(device), one)) for n, m in zip(p.names, p.own, strict=True)]
    result = Size("merged", *_cost(zipped, one))
    owners = tuple(zipped.meta[KEY]["targets"])
    private = sum(t.numel() for n, t in zipped.named_parameters() if any(_inside(n, o) for o in owners))
    return Report(
        method,
        p.names,
        tuple(sizes),
        result,
        1 - private / max(result.parameters, 1),
        space_rows(p.spaces, matchings, moments),
        tuple(str(f) for f in p.spaces.frozen),
        tuple(dict.fromkeys([*p.notices, *(n for t in p.traced for n in t.notices), *notices])),
        str(p.verification) if p.verification is not None else "",
        nodes=node_rows(zipped),
        layers=tuple(
            LayerRow(r.node, r.kind, r.before, r.after, "" if r.model is None else p.names[r.model]) for r in records
        ),
        settings=settings,
        versions={"fxzip": installed(), "torch": torch.__version__, "python": platform.python_version()},
    )


def space_rows(spaces: Spaces, matchings: Mapping[str, Matching], moments: Moments) -> tuple[SpaceRow, ...]:
    """A row per merged space, with heat maps where activations were measured on two models and more."""
    rows = []
    for name, m in matchings.items():
        space = spaces[name]
        tied = dict.fromkeys(f"{s.parameter}[{s.axis}] {'/'.join(sorted(s.roles))}" for s in space.segments)
        maps = heat_maps(m, moments[name]) if name in moments and len(m.sizes) > 1 else (None, None)
        parents = tuple(p.space for p in space.parents)
        rows.append(
            SpaceRow(name, space.structure, m.sizes, m.width, m.quality, m.baseline, parents, tuple(tied), *maps)
        )
    return tuple(rows)


def node_rows(zipped: fx.GraphModule) -> tuple[NodeRow, ...]:
    """The tensor-valued nodes of a merged graph, as `annotate`, `build` and `resize` left them; shapes, constants and
    bare parameters are left out."""
    notes = zipped.meta[KEY]
    tasks, originals, unmerges = notes["tasks"], notes["nodes"], notes["unmerges"]
    rows: dict[str, NodeRow] = {}
    for node in zipped.graph.nodes:
        found = node.meta.get(KEY) or {}
        if node.op in ("get_attr", "output") or not (found.get("type") or node.op == "placeholder"):
            continue
        task, state = "", found.get("state", "")
        if node.name in originals:
            task = _task(node.name, originals[node.name], tasks)
            state = state if state.startswith("frozen") else "per model"
        elif str(node.target) in unmerges:
            task, state = unmerges[str(node.target)][1], "per model"
        rows[node.name] = NodeRow(
            node.name,
            _call(node, zipped),
            _module(node),
            tuple(i.name for i in node.all_input_nodes if i.name in rows),
            tuple(_parameters(node, zipped)),
            found.get("type", ""),
            tuple(found.get("spaces", ())),
            state,
            task,
            user_line(node),
        )
    return tuple(rows.values())


def _task(name: str, original: str, tasks: Sequence[str]) -> str:
    """The task of a private node, which is named after the original and the task."""
    suffix = name[len(original) + 1 :]
    return next((t for t in tasks if suffix.startswith("".join(c if c.isalnum() else "_" for c in str(t)))), "")


def _call(node: fx.Node, zipped: fx.GraphModule) -> str:
    if node.op == "call_module":
        return type(zipped.get_submodule(str(node.target))).__name__
    if node.op == "placeholder":
        return "input"
    if node.target is operator.getitem:
        return f"[{node.args[1]}]" if isinstance(node.args[1], int) else "getitem"
    return str(getattr(node.target, "__name__", node.target))


def _module(node: fx.Node) -> str:
    """The path of the module that a node stands in."""
    if node.op == "call_module":
        return str(node.target).rpartition(".")[0]
    stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return stack[-1] if stack else ""


def _parameters(node: fx.Node, zipped: fx.GraphModule) -> Iterator[str]:
    """Names of the parameters that a node reads, as in the models."""
    targets = zipped.meta[KEY]["targets"]
    read = [i for i in node.all_input_nodes if i.op == "get_attr"]
    for target in [str(n.target) for n in (node, *read) if n.op in ("call_module", "get_attr")]:
        original = targets[target][1] if target in targets else target
        if target == str(node.target):
            yield from (f"{original}.{n}" for n, _ in zipped.get_submodule(target).named_parameters())
        else:
            yield original


def _inside(name: str, owner: str) -> bool:
    return name == owner or name.startswith(owner + ".")


def _cost(module: nn.Module, args: tuple) -> tuple[int, int]:
    c = cost(module, args)
    return c.parameters, c.flops
