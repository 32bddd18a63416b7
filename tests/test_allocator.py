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
    if faults() < PAGES / 2:
        pytest.skip("pages are huge, or another malloc is loaded: there is nothing to see")


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
import torch
from fxzip.allocator import retained, spared

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))

def left():
    blocks = [torch.ones(2 << 18) for _ in range(64)]
    kept, before = blocks[1::2], resident()
    del blocks
    return (before - resident()) // 1024

torch.ones(12 << 20)  # glibc takes blocks from between others from here on, however large
torch.ones(12 << 20)
with retained():
    first = left()
with spared():
    with retained():
        second = left()
    third = left()
with retained():
    fourth = left()
print(first, second, third, fourth)
"""


def test_under_a_cap_what_is_freed_between_others_goes_back():
    """Of 64 blocks of 2 MB every second one is freed; `retained` has no say then. In a process of its own, as what
    comes from a gap that is there already stays there."""
    out = subprocess.run([sys.executable, "-c", GAPS_LEFT], capture_output=True, text=True, check=True).stdout
    first, second, third, fourth = map(int, out.split())
    assert first < 8 and fourth < 8 and second > 60 and third > 60, out


def test_an_error_ends_it_too():
    with pytest.raises(ZeroDivisionError), retained():
        _ = 1 / 0
    assert faults() > PAGES / 2


def test_gaps_are_given_back_only_where_they_are_large(monkeypatch):
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("glibc before 2.33 does not say what is free")
    with retained():
        for _ in range(20):  # until a gap is there that fits
            faults()
        relieve()
        assert faults() < PAGES / 2, "less than GAPS"
        monkeypatch.setattr(allocator, "GAPS", SIZE // 2)
        relieve()
        assert faults() > PAGES / 2
