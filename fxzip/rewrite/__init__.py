"""Rewrite: spaces, matchings and models in, one GraphModule out. Knows no matcher."""

from .build import build
from .comparable import Comparable
from .extract import extract
from .heads import Heads, head_parameters, unreadable
from .modules import versions
from .norms import batch_norms, recompute_statistics
from .outputs import same_outputs
from .parameters import merge_parameters
from .partition import Partition, cut_points, legal, owned, partition, selected
from .prepend import prepend
from .signature import Signature, difference, signature
from .stems import Stems, split
from .tails import Tails, join
from .unmerge import Unmerge
from .zipped import Zipped

__all__ = [
    "Comparable",
    "Heads",
    "Partition",
    "Signature",
    "Stems",
    "Tails",
    "Unmerge",
    "Zipped",
    "batch_norms",
    "build",
    "cut_points",
    "difference",
    "extract",
    "head_parameters",
    "join",
    "legal",
    "merge_parameters",
    "owned",
    "partition",
    "prepend",
    "recompute_statistics",
    "same_outputs",
    "selected",
    "signature",
    "split",
    "unreadable",
    "versions",
]
