"""Memory that tensors free stays with this process while fxzip runs networks, and goes back when it is done."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

_TRIM, _MAP_FROM, _MAPS = -1, -3, -4  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX of malloc.h
_KEEP = {_MAPS: 0, _TRIM: -1}
# What glibc sets for itself once a block of 32 MB was freed, the most that it goes up to: as it would be afterwards.
_USUAL = {_MAPS: 65_536, _MAP_FROM: 32 << 20, _TRIM: 64 << 20}
# What is large is memory of its own, which goes back as soon as it is freed and leaves no gap.
_SPARE = {_MAPS: 65_536, _MAP_FROM: 1 << 20, _TRIM: 1 << 20}
GAPS = 1 << 30  # bytes that may be free while memory is `retained`
_FEW = 1 << 26  # and where it is `spared`
_lock, _inside, _spared = Lock(), 0, 0


class _Info(ctypes.Structure):
    """`struct mallinfo2` of malloc.h; fordblks: bytes that are free in the heap."""

    _fields_ = [(f"_{k}", ctypes.c_size_t) for k in range(8)] + [(n, ctypes.c_size_t) for n in ("fordblks", "keepcost")]


@contextmanager
def retained(wanted: bool = True) -> Iterator[None]:
    """Within, glibc's malloc takes freed memory again instead of giving it back and asking for more.

    Every activation of a forward is new memory, and what costs is not to get it but the page faults when it is written
    for the first time: of two ResNet-50 at 224 pixels 40 % of the time. No number depends on it. Afterwards what is
    free goes back to the system at once. Nothing happens where malloc is not glibc's, or unless `wanted`: gaps between
    what is kept may take some more memory. May be nested, also by threads.

    >>> with retained():
    ...     x = __import__("torch").ones(3)
    """
    global _inside
    with _lock:
        wanted = wanted and not _spared
        _inside += wanted
        if wanted and _inside == 1:
            _set(_KEEP)
    try:
        yield
    finally:
        with _lock:
            _inside -= wanted
            if wanted and not _inside:
                _set(_USUAL)
            trim()


@contextmanager
def spared(wanted: bool = True) -> Iterator[None]:
    """Within, memory is held to what is in use, where a cap has to hold: page faults are the price. `retained` does
    nothing then. May be nested, also by threads.

    >>> with spared(), retained():
    ...     x = __import__("torch").ones(3)
    """
    global _spared
    with _lock:
        _spared += wanted
        if wanted and _spared == 1:
            _set(_SPARE)
    try:
        yield
    finally:
        with _lock:
            _spared -= wanted
            if wanted and not _spared:
                _set(_KEEP if _inside else _USUAL)
            trim()


def trim() -> None:
    """Give what is free back to the system, gaps between what is kept as well, unless it is `retained`."""
    if not _inside and (give_back := getattr(_libc(), "malloc_trim", None)):
        give_back(0)


def relieve() -> None:
    """`trim`, and while memory is `retained` where gaps between what is kept have become more than GAPS: values of many
    sizes come and go, and what fits into no gap is new memory."""
    if _spared or not _inside:
        return spare() if _spared else trim()
    _trim_beyond(GAPS)


def spare() -> None:
    """Give gaps back where memory is `spared`: what comes from one that was there before does not go back by itself."""
    if _spared:
        _trim_beyond(_FEW)


def _trim_beyond(most: int) -> None:
    count = getattr(_libc(), "mallinfo2", None)
    if count is not None:  # glibc before 2.33 has none
        count.restype = _Info
        if count().fordblks > most:
            _libc().malloc_trim(0)  # type: ignore[union-attr]


def _set(options: dict[int, int]) -> None:
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt:
        for option, value in options.items():
            mallopt(option, value)


def _libc() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows has no library of the process itself
        return None
