"""A merge that is killed while it measures, for tests and for benchmarks/trust.py."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import tqdm.auto
from safetensors import SafetensorError, safe_open
from torch import nn
from toys import randomise

import fxzip
from fxzip.measure import resume

BATCHES = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(40)]


def nets() -> list[nn.Module]:
    def net() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Flatten(), nn.Linear(16 * 64, 4),
        )  # fmt: skip

    return [randomise(net(), seed).eval() for seed in range(2)]


def job(folder: Path | None) -> str:
    """SHA-256 of what comes out of one merge; statistics are written after every batch."""
    resume.EVERY = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxzip.MergeWarning)
        zipped = fxzip.merge(nets(), BATCHES, method="zip", progress=False, verify=False, resume=folder)
    return digest(zipped)


def digest(module: nn.Module) -> str:
    found = hashlib.sha256()
    for name, t in module.state_dict().items():
        found.update(name.encode() + t.contiguous().numpy().tobytes())
    return found.hexdigest()


def killed_after(seconds: float, folder: Path) -> bool:
    """Start `job` in a fork and kill it (SIGKILL) after this long; False when it was done before."""
    child = os.fork()
    if child == 0:
        try:
            # tqdm's own lock is a semaphore that a fork shares: killed with it in hand, this one would leave it taken,
            # and the parent would wait at its next progress bar for ever. (Torch's Interpreter has bars of the second.)
            for bars in (tqdm.auto.tqdm, tqdm.std.tqdm):
                bars.set_lock(threading.RLock())
            job(folder)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert not (os.WIFEXITED(status) and os.WEXITSTATUS(status)), "the job failed by itself"
    return os.WIFSIGNALED(status)


def damaged(data: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """A file with one byte changed, its end missing, bytes put in, or two pieces exchanged."""
    generator = random.Random(seed)
    for k in range(count):
        at, other = sorted(generator.sample(range(len(data)), 2))
        changed = bytes([data[at] ^ generator.randrange(1, 256)])
        yield (
            data[:at] + changed + data[at + 1 :],
            data[:at],
            data[:at] + changed + data[at:],
            data[other:] + data[:other],
        )[k % 4]


def refused(folder: Path) -> bool:
    """Whether the statistics in `folder` are refused, whatever they are of."""
    key = _key(folder)
    try:
        resume.Checkpoint(folder, key).load(torch.Generator(), "cpu")
    except fxzip.InputError:
        return True
    return False


def _key(folder: Path) -> str:
    """What the file itself claims to be of."""
    try:
        with safe_open(str(folder / resume.FILE), "pt") as file:
            return (file.metadata() or {}).get("key", "")
    except SafetensorError:
        return ""
