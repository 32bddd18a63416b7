"""Bytes: what `memory=` takes, how they are written, and where values go for which there is no room."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import InputError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_TEXT = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]I?|)B?")
_PAGE, _BLOCK = 4096, 1 << 22
_MARK = "_fxzip_file"  # attribute of tensors that a Store has put into a file


def wrong_memory(value: Any) -> str:
    """Why `memory=` cannot be this; "" if it can.

    >>> wrong_memory("4GB"), wrong_memory("much")
    ('', "memory must be a number of bytes or a text such as '4GB' or '512MB', got 'much'")
    """
    fits = value is None or _bytes(value) is not None
    return "" if fits else f"memory must be a number of bytes or a text such as '4GB' or '512MB', got {value!r}"


def parsed(value: Any) -> int | None:
    """`memory=` in bytes; None where there is no cap. Raises InputError.

    >>> parsed("1.5GB"), parsed("2 GiB"), parsed(10**6)
    (1500000000, 2147483648, 1000000)
    """
    if problem := wrong_memory(value):
        raise InputError(problem)
    return None if value is None else _bytes(value)


def _bytes(value: Any) -> int | None:
    if isinstance(value, str):
        found = _TEXT.fullmatch(value.strip().upper())
        value = float(found[1]) * _UNITS[found[2]] if found else None
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value) and value >= 1
    return int(value) if fits else None


def shown(count: float) -> str:
    """In a unit that suits, rounded up to three digits: as `memory=` it is enough.

    >>> shown(812), shown(1_234_567), shown(5e9)
    ('812B', '1.24MB', '5GB')
    """
    unit = next((u for u in ("T", "G", "M", "K") if count >= _UNITS[u]), "")
    digits = 10 ** max(0, 3 - len(str(int(count / _UNITS[unit]))))
    return f"{ceil(round(count / _UNITS[unit] * digits, 6)) / digits:g}{unit}B"


@dataclass
class Store:
    """Where values go: memory while there is `room` (bytes), then files that nothing else can open.

    sparse: pages of zeros, of which matrices of matchings are full, take no room there. held: bytes of what is in
    memory; who lets go of a value takes it off. most: the largest that was."""

    room: float
    sparse: bool = False
    mapped: int = 0  # bytes that went to files, in all
    held: int = 0
    most: int = 0

    def keep(self, value: Any, over: Sequence[Any] = ()) -> Any:
        """`value`, or (for tensors without room) an equal CPU tensor on disk, in the place of one of `over` that nobody
        will read any more, if one fits: its pages are there already. Raises InputError when the disk is full."""
        if isinstance(value, (tuple, list)):
            return type(value)(self.keep(v) for v in value)
        if not isinstance(value, Tensor) or not value.numel():
            return value
        size = value.numel() * value.element_size()
        if self.held + size <= self.room:
            self.held += size
            self.most = max(self.most, self.held)
            return value
        self.mapped += size
        order = sorted(range(value.dim()), key=lambda d: -value.stride(d))  # as it lies, which kernels round by
        laid = value.detach().permute(order)
        flat = laid.cpu().contiguous().reshape(-1).view(torch.uint8)
        place = next((p for old in over if (p := _place(old, flat)) is not None), None)
        bytes_ = self._file(flat) if place is None else place.copy_(flat)
        kept = bytes_.view(value.dtype).view(laid.shape).permute([order.index(d) for d in range(len(order))])
        setattr(kept, _MARK, True)
        return kept

    def _file(self, flat: Tensor) -> Tensor:
        """The same bytes, mapped from a new file."""
        try:
            with tempfile.TemporaryDirectory(prefix="fxzip-") as folder:  # gone at once; the mapping stays until freed
                path = os.path.join(folder, "values")
                _write(path, flat.numpy(), self.sparse)
                return torch.from_file(path, shared=True, size=len(flat), dtype=torch.uint8)
        except OSError as error:
            raise InputError(
                f"{shown(len(flat))} for which memory has no room cannot be written below {tempfile.gettempdir()!r}:"
                f" {error}; TMPDIR names another folder, a larger memory= writes less"
            ) from error


def _place(old: Any, flat: Tensor) -> Tensor | None:
    """The bytes of `old`, if it is a file of a Store, as large as `flat`, and not where that is itself. uint8 [n]"""
    if not getattr(old, _MARK, False):
        return None
    storage = old.untyped_storage()
    if storage.nbytes() != len(flat) or storage.data_ptr() == flat.untyped_storage().data_ptr():
        return None
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _write(path: str, data: np.ndarray, sparse: bool) -> None:
    """uint8 [n] into a new file. Who writes to the mapping of a page that has no room yet may find that there is none,
    which ends the process."""
    if not sparse:
        with open(path, "wb") as file:
            file.write(data.data)
        return
    with open(path, "wb") as file:
        file.truncate(len(data))
        for start in range(0, len(data), _BLOCK):
            block = data[start : start + _BLOCK]
            whole = len(block) // _PAGE * _PAGE
            full = block[:whole].view(np.uint64).reshape(-1, _PAGE // 8).any(1) if whole else np.zeros(0, bool)
            edges = np.flatnonzero(np.diff(full, prepend=False, append=False)) * _PAGE
            for i, j in [*edges.reshape(-1, 2).tolist(), (whole, len(block))]:
                if i < j:
                    file.seek(start + i)
                    file.write(block[i:j].data)
