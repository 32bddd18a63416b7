"""Statistics that survive: what was measured so far, in a folder, whole at every moment."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_flatten

from ..errors import InputError, Interrupted
from .moments import Accumulator

FILE = "measured.safetensors"
FORMAT = "fxzip measured 1"
EVERY = 20.0  # seconds between two writes at least, and ten times what a write takes


class Checkpoint:
    """Keeps sums, the sampler's state and the number of batches they are of in `folder`/measured.safetensors.

    key: `fingerprint` of all that the sums depend on; statistics of anything else are refused, never mixed.
    Raises InputError when the folder cannot be written, or its file is damaged or belongs to another merge.
    """

    def __init__(self, folder: str | Path, key: str) -> None:
        self.folder, self.key = Path(folder), key
        self.path = self.folder / FILE
        self.stopped = ""  # the signal that came
        self._due = time.monotonic() + EVERY
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (probe := self.path.with_suffix(f".{os.getpid()}.tmp")).write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise InputError(f"resume={str(self.folder)!r} cannot be written: {error}") from error

    def load(self, generator: torch.Generator, device: torch.device | str) -> tuple[int, dict[str, Accumulator]]:
        """(batches done, sums by space), with `generator` where it was; (0, {}) when there is nothing yet."""
        if not self.path.exists():
            return 0, {}
        try:
            with safe_open(str(self.path), "pt") as file:
                notes = file.metadata() or {}
                if notes.get("format") != FORMAT:
                    raise InputError(f"resume: {str(self.path)!r} is not fxzip's; give another folder")
                if notes.get("key") != self.key:
                    raise InputError(
                        f"resume: {str(self.path)!r} was measured with other models, batches, seed, calibration or"
                        " versions of fxzip and torch (of several passes, also memory); give another folder, or delete"
                        " the file"
                    )
                tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 (no mapping)
            if notes["sha256"] != _checksum(tensors, notes):
                raise ValueError("its checksum is wrong")
            sums = {n: _read(tensors, n, f, device) for n, f in json.loads(notes["spaces"]).items()}
            generator.set_state(tensors["generator"])
            return int(notes["done"]), sums
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"resume: {str(self.path)!r} is damaged ({error}): delete it to start afresh") from error

    def save(self, done: int, sums: Mapping[str, Accumulator], generator: torch.Generator, force: bool = False) -> None:
        """Write, if it is time to. A failed write leaves the last one as it is, and warns."""
        start = time.monotonic()
        if start < self._due and not force:
            return
        tensors = {"generator": generator.get_state()}
        for name, a in sums.items():
            tensors |= {f"total/{name}": a.total.cpu(), f"gram/{name}": a.gram.cpu()}
        facts = {name: {"sizes": a.sizes, "count": a.count} for name, a in sums.items()}
        notes = {"format": FORMAT, "key": self.key, "done": str(done), "spaces": json.dumps(facts)}
        notes["sha256"] = _checksum(tensors, notes)
        aside = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            save_file(tensors, str(aside), notes)
            _flush(aside)
            os.replace(aside, self.path)
            if os.name == "posix":
                _flush(self.folder)
        except (OSError, SafetensorError) as error:
            aside.unlink(missing_ok=True)
            warnings.warn(f"resume: nothing was written to {str(self.folder)!r}: {error}", RuntimeWarning, stacklevel=2)
        now = time.monotonic()
        self._due = now + max(EVERY, 10 * (now - start))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """SIGINT and SIGTERM only set `stopped` (a second one acts as always), in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

        def note(number: int, frame: Any) -> None:
            self.stopped = signal.Signals(number).name
            for s, handler in before.items():
                signal.signal(s, handler)

        for s in before:
            signal.signal(s, note)
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def check(self, done: int, of: int, sums: Mapping[str, Accumulator], generator: torch.Generator) -> None:
        """After a batch: write if it is time. Raises Interrupted, everything written, if a signal has come."""
        self.save(done, sums, generator, force=bool(self.stopped) or done == of)
        if self.stopped and done < of:
            raise Interrupted(
                f"stopped by {self.stopped} after {done} of {of} batches; what was measured is kept:"
                f" the same call with resume={str(self.folder)!r} goes on from there"
            )


def fingerprint(states: Sequence[Mapping[str, Tensor]], batches: Sequence[Any], *more: Any) -> str:
    """SHA-256 of weights, batches (names, shapes, dtypes, bytes) and whatever else counts."""
    found = hashlib.sha256(repr(more).encode())
    tensors = [(f"{i}.{name}", t) for i, state in enumerate(states) for name, t in sorted(state.items())]
    for name, value in [*tensors, *((f"batch{k}", x) for k, b in enumerate(batches) for x in tree_flatten(b)[0])]:
        if isinstance(value, Tensor):
            found.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
            plain = value.detach().cpu().contiguous().reshape(-1)
            found.update(plain.view(torch.uint8).numpy().data if plain.numel() else b"")
        else:
            found.update(f"{name} {value!r};".encode())
    return found.hexdigest()


def _checksum(tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> str:
    return fingerprint([tensors], [], sorted((k, v) for k, v in notes.items() if k != "sha256"))


def _read(tensors: Mapping[str, Tensor], name: str, facts: Mapping[str, Any], device: Any) -> Accumulator:
    found = Accumulator([int(n) for n in facts["sizes"]], device)
    found.total.copy_(tensors[f"total/{name}"])
    found.gram.copy_(tensors[f"gram/{name}"])
    found.count = float(facts["count"])
    return found


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
