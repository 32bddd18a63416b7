"""load: a folder that save wrote, and the architecture, to the merged network."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, fx, nn

from ..errors import FxzipError, InputError
from ..rewrite import Heads, Stems, Tails, Unmerge, build, difference, join, prepend, signature, split, versions
from ..rewrite.zipped import KEY
from ..trace import Traced, compare_graphs, state_by_all_names
from ..trace.guards import kept_rng
from .architecture import modules, same_nodes, traced, wrong
from .example import example_from_json
from .plan import PLAN, TENSORS, Plan, Stored, dtype_name, dtype_of, read_plan
from .save import sha256_of

ModelFn = Callable[..., nn.Module]


def load(
    dir: str | os.PathLike[str],
    model_fn: ModelFn | Mapping[str, ModelFn] | Sequence[nn.Module],
    *,
    forward_fn: Callable[..., Any] | None = None,
) -> fx.GraphModule:
    """The network that `fxzip.save` wrote to the folder `dir`, equal bit for bit, in eval mode.

    model_fn: builds the architecture of a merged model; its weights do not matter. It is called with the
    task's name if it needs one argument (or calls its first one "task"), otherwise with none. Or a dict of
    such functions by task, or a list with a module per task; modules given are not changed. The graph is
    built again from these by the rewriter, then all tensors are put in: on the device model_fn uses, in the
    saved dtypes. forward_fn: the one given to fxzip.merge, if one was.
    Random states are as before. `report` and `extract` work on the result.
    Raises InputError: a file is missing, malformed, of a newer version or of another save; or model_fn builds
    another network, with the first node, parameter or setting that differs.
    """
    folder = Path(dir)
    plan = read_plan(folder / PLAN)
    tensors = _read_tensors(folder / TENSORS, plan)
    with kept_rng(()):
        made = modules(plan, model_fn)
        graphs = _traced_once(plan, made, forward_fn)
        graphs, stems, args = _bodies(plan, graphs)
        graphs, tails = _alike(plan, graphs, args)
        zipped = _rebuilt(plan, [t.graph_module for t in graphs], tails, args, tensors)
        zipped = prepend(zipped, stems, plan.tasks) if stems else zipped
    differs = difference(plan.signature, signature(zipped), "as saved", "from model_fn")
    if differs:
        raise wrong(plan, differs)
    built = zipped.meta[KEY]
    unmerges = {target: (spec.node, spec.task) for target, spec in plan.unmerges.items()}
    if (built["targets"], built["nodes"], built["unmerges"]) != (plan.targets, plan.nodes, unmerges):
        raise InputError(f"load: {PLAN} is malformed: targets, nodes or unmerges are not those of the graph")
    _fill(zipped, plan, tensors)
    zipped.meta[KEY] |= {
        "untouched": {t: {n: tensors[key] for n, key in held.items()} for t, held in plan.untouched.items()},
        "aliases": dict(plan.aliases),
        "state_names": plan.state_names,
        "versions": versions(made[0].state_dict()),
    }
    if plan.report is not None:
        zipped.meta[KEY]["report"] = plan.report
        rows = {row.name: row for row in plan.report.nodes}
        for node in zipped.graph.nodes:
            if row := rows.get(node.name):  # so that `readable` shows what it showed
                node.meta[KEY] = {"type": row.type, "spaces": row.spaces, "state": row.state}
    return zipped


def _traced_once(
    plan: Plan, made: Sequence[nn.Module], forward_fn: Callable[..., Any] | None
) -> list[Traced]:
    """A graph per task; a module that serves several tasks of one shape is traced once."""
    graphs: list[Traced] = []
    for i, (task, module) in enumerate(zip(plan.tasks, made, strict=True)):
        again = i > 0 and module is made[0] and plan.originals[i] == plan.originals[0]
        graphs.append(graphs[0] if again else traced(plan, task, module, forward_fn))
    return graphs


def _bodies(plan: Plan, graphs: Sequence[Traced]) -> tuple[Sequence[Traced], Stems | None, tuple]:
    """The graphs without private stems, the stems, and example arguments for the graphs."""
    device = next((t.device for t in state_by_all_names(graphs[0].graph_module).values()), torch.device("cpu"))
    args = example_from_json(plan.example, device, torch.Generator().manual_seed(0))
    if plan.since is None:
        return graphs, None, args
    since, axes = plan.since[0], dict(plan.since[1])
    try:
        made = split(graphs, args, plan.tasks, since, lambda name: axes[name])
    except (FxzipError, LookupError, RuntimeError, TypeError) as error:
        raise wrong(plan, f'it cannot be cut at since="{since}" as it was: {error}') from error
    if made is None:
        raise wrong(plan, f'nothing comes before since="{since}"')
    return *made, made[1].before(args)


def _alike(plan: Plan, graphs: Sequence[Traced], args: tuple) -> tuple[Sequence[Traced], Tails | None]:
    """The graphs, joined if they end differently."""
    problems, tails = compare_graphs(graphs, plan.tasks), None
    joined = join(graphs, args) if problems else None
    if joined and {n.name for n in joined[0][0].graph_module.graph.nodes} == plan.cut.shared | plan.cut.private:
        graphs, tails = joined
        problems = compare_graphs(graphs, plan.tasks)
    for task, found in zip(plan.tasks, graphs, strict=True):
        same_nodes(plan, task, found.graph_module)
    if problems:
        raise InputError.listing("load", [f"model_fn: {p}" for p in problems])
    return graphs, tails


def _rebuilt(
    plan: Plan, graph_modules: Sequence[fx.GraphModule], tails: Tails | None, args: tuple, tensors: Mapping[str, Tensor]
) -> fx.GraphModule:
    """The merged graph, made as `merge` made it, with tensors of the saved shapes."""
    own = {n: tensors[plan.tied.get(n, n)] for n in plan.signature.tensors}
    private: list[dict[str, Tensor]] = [{} for _ in plan.tasks]
    shared, held = {}, {t: {} for t in plan.unmerges}
    owners = (*plan.targets, *plan.unmerges)
    for name, tensor in own.items():
        target = next((t for t in owners if name == t or name.startswith(f"{t}.")), "")
        if target in plan.targets:
            task, original = plan.targets[target]
            private[plan.tasks.index(task)][original + name[len(target) :]] = tensor
        elif target:
            held[target][name[len(target) + 1 :]] = tensor
        else:
            shared[name] = tensor
    device = next((t.device for t in state_by_all_names(graph_modules[0]).values()), torch.device("cpu"))
    try:
        heads = Heads(tuple(private), _unmerges(plan, held, device), frozenset(), plan.cloned)
        return build(
            graph_modules, plan.cut, shared, heads, plan.tasks, args, as_dict=plan.as_dict, heads=plan.heads,
            shares=plan.shares, tails=tails,
        )  # fmt: skip
    except (FxzipError, LookupError, RuntimeError, TypeError) as error:
        raise InputError(f"load: {PLAN} and model_fn give no network that runs: {error}") from error


def _unmerges(
    plan: Plan, held: Mapping[str, Mapping[str, Tensor]], device: torch.device
) -> dict[str, tuple[Unmerge, ...]]:
    """Boundary node -> an op per task. A task that does not read the node gets another's, and leaves it."""
    made: dict[str, dict[str, Unmerge]] = {}
    for target, spec in plan.unmerges.items():
        op = Unmerge.from_buffers(spec.axes, held[target]).to(device)
        made.setdefault(spec.node, {})[spec.task] = op
    return {
        node: tuple(ops.get(t, next(iter(ops.values()))) for t in plan.tasks) for node, ops in made.items()
    }


# ------------------------------------------------------------------------------------------------- tensors


def _read_tensors(path: Path, plan: Plan) -> dict[str, Tensor]:
    """All tensors of the file, by key, with the strides they had."""
    if not path.is_file():
        raise InputError(f"load: no file {str(path)!r}, which belongs to {PLAN}")
    found = sha256_of(path)
    if found != plan.sha256:
        raise InputError(
            f"load: {str(path)!r} is not the file that {PLAN} was written with: its sha256 is {found[:12]}..,"
            f" expected {plan.sha256[:12]}... It is damaged, or of another save"
        )
    try:
        tensors = load_file(str(path))
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"load: {str(path)!r} is not a safetensors file ({error})") from error
    for name in (*plan.tensors, *tensors):
        if name not in tensors or name not in plan.tensors:
            here, there = (PLAN, path.name) if name in plan.tensors else (path.name, PLAN)
            raise InputError(f"load: tensor {name} is in {here} and not in {there}")
    return {name: _restored(name, tensors[name], facts) for name, facts in plan.tensors.items()}


def _restored(name: str, tensor: Tensor, facts: Stored) -> Tensor:
    """`tensor` as `facts` say, in memory too."""
    dtype = dtype_of(facts.dtype, name)
    if dtype.is_complex and tensor.is_floating_point() and tensor.shape[-1:] == (2,):
        tensor = torch.view_as_complex(tensor)
    if tuple(tensor.shape) != facts.shape or tensor.dtype != dtype:
        raise InputError(
            f"load: tensor {name} is {dtype_name(tensor.dtype)}{list(tensor.shape)} in {TENSORS} and"
            f" {facts.dtype}{list(facts.shape)} in {PLAN}"
        )
    if not tensor.numel():
        return tensor
    last = sum((n - 1) * s for n, s in zip(facts.shape, facts.strides, strict=False))
    try:
        if len(facts.strides) != tensor.dim() or last >= tensor.numel():
            raise RuntimeError("they leave holes")
        return torch.empty_strided(facts.shape, facts.strides, dtype=dtype).copy_(tensor)
    except RuntimeError as error:  # negative, or two entries at one place
        raise InputError(
            f"load: {PLAN} is malformed: strides {list(facts.strides)} of {name} ({error})"
        ) from error


def _fill(zipped: fx.GraphModule, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    """Put the saved tensors in place of the built ones, ties as saved."""
    made: dict[str, Tensor] = {}
    for path, module in list(zipped.named_modules(remove_duplicate=False)):
        for name, old in [*module._parameters.items(), *module._buffers.items()]:
            if old is None:
                continue
            full = f"{path}.{name}" if path else name
            first = plan.tied.get(full, full)
            if first not in made:
                value = tensors[first].to(old.device)
                trained = plan.tensors[first].requires_grad
                made[first] = nn.Parameter(value, trained) if isinstance(old, nn.Parameter) else value
            setattr(module, name, made[first])
    for name, tensor in state_by_all_names(zipped).items():
        if tensor is not made[plan.tied.get(name, name)]:
            raise wrong(plan, f"{name} is the same tensor as another there, and its own as saved")
