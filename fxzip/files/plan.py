"""plan.json: everything but the tensors, as typed values that check themselves when read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch

from ..errors import InputError
from ..report import Report
from ..rewrite import Partition, Signature

PLAN, TENSORS, CARD, PROGRAM = "plan.json", "model.safetensors", "README.md", "model.pt2"
RECIPE, PAGE = "recipe.yaml", "report.html"  # what the command line adds
LIMIT = 1 << 28  # bytes of a plan: a graph of 1,000 nodes takes about one million
FORMAT, VERSION = "fxzip", 1


@dataclass(frozen=True)
class Stored:
    """One tensor of the file. strides: its layout in memory, which may decide the last bits."""

    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...]
    requires_grad: bool = False


@dataclass(frozen=True)
class UnmergeSpec:
    """An Unmerge of `task` at boundary node `node`, on these axes; its buffers are in the file."""

    node: str
    task: str
    axes: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What `load` needs besides the tensors and the architecture; field by field as in `Zipped`.

    originals: per task, name -> (shape, dtype) of the models that were merged. tensors: key in the file ->
    facts; keys of the network's own tensors are their names. tied: other name -> first name. untouched:
    task -> name -> key in the file. example: see `example_to_json`. summary: str(report), to read. since: module path,
    and (node, feature axis) of what crosses there, where stems are private.
    """

    format: str
    version: int
    fxzip: str
    torch: str
    tasks: tuple[str, ...]
    as_dict: bool
    heads: str
    sha256: str
    summary: str
    report: Report | None
    cut: Partition
    cloned: frozenset[str]
    unmerges: Mapping[str, UnmergeSpec]
    targets: Mapping[str, tuple[str, str]]
    nodes: Mapping[str, str]
    example: Any
    originals: tuple[Mapping[str, tuple[tuple[int, ...], str]], ...]
    signature: Signature
    tensors: Mapping[str, Stored]
    tied: Mapping[str, str]
    untouched: Mapping[str, Mapping[str, str]]
    aliases: Mapping[str, str]
    state_names: tuple[str, ...] | None
    shares: tuple[float, ...] = ()
    since: tuple[str, tuple[tuple[str, int], ...]] | None = None


def is_merge(folder: Path) -> bool:
    """Whether a `save` has written here, whole or not: the plan.json of another program does not count."""
    try:
        with open(folder / PLAN, "rb") as file:
            return f'"format": "{FORMAT}"'.encode() in file.read(64)
    except OSError:
        return False


def strangers(folder: Path, names: Iterable[str]) -> list[str]:
    """The files of these names that `folder` holds and no `save` has written there, in a sentence; [] without any."""
    found = [] if is_merge(folder) else [n for n in names if os.path.lexists(folder / n)]
    what = f"{str(folder)!r} has a {' and a '.join(found)} that fxzip did not write"
    return [f"{what}: choose another folder, or force it (force=True, --force)"] if found else []


def read_plan(path: Path) -> Plan:
    """Parse and check plan.json. Raises InputError for what is missing, no JSON, newer or malformed."""
    try:
        if path.stat().st_size > LIMIT:
            raise InputError(f"load: {str(path)!r} has {path.stat().st_size:,} bytes, more than any plan ({LIMIT:,})")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"load: no file {str(path)!r}; is this a folder that fxzip.save wrote?") from error
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"load: {str(path)!r} cannot be read as JSON ({error})") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT or type(data.get("version")) is not int:
        raise InputError(f"load: {str(path)!r} was not written by fxzip.save")
    if data["version"] > VERSION:
        raise InputError(
            f"load: {str(path)!r} has format version {data['version']} (fxzip {data.get('fxzip')}), newer"
            f" than {VERSION}, the last that this fxzip reads: upgrade fxzip"
        )
    try:
        plan = decode(Plan, data, "")
    except ValueError as error:
        raise InputError(f"load: {str(path)!r} is malformed: {error}") from error
    problem = _inconsistent(plan)
    if problem:
        raise InputError(f"load: {str(path)!r} is malformed: {problem}")
    return plan


def _inconsistent(plan: Plan) -> str:
    """Why the parts of a plan do not fit together, or ""."""
    if not plan.tasks:
        return "tasks: there is none"
    if plan.shares and len(plan.shares) != len(plan.tasks):
        return f"shares: {len(plan.shares)} for {len(plan.tasks)} tasks"
    owners = {task for task, _ in plan.targets.values()} | {u.task for u in plan.unmerges.values()}
    strangers = sorted((owners | set(plan.untouched)) - set(plan.tasks))
    if strangers:
        return f"{strangers[0]!r} is none of its tasks"
    if len(plan.originals) != len(plan.tasks):
        return f"originals: {len(plan.originals)} models for {len(plan.tasks)} tasks"
    left = [
        n for n in plan.signature.tensors if n not in plan.tensors and plan.tied.get(n) not in plan.tensors
    ]
    left += [k for entries in plan.untouched.values() for k in entries.values() if k not in plan.tensors]
    return f"tensors: {left[0]} is missing" if left else ""


# ------------------------------------------------------------------------------------------ values <-> JSON


def encode(value: Any) -> Any:
    """Dataclasses, mappings, tuples and sets as JSON values; NaN and infinity, which JSON lacks, as null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(encode(v) for v in value)
    if isinstance(value, (list, tuple)):
        return [encode(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def decode(kind: Any, value: Any, path: str) -> Any:
    """`value`, from JSON, as a `kind` (a type annotation). Raises ValueError that names the field.

    >>> decode(tuple[int, ...], [1, 2], "sizes"), decode(float | None, None, "quality")
    ((1, 2), None)
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        options = [k for k in inner if k is not type(None)]
        return None if value is None and len(options) < len(inner) else decode(options[0], value, path)
    if is_dataclass(kind):
        return _decode_fields(kind, value, path)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        _expect(value, dict, path)
        return {k: decode(inner[1], v, f"{path}.{k}") for k, v in value.items()}
    if origin in (tuple, frozenset):
        return origin(_decode_items(origin, inner, value, path))
    if kind is float:
        return float(_expect(value, (int, float), path))
    return _expect(value, kind, path)


def _decode_fields(kind: Any, value: Any, path: str) -> Any:
    _expect(value, dict, path)
    hints, found = get_type_hints(kind), {}
    for name, hint in hints.items():
        if name in value:
            found[name] = decode(hint, value[name], f"{path}.{name}" if path else name)
    try:
        return kind(**found)
    except TypeError as error:  # a field without a default
        lacks = [n for n in hints if n not in found]
        raise ValueError(f"{path or 'the plan'} lacks {', '.join(lacks)}") from error


def _decode_items(origin: Any, inner: tuple, value: Any, path: str) -> list[Any]:
    _expect(value, list, path)
    if origin is tuple and inner[-1] is not Ellipsis:
        if len(value) != len(inner):
            raise ValueError(f"{path} has {len(value)} items instead of {len(inner)}")
        return [decode(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(inner, value, strict=True))]
    return [decode(inner[0], v, f"{path}[{i}]") for i, v in enumerate(value)]


def _expect(value: Any, kind: Any, path: str) -> Any:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
        raise ValueError(f"{path} must be {wanted.get(kinds[0], 'a number')}, not {json.dumps(value)[:60]}")
    return value


# ------------------------------------------------------------------------------------------------- tensors


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str, path: str) -> torch.dtype:
    """The dtype called `name`. Raises InputError for what is none."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise InputError(f"load: {path} has dtype {name!r}, which this torch does not know")
    return found
