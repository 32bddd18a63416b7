"""Freed memory stays while fxzip works: seen by page faults, which are counted, not timed."""

from __future__ import annotations

import ctypes
import resource
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
