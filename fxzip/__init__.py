"""fxzip: merge trained networks by rewriting their graphs.

    zipped = fxzip.merge({"digits": a, "letters": b}, loader)
    zipped(x)["digits"]

See `merge`, `inspect`, `verify`; the pipeline is fxzip/merge.py, read top to bottom.
"""

from __future__ import annotations

from . import html, landscape, passes, plot
from .distill import Distill
from .errors import FxzipError, InputError, Interrupted, MergeWarning, SpaceError, TraceError, VerificationError
from .evaluate import Accuracy, accuracy, cost
from .files import load, save
from .frontier import Frontier, frontier
from .infer import readable
from .inspection import inspect
from .match import C2M3, CCA, MATCHERS, Average, MuDSC, Pair, Permute, Rebasin, Select, Suited, Transport, Unmerge, Zip
from .measure.moments import Moments
from .merge import METHODS, collect, merge, plan
from .planning import Plan
from .postpass import reset_statistics, respread
from .repair import Repair
from .report import Report, report
from .rewrite import cut_points, extract
from .solve import Solve
from .soup import greedy_soup
from .verification import Verification
from .verify import scramble, verify
from .version import installed

__version__ = installed()

__all__ = [
    "C2M3", "CCA", "MATCHERS", "METHODS", "Accuracy", "Average", "Distill", "Frontier", "FxzipError", "InputError",
    "Interrupted", "MergeWarning", "Moments", "MuDSC", "Pair", "Permute", "Plan", "Rebasin", "Repair", "Report",
    "Select", "Solve", "SpaceError", "Suited", "TraceError", "Transport", "Unmerge", "Verification",
    "VerificationError", "Zip", "accuracy", "collect", "cost", "cut_points", "extract", "frontier", "greedy_soup",
    "html", "inspect", "landscape", "load", "merge", "passes", "plan", "plot", "readable", "report",
    "reset_statistics", "respread", "save", "scramble", "verify",
]  # fmt: skip
