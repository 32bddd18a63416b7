"""What the options of a call may be: one sentence for each that is wrong, before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from math import isfinite
from pathlib import Path
from sys import float_info
from typing import Any

import torch

from .measure.moments import Moments
from .memory import wrong_memory
from .processes import wrong_group
from .rewrite.outputs import HEADS


def wrong_options(options: Mapping[str, Any]) -> list[str]:
    """Problems of the options that are given, by name; an option without a rule here is taken as it is.

    >>> wrong_options({"seed": 0, "budget": -1.0})
    ['budget must be a positive number (FLOPs of the result, times one model), got -1.0']
    """
    return [text for name, rule in _RULES.items() if name in options and (text := rule(options[name]))]


def wrong_weights(value: Any, models: Any) -> list[str]:
    """What is wrong with `model_weights`: a positive number for each of `models`, by position or by name.

    >>> wrong_weights([1, 0], [nn.Identity(), nn.Identity()])
    ['model_weights must be positive numbers, got 0']
    """
    if value is None:
        return []
    keyed = isinstance(value, Mapping)
    if isinstance(value, str) or not isinstance(value, (Mapping, Sequence)):
        return [f"model_weights must be a list or dict of positive numbers, one for each model, got {value!r}"]
    if keyed and not (isinstance(models, Mapping) and set(value) == set(models)):
        named = sorted(map(str, models)) if isinstance(models, Mapping) else "a list"
        return [f"model_weights has the keys {sorted(map(str, value))}, the models are {named}"]
    if not keyed and isinstance(models, Sized) and len(value) != len(models):
        return [f"model_weights has {len(value)} numbers for {len(models)} models"]
    given = list(value.values() if keyed else value)
    odd = [w for w in given if not _positive(w)]
    if odd:
        return [f"model_weights must be positive numbers, got {odd[0]!r}"]
    return [] if isfinite(sum(map(float, given))) else ["model_weights add up to infinity: make them smaller"]


def shares(value: Any, names: Sequence[str]) -> tuple[float, ...]:
    """`model_weights` in the order of the models, adding up to 1; equal where there are none."""
    given = [1.0] * len(names) if value is None else [float(w) for w in _in_order(value, names)]
    return tuple(w / sum(given) for w in given)


def _in_order(value: Any, names: Sequence[str]) -> Iterable[float]:
    return (value[n] for n in names) if isinstance(value, Mapping) else value


def _positive(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value <= float_info.max


def _path(name: str) -> Callable[[Any], str]:
    def rule(value: Any) -> str:
        return "" if value is None or isinstance(value, str) else f"{name} must be the path of a module, got {value!r}"

    return rule


def _budget(value: Any) -> str:
    if isinstance(value, Mapping):
        fits = value and all(isinstance(s, str) and _whole(n) for s, n in value.items())
        return "" if fits else f"budget as widths must be {{name of a space: a positive integer}}, got {dict(value)!r}"
    fits = value is None or _positive(value)
    return "" if fits else f"budget must be a positive number (FLOPs of the result, times one model), got {value!r}"


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _round_to(value: Any) -> str:
    return "" if _whole(value) else f"round_to must be a positive integer (features), got {value!r}"


def _heads(value: Any) -> str:
    return "" if value in HEADS else f"heads={value!r} is unknown, take one of {', '.join(map(repr, HEADS))}"


def _seed(value: Any) -> str:
    fits = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
    return "" if fits else f"seed must be an integer of at least 0, got {value!r}"


def _verify(value: Any) -> str:
    return "" if value in (True, False, "report") else f"verify must be True, False or 'report', got {value!r}"


def _callable(name: str, takes: str) -> Callable[[Any], str]:
    def rule(value: Any) -> str:
        return "" if value is None or callable(value) else f"{name} must be a function of {takes}, got {value!r}"

    return rule


def _moments(value: Any) -> str:
    fits = value is None or isinstance(value, Moments)
    return "" if fits else f"moments must come from fxzip.collect or Moments.load, not {type(value).__name__}"


def _folder(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, (str, Path)):
        return f"resume must be a folder, got {value!r}"
    return f"resume={str(value)!r} is a file: give a folder" if Path(value).is_file() else ""


def _device(value: Any) -> str:
    """Unknown to torch, or known and not usable on this machine."""
    if isinstance(value, str) and value == "auto":
        return ""
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError):
        return f"device={value!r} is none that torch knows: take 'auto', 'cpu', 'cuda' or 'cuda:0'"
    if device.type == "meta":
        return "device='meta' holds no values: a merge computes with them"
    try:
        torch.empty(0, device=device)
    except Exception as error:  # whatever the backend raises
        return f"device={str(value)!r} cannot be used here: {str(error).splitlines()[0]}"
    return ""


_RULES: dict[str, Callable[[Any], str]] = {
    "until": _path("until"),
    "since": _path("since"),
    "budget": _budget,
    "round_to": _round_to,
    "heads": _heads,
    "seed": _seed,
    "device": _device,
    "verify": _verify,
    "forward_fn": _callable("forward_fn", "the model and its inputs"),
    "evaluate": _callable("evaluate", "a network and its task's name"),
    "moments": _moments,
    "resume": _folder,
    "memory": wrong_memory,
    "distributed": wrong_group,
}
