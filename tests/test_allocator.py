"""Freed memory stays while fxzip works: seen by page faults, which are counted, not timed."""

from __future__ import annotations

import ctypes
import resource
import subprocess
import sys

import pytest
import torch

from fxzip import allocator
from fxzip.allocator import relieve, retained

SIZE = 48 << 20  # bytes: more than glibc keeps by itself
PAGES = SIZE // resource.getpagesize()


def faults() -> int:
    """Page faults of making a tensor of SIZE bytes and writing to it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(SIZE // 4).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.fixture(autouse=True)
def _glibc() -> None:
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        pytest.skip("malloc is not glibc's")
    allocator.trim()  # what an earlier test left
    if faults() < PAGES / 2:
        pytest.skip("pages are huge, or another malloc is loaded: there is nothing to see")


def _needs_mallinfo2() -> None:
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("glibc before 2.33 does not say what is free")


def test_within_freed_memory_is_taken_again_and_afterwards_it_is_given_back():
    with retained():
        with retained():
            first = [faults() for _ in range(20)]
        second = [faults() for _ in range(10)]
    # Other tests leave gaps: a free block may be a few bytes too small, now and then, until one is not.
    assert sum(first[10:]) < 2 * PAGES
    assert sum(second) < 2 * PAGES, "still, after the inner one"
    assert faults() > PAGES / 2


GAPS_LEFT = """
import sys
import torch
from fxzip.allocator import retained, spare, spared

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))

pins = []

def left(work=lambda: None):
    blocks = [torch.ones(2 << 18) for _ in range(128)]
    pins.append([torch.ones(n) for n in range(100, 30_000, 500)])  # the top of the heap does not come down
    kept, before = blocks[1::2], resident()
    del blocks
    work()
    return (before - resident()) // 1024

def kept():
    with retained():
        return left()

def capped(work=lambda: None):
    with spared(), retained():
        return left(work)

torch.ones(12 << 20)  # glibc takes blocks from between others from here on, however large
torch.ones(12 << 20)
print(*map(eval, sys.argv[1:]))
"""


def _gaps(*calls: str) -> list[int]:
    """MB that go back to the system when every second one of 128 blocks of 2 MB is freed, call by call in one new
    process: what comes from a gap that is there already stays there."""
    out = subprocess.run([sys.executable, "-c", GAPS_LEFT, *calls], capture_output=True, text=True, check=True).stdout
    return [int(n) for n in out.split()]


def test_under_a_cap_what_is_freed_between_others_goes_back():
    first, second, after = _gaps("capped()", "capped()", "kept()")
    assert first > 100 and second > 100, "`retained` has no say within `spared`"
    assert after < 16


def test_under_a_cap_gaps_that_were_there_before_go_back_when_asked():
    _needs_mallinfo2()
    before, within = _gaps("kept()", "capped(spare)")
    assert before < 16 and within > 100


def test_an_error_ends_it_too():
    with pytest.raises(ZeroDivisionError), retained():
        _ = 1 / 0
    assert faults() > PAGES / 2


def test_gaps_are_given_back_only_where_they_are_large(monkeypatch):
    _needs_mallinfo2()
    with retained():
        for _ in range(20):  # until a gap is there that fits
            faults()
        relieve()
        assert faults() < PAGES / 2, "less than GAPS"
        monkeypatch.setattr(allocator, "GAPS", SIZE // 2)
        relieve()
        assert faults() > PAGES / 2
