"""The architecture, from the user's function: a traced module per task, compared with the saved ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from ..errors import FxzipError, InputError
from ..trace import Traced, plain, state_by_all_names, trace
from .example import example_from_json
from .plan import PLAN, Plan, dtype_name

Kind = tuple[tuple[int, ...], str]  # shape and dtype


def wrong(plan: Plan, differs: str) -> InputError:
    """The architecture is not the saved one."""
    other = f" (saved with torch {plan.torch}, this is {torch.__version__})"
    return InputError(
        f"load: model_fn builds another network than the saved one: {differs}"
        + (other if plan.torch != torch.__version__ else "")
    )


def modules(plan: Plan, model_fn: Any) -> list[nn.Module]:
    """One module per task; one object for all if model_fn takes no argument."""
    tasks = plan.tasks
    if isinstance(model_fn, Mapping):
        lacks = [t for t in tasks if t not in model_fn]
        if lacks:
            raise InputError(
                f"load: model_fn has no entry for {', '.join(map(repr, lacks))}; tasks: {', '.join(tasks)}"
            )
        return [_one(model_fn[t], t)[0] for t in tasks]
    if isinstance(model_fn, (Sequence, nn.ModuleList)) and not isinstance(model_fn, str):
        if len(model_fn) != len(tasks):
            raise InputError(f"load: {len(model_fn)} models given for {len(tasks)} tasks: {', '.join(tasks)}")
        return [_one(m, t)[0] for m, t in zip(model_fn, tasks, strict=True)]
    if isinstance(model_fn, nn.Module) or not callable(model_fn):
        raise InputError(
            f"load: model_fn must be a function that builds the model, or a dict or list with one entry per"
            f" task, not {type(model_fn).__name__}: write lambda: {type(model_fn).__name__}(...)"
            if isinstance(model_fn, nn.Module)
            else f"load: model_fn must be a function that builds the model, not {type(model_fn).__name__}"
        )
    first, by_task = _one(model_fn, tasks[0])
    return [first, *(_one(model_fn, t)[0] if by_task else first for t in tasks[1:])]


def _one(maker: Any, task: str) -> tuple[nn.Module, bool]:
    """The module, and whether it was made for this task only."""
    if isinstance(maker, nn.Module):
        return _usable(maker, task), True
    if not callable(maker):
        raise InputError(
            f"load: model_fn gives a {type(maker).__name__} for {task!r}, not a function or module"
        )
    by_task = _takes_task(maker)
    try:
        made = maker(task) if by_task else maker()
    except Exception as error:
        call = f"model_fn({task!r})" if by_task else "model_fn()"
        raise InputError(f"load: {call} fails: {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise InputError(f"load: model_fn returns a {type(made).__name__}, not an nn.Module")
    return _usable(made, task), by_task


def _takes_task(maker: Callable) -> bool:
    """Whether it needs an argument, or its first one is called "task"."""
    try:
        parameters = list(inspect.signature(maker).parameters.values())
    except (ValueError, TypeError):  # a builtin without a signature
        return False
    free = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return bool(free) and (free[0].default is inspect.Parameter.empty or free[0].name == "task")


def _usable(module: nn.Module, task: str) -> nn.Module:
    module = plain(module)[0]
    meta = next((n for n, t in state_by_all_names(module).items() if t.is_meta), None)
    if meta is not None:
        raise InputError(
            f"load: {meta} of model_fn's module for {task!r} is on the meta device; build it on a real one"
        )
    return module


def traced(
    plan: Plan, task: str, module: nn.Module, forward_fn: Callable[..., Any] | None = None
) -> Traced:
    """The module as a graph on invented inputs; its parameters are those of the merged model."""
    expected = plan.originals[plan.tasks.index(task)]
    here = _kinds(module)  # what the graph does not use is in neither, its constants only in `expected`
    both = [n for n in expected if n in here]
    _same_tensors(plan, task, {n: expected[n] for n in both}, {n: here[n] for n in both})
    device = next((t.device for t in state_by_all_names(module).values()), torch.device("cpu"))
    args = example_from_json(plan.example, device, torch.Generator().manual_seed(0))
    names = [target for _, op, target, _ in plan.signature.nodes if op == "placeholder"]
    if not isinstance(args, tuple) or len(args) != len(names):
        raise InputError(f"load: {PLAN} is malformed: example has not one entry per input {names}")
    # by name, so that optional arguments that were given are given again; *args have no name
    starred = any(n.startswith("*") for n in names)
    try:
        found = trace(module, args if starred else dict(zip(names, args, strict=True)), forward_fn=forward_fn)
    except FxzipError as error:
        raise InputError(
            f"load: model_fn's module for {task!r} cannot be traced as the saved one was: {error}"
        ) from error
    _same_tensors(plan, task, expected, _kinds(found.graph_module))
    return found


def _kinds(module: nn.Module) -> dict[str, Kind]:
    return {n: (tuple(t.shape), dtype_name(t.dtype)) for n, t in state_by_all_names(module).items()}


def _same_tensors(plan: Plan, task: str, expected: Mapping[str, Kind], found: Mapping[str, Kind]) -> None:
    for name in (*expected, *found):
        if name not in found:
            raise wrong(plan, f"it has no {name}, which {task} had")
        if name not in expected:
            raise wrong(plan, f"it has {name}, which {task} had not")
        if expected[name] != found[name]:
            there, here = (f"{dtype}{list(shape)}" for shape, dtype in (expected[name], found[name]))
            raise wrong(
                plan, f"{name} of {task} was {there} when merged and is {here} in model_fn's{_hint(plan)}"
            )


def _hint(plan: Plan) -> str:
    """For models of different sizes."""
    same = all(o == plan.originals[0] for o in plan.originals)
    return "" if same else "; these models differ in sizes, so model_fn needs the task's name as its argument"


def same_nodes(plan: Plan, task: str, graph_module: fx.GraphModule) -> None:
    """Raises InputError unless these are the nodes that the merge knew."""
    nodes, known = [n.name for n in graph_module.graph.nodes], plan.cut.shared | plan.cut.private
    more = next((n for n in nodes if n not in known), None)
    if more is not None:
        raise wrong(plan, f"its graph has a node %{more}, which that of {task} had not")
    lacks = sorted(known - set(nodes))
    if lacks:
        raise wrong(plan, f"its graph has no node %{lacks[0]}, which that of {task} had")
