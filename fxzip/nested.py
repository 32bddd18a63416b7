"""Merged networks as inputs of a further merge: each enters as its tasks, which share its body."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from .errors import InputError
from .rewrite import extract
from .rewrite.zipped import KEY


def apart(models: Any, loader: Any, model_weights: Any) -> tuple[Any, Any, Any]:
    """The arguments of a merge with every merged network of separate heads replaced by `extract` of its tasks.

    In a list they stand where it stood; in a dict task "a" of network "old" is called "old_a", and a loader of "old"
    is that of all its tasks. A weight is shared out evenly; without any, every task counts alike. Anything that is
    no such call comes back as it is: the checks of `merge` say what is wrong with it. Raises InputError where two
    models would have one name.

    >>> from torch import ones; from fxzip import merge
    >>> a, b, c = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(3))
    >>> both = merge({"a": a, "b": b}, [ones(8, 4)], method="average", progress=False)
    >>> list(apart({"old": both, "c": c}, None, None)[0])
    ['old_a', 'old_b', 'c']
    """
    keyed = isinstance(models, Mapping)
    if isinstance(models, (str, nn.Module)) or not (keyed or isinstance(models, Sequence)):
        return models, loader, model_weights
    given = list(models.items()) if keyed else list(enumerate(models))
    tasks = {key: _tasks(model) for key, model in given}
    if not any(tasks.values()):
        return models, loader, model_weights

    def names(key: Any) -> list[Any]:
        return [f"{key}_{t}" for t in tasks[key]] if tasks[key] else [key]

    def parts(key: Any, model: Any) -> Iterable[Any]:
        return (extract(model, t) for t in tasks[key]) if tasks[key] else (model,)

    called = [str(name) for key, _ in given for name in names(key)] if keyed else []
    if twice := sorted({n for n in called if called.count(n) > 1}):
        raise InputError(
            f"two models would be called {twice[0]!r}: task t of a merged network N becomes 'N_t', so give one of"
            " them another name"
        )
    flat = [(name, part) for key, m in given for name, part in zip(names(key), parts(key, m), strict=True)]
    if isinstance(loader, Mapping) and keyed:
        loader = {name: loader[key] for key in loader for name in (names(key) if key in tasks else [key])}
    if isinstance(model_weights, Mapping):
        known = {k: names(k) if k in tasks else [k] for k in model_weights}
        model_weights = {n: _part(w, known[k]) for k, w in model_weights.items() for n in known[k]}
    elif isinstance(model_weights, Sequence) and len(model_weights) == len(given):
        model_weights = [_part(w, names(k)) for (k, _), w in zip(given, model_weights, strict=True) for _ in names(k)]
    return dict(flat) if keyed else [m for _, m in flat], loader, model_weights


def _tasks(model: Any) -> tuple[str, ...]:
    """The tasks of a merged network that has an output for each; () for any other module."""
    info = getattr(model, "meta", {}).get(KEY) if isinstance(model, nn.Module) else None
    return tuple(info["tasks"]) if isinstance(info, dict) and info.get("heads") == "separate" else ()


def _part(weight: Any, names: Sequence[Any]) -> Any:
    return weight / len(names) if isinstance(weight, (int, float)) else weight
