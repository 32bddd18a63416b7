"""ZipIt! (Stoica et al., ICLR 2024), appendix: alpha and beta, other matchings, and how much data matching needs.

    python benchmarks/papers/zipit_appendix.py                                          # GPU
    python benchmarks/papers/zipit_appendix.py --data ../shared/data --reduced          # CPU

On the CIFAR-10 pair of table 1 (its parents are taken from --cache). Segmentation beside classification:
zipit_segmentation.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from paper import Merge, Setting, main
from zipit_table1 import SETTINGS as TABLE1

from fxzip import MuDSC, Pair, Permute, Zip

GRID = [(a, b) for a in (1.0, 0.3, 0.1, 0.03) for b in (0.0, 0.125, 0.3, 1.0)]
BATCHES = (1, 2, 4, 8, 16, 32)  # of 100 images


def of(rows: Mapping[str, Mapping[str, Any]]):
    """Table 1's CIFAR-10 pair with other rows."""

    def made(args: argparse.Namespace) -> Setting:
        return replace(TABLE1["cifar10"](args), merges=[Merge(name, options) for name, options in rows.items()])

    return made


SETTINGS = {
    "alpha-beta": of({f"alpha {a:g}, beta {b:g}": {"method": Zip(a, b)} for a, b in GRID}),
    "matching": of({"permute": {"method": Permute()}, "zip": {"method": Zip()}, "optimal pairs": {"method": Pair()},
                    "dual space": {"method": MuDSC()}}),
    "batches": of({f"{m}, {n} x 100 images": {"method": m, "calibration": 100 * n} for m in ("zip", "solve")
                   for n in BATCHES}),
}  # fmt: skip

if __name__ == "__main__":
    main(__doc__, SETTINGS)
