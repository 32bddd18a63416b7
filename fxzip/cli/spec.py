"""What a model or a data set is called on the command line: `torchvision:CIFAR10?root=data&train=false`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from ..errors import InputError


@dataclass(frozen=True)
class Spec:
    """source: the part before the colon, "" if there is none; name: the part after; options: behind the "?"."""

    text: str
    source: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


def parse(text: str, sources: Iterable[str]) -> Spec:
    """A Spec; what does not start with one of `sources` and a colon is a path.

    Option values are JSON where they can be (`false`, `3`, `[1, 2]`), else text. Raises InputError for a source that
    is none, or an option without a value.

    >>> parse("torchvision:CIFAR10?root=data&train=false", ["torchvision"]).options
    {'root': 'data', 'train': False}
    >>> parse("images/train", ["torchvision"]).name
    'images/train'
    """
    head, _, query = text.partition("?")
    source, colon, name = head.partition(":")
    if not colon or source not in sources:
        source, name = "", head
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise InputError(f"{text!r}: write options as name=value&name=value after the question mark") from error
    return Spec(text, source, name, {key: _value(value) for key, value in pairs})


def nearest(name: str, names: Iterable[str]) -> str:
    """`did you mean resnet50?`, or ""."""
    close = get_close_matches(name, list(names), 3, 0.6)
    return f"did you mean {' or '.join(close)}?" if close else ""


def inside(path: str, folder: Path) -> Path:
    """A path as written in a file that lies in `folder`."""
    return Path(os.path.normpath(folder / Path(path).expanduser()))


def moved(path: Path, folder: Path) -> str:
    """How `path` is written in a file that will lie in `folder`; absolute only where no relative path exists."""
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except ValueError:  # another drive
        return str(path.resolve())


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
