"""Pre-flight checks of a merge: every problem of a call at once, before anything expensive."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .errors import InputError, TraceError
from .loaders import first_batches
from .trace import (
    beside,
    bind,
    call_signature,
    compare_graphs,
    compare_shapes,
    describe,
    plain,
    plain_batch,
    rows,
    tensors_of,
)
from .trace.guards import kept_rng, untraceable
from .trace.hooks import without_onlookers

__all__ = ["Checked", "check_merge", "compare_graphs", "compare_shapes", "unusable"]


@dataclass(frozen=True)
class Checked:
    """What a merge works on. names: one per model; models: the user's own, wrappers taken off, or a copy with
    plain weights where some are computed; loader: as
    given (one, or one per task, or None) but safe to iterate again; example: the example inputs, or the first
    batch of the first loader; notices: for the user."""

    names: tuple[str, ...]
    models: tuple[nn.Module, ...]
    loader: Iterable | dict[str, Iterable] | None
    example: Any
    notices: tuple[str, ...] = ()

    @property
    def as_dict(self) -> dict[str, nn.Module]:
        """Models by name."""
        return dict(zip(self.names, self.models, strict=True))


def check_merge(
    models: Sequence[nn.Module] | Mapping[str, nn.Module],
    loader: Iterable | Mapping[str, Iterable] | None = None,
    *,
    names: Sequence[str] | None = None,
    example_inputs: Any = None,
    calibration: int = 2048,
    needs_data: bool = False,
    problems: Sequence[str] = (),
    call: str = "fxzip.merge",
    forward_fn: Callable[..., Any] | None = None,
) -> Checked:
    """Check the arguments of a merge; models, hooks, modes and random states stay as they are.

    needs_data: a loader is required. problems: what the caller found already, listed with the rest.
    Raises one InputError that lists everything wrong. Graphs and widths are compared once there are graphs,
    by `compare_graphs` and `compare_shapes`.

    >>> check_merge([nn.Linear(2, 1), nn.Linear(2, 1)], [torch.ones(3, 2)]).names
    ('task0', 'task1')
    """
    found = list(problems)
    modules = _models(models, found)
    tasks = _names(models, names, found)
    if isinstance(calibration, bool) or not isinstance(calibration, int) or calibration <= 0:
        found.append(f"calibration must be a positive number of samples, got {calibration!r}")
    if loader is None and needs_data:
        found.append(
            "loader is missing: this method reads batches (any iterable of them, labels are ignored)"
        )
    elif loader is None and example_inputs is None:
        found.append("neither loader nor example_inputs: tracing needs one batch as an example")
    loader, batches = first_batches(loader, tasks, found)
    made = [_plain_model(m, task, found) for task, m in zip(tasks, modules, strict=False)]
    for task, (module, _) in zip(tasks, made, strict=False):
        whole = untraceable(module)
        found += [f"{task}: {problem}" for problem in whole or unusable(module)]
    found += [] if found else _unlike([m for m, _ in made], tasks)
    if not found:
        if example_inputs is not None:
            found += _misfit(made[0][0], example_inputs, f"example_inputs do not fit {tasks[0]}", forward_fn)
        for task, batch in batches.items():
            found += _misfit(made[tasks.index(task)][0], batch, f"batches do not fit {task}", forward_fn)
    if not found:
        shared = next(iter(batches.values()), example_inputs)
        hooks = [_busy_hooks(m, batches.get(t, shared), forward_fn) for t, (m, _) in zip(tasks, made, strict=True)]
        found = [f"{task}: {problem}" for task, several in zip(tasks, hooks, strict=True) for problem in several]
    if found:
        raise InputError.listing(call, found)
    example = example_inputs if example_inputs is not None else next(iter(batches.values()))
    notices = tuple(
        f"{task}: {text}" for task, (_, texts) in zip(tasks, made, strict=True) for text in texts
    )
    return Checked(tuple(tasks), tuple(m for m, _ in made), loader, example, notices)


# ---------------------------------------------------------------------------------------------- models


def _models(models: Any, found: list[str]) -> list[nn.Module]:
    """The models as a list; what is none of them goes to `found`."""
    if isinstance(models, nn.Module) and not isinstance(models, (nn.ModuleList, nn.ModuleDict)):
        found.append(f"models is a single {type(models).__name__}: pass a list or dict of at least two")
        return []
    if not isinstance(models, (Sequence, Mapping, nn.ModuleList, nn.ModuleDict)) or isinstance(models, str):
        found.append(f"models must be a list or dict of nn.Modules, not {type(models).__name__}")
        return []
    keyed = isinstance(models, (Mapping, nn.ModuleDict))
    pairs = list(models.items()) if keyed else list(enumerate(models))
    if len(pairs) < 2:
        found.append(f"{('no models', 'one model')[len(pairs)]} given: a merge needs at least two")
    for key, model in pairs:
        if not isinstance(model, nn.Module):
            found.append(f"models[{key!r}] is {_kind(model)}")
    return [model for _, model in pairs if isinstance(model, nn.Module)]


def _kind(thing: Any) -> str:
    if isinstance(thing, type) and issubclass(thing, nn.Module):
        return f"the class {thing.__name__}, not an instance of it"
    if isinstance(thing, Mapping):
        return "a mapping, not an nn.Module: load a state_dict into its architecture first"
    return f"of type {type(thing).__name__}, not an nn.Module"


def _plain_model(model: nn.Module, task: str, found: list[str]) -> tuple[nn.Module, tuple[str, ...]]:
    try:
        return plain(model)
    except TraceError as error:
        found.append(f"{task}: {error}")
    except Exception as error:
        found.append(f"{task}: {type(model).__name__} cannot be deep-copied: {type(error).__name__}: {error}")
    return model, ()


def _names(models: Any, names: Sequence[str] | None, found: list[str]) -> list[str]:
    """Task names: given, the keys of a dict, or task0, task1, ..."""
    count = len(models) if hasattr(models, "__len__") else 0
    keyed = isinstance(models, (Mapping, nn.ModuleDict))
    tasks = (
        list(names) if names is not None else list(models) if keyed else [f"task{k}" for k in range(count)]
    )
    if len(tasks) != count:
        found.append(f"{len(tasks)} names for {count} models")
    seen: dict[str, str] = {}
    for name in tasks:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][\w-]*", name):
            found.append(
                f"task name {name!r} must be letters, digits, _ and -: it becomes part of module names"
            )
            continue
        plain = name.replace("-", "_")
        if plain in seen:
            other = "twice" if seen[plain] == name else f"too like {seen[plain]!r}"
            found.append(
                f"task name {name!r} is used {other}"
                if other == "twice"
                else f"task name {name!r} is {other}"
            )
        seen[plain] = name
    return [str(name) for name in tasks]


def unusable(model: nn.Module) -> list[str]:
    """NaN, infinity and missing data in parameters and buffers, by name."""
    problems = []
    tensors = (*model.named_parameters(), *model.named_buffers())
    empty = [name for name, tensor in tensors if tensor.is_meta]
    if empty:
        more = f" ({len(empty)} of {len(tensors)} tensors are)" if len(empty) > 1 else ""
        problems.append(f"{empty[0]} is on the meta device and has no values{more}")
    for name, tensor in tensors:
        if is_lazy(tensor) or tensor.is_meta:
            continue  # said elsewhere
        if name.endswith("running_var") and bool((tensor < 0).any()):
            problems.append(f"{name} is a variance and holds negative values ({int((tensor < 0).sum())})")
        elif tensor.is_floating_point():
            bad = int(broken(name, tensor).sum())
            kind = "NaN" if bad and bool(tensor.detach().isnan().any()) else "infinite values"
            problems += [f"{name} holds {kind} ({bad} of {tensor.numel()} entries)"] * (bad > 0)
    return problems


def broken(name: str, tensor: Tensor) -> Tensor:
    """bool, shape of `tensor`: its entries that no sound network holds. Infinity is meant in masks and limits, which
    are buffers, not in what is learned or in norm statistics (a merged network may number their names)."""
    meant = not isinstance(tensor, nn.Parameter) and not re.search(r"running_(mean|var)(_\d+)?$", name)
    return tensor.detach().isnan() if meant else ~tensor.detach().isfinite()


def _unlike(models: Sequence[nn.Module], tasks: Sequence[str]) -> list[str]:
    """Models whose numbers are not of the first one's dtype; the first such tensor of each."""
    first = dict((*models[0].named_parameters(), *models[0].named_buffers())) if models else {}
    problems = []
    for task, model in zip(tasks[1:], models[1:], strict=False):
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            mine = first.get(name)
            if mine is not None and mine.dtype != tensor.dtype:
                a, b = (str(t.dtype).removeprefix("torch.") for t in (mine, tensor))
                problems.append(f"{name} is {a} in {tasks[0]} and {b} in {task}: bring the models to one dtype")
                break
    return problems


# ---------------------------------------------------------------------------------------------- data


def _misfit(
    model: nn.Module, batch: Any, complaint: str, forward_fn: Callable[..., Any] | None = None
) -> list[str]:
    """Why two rows of `batch` do not run through the model, if they do not."""
    try:
        signature, args = _two_rows(model, batch, forward_fn)
    except InputError as error:
        return [f"{complaint}: {error}"]
    try:
        copied = copy.deepcopy(model)
    except Exception as error:
        return [f"{type(model).__name__} cannot be deep-copied: {type(error).__name__}: {error}"]
    try:
        output = _run(copied.eval(), args, forward_fn)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        name = type(model).__name__
        return [f"{complaint}: {name}.forward{_plain(signature)} fails on {describe(args)}: {reason}"]
    if any(x.is_floating_point() and bool(x.isnan().any()) for x in output):
        return [f"{complaint}: {type(model).__name__} gives NaN on {describe(args)}: check the data and the weights"]
    return []


def _busy_hooks(model: nn.Module, batch: Any, forward_fn: Callable[..., Any] | None) -> list[str]:
    """Forward hooks that do more than look on; none where the model does not even run, which is said elsewhere."""
    try:
        _, args = _two_rows(model, batch, forward_fn)
        return without_onlookers(model, lambda m: _run(m, args, forward_fn))[2]
    except Exception:
        return []


def _two_rows(model: nn.Module, batch: Any, forward_fn: Callable[..., Any] | None) -> tuple[inspect.Signature, tuple]:
    signature = call_signature(model, forward_fn)
    args = bind(batch, signature)
    plain_batch(args)
    return signature, beside(rows(args, 2), model)


def _run(model: nn.Module, args: tuple, forward_fn: Callable[..., Any] | None) -> list[Tensor]:
    with kept_rng(model.parameters()), torch.no_grad():
        return tensors_of(model(*args) if forward_fn is None else forward_fn(model, *args))


def _plain(signature: inspect.Signature) -> str:
    """Names and defaults, without annotations."""
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))
