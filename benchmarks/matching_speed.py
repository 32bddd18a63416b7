"""Seconds to match two networks' features of width n, against the naive algorithm where that is bearable.

    OMP_NUM_THREADS=1 python benchmarks/matching_speed.py

CPU seconds, with one thread. Zip's groups are compared with those of the naive O(n^3) greedy (tests/oracles.py: every
step searches the whole current matrix and rebuilds a smaller one, as the paper states it, in NumPy) up to --naive; a
difference ends the run with an error. The last line fits seconds ~ n^k to the larger widths.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from common import machine
from tqdm import tqdm

import fxzip
from fxzip.match import Matching, similarity
from fxzip.match.zip import merges
from fxzip.measure.moments import SpaceMoments

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.oracles import zipit  # noqa: E402

T = TypeVar("T")
WIDTHS = (64, 128, 256, 512, 1024, 2048)
ZIP = fxzip.Zip(alpha=0.3, beta=1.0)
# The published ZipIt! code on one core of the machine the anchors were measured on; "~": extrapolated.
PUBLISHED = {64: "0.01", 256: "0.24", 512: "1.9", 1024: "25.5", 2048: "~600"}


def main(argv: Sequence[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--naive", type=int, default=256, help="largest width for the naive algorithm")
    parser.add_argument("--repeat", type=int, default=3, help="the best of so many runs counts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    print("| n | zip | permute | select | naive zip | published zip |")
    print("| --: | --: | --: | --: | --: | --: |")
    took = {}
    for n in tqdm(args.widths, leave=False, disable=None):
        moments = two_models(n, args.seed)
        found, took[n] = timed(lambda m=moments, n=n: ZIP(m, n), args.repeat)
        others = [timed(lambda m=moments, n=n, f=f: f(m, n), 1)[1] for f in (fxzip.Permute(), fxzip.Select())]
        naive = f"{compare(moments, n, found):.3f}" if n <= args.naive else "-"
        cells = (n, *(f"{s:.3f}" for s in (took[n], *others)), naive, PUBLISHED.get(n, "-"))
        tqdm.write(f"| {' | '.join(map(str, cells))} |")
    print(f"\n{growth(took)}\n\nseconds for one space of two models; {machine(args)}")


def two_models(n: int, seed: int, shared: int = 48) -> SpaceMoments:
    """Moments of 2n correlated features: both models see the same `shared` latents, with own noise."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(2 * n, shared, generator=g, dtype=torch.float64)
    mean = torch.randn(2 * n, generator=g, dtype=torch.float64)
    noise = torch.rand(2 * n, generator=g, dtype=torch.float64) * shared
    return SpaceMoments((n, n), 1e5, mean, mixing @ mixing.T + noise.diag() + torch.outer(mean, mean))


def timed(run: Callable[[], T], repeat: int) -> tuple[T, float]:
    best, result = float("inf"), None
    for _ in range(repeat):
        start = time.process_time()
        result = run()
        best = min(best, time.process_time() - start)
    assert result is not None
    return result, best


def greedy(moments: SpaceMoments, n: int, repeat: int) -> float:
    """Seconds of zip's merges alone, from similarities to groups: what the naive algorithm does."""
    correlation = similarity(moments)
    return timed(lambda: merges(correlation, moments.sizes, n, ZIP.alpha, ZIP.beta), repeat)[1]


def compare(moments: SpaceMoments, n: int, found: Matching, repeat: int = 1) -> float:
    """Seconds of the naive algorithm; ends the run if its groups are not those of `found`."""
    correlation = similarity(moments)
    groups, seconds = timed(lambda: zipit(correlation, moments.sizes, n, ZIP.alpha, ZIP.beta), repeat)
    ours = [np.flatnonzero(column).tolist() for column in found.unmerge.T.numpy()]
    if groups is None or sorted(map(sorted, groups)) != sorted(ours):
        raise SystemExit(f"n = {n}: zip and the naive algorithm disagree")
    return seconds


def growth(took: dict[int, float]) -> str:
    """The exponent k of seconds ~ n^k by least squares on logarithms, over widths of at least 256."""
    points = {n: s for n, s in took.items() if n >= 256}
    if len(points) < 2:
        return "growth: needs two widths of at least 256"
    k, _ = np.polyfit(np.log(list(points)), np.log(list(points.values())), 1)
    return f"growth of zip from n = {min(points)} to {max(points)}: seconds ~ n^{k:.2f}"


if __name__ == "__main__":
    main()
