"""Rewrite: spaces, matchings and models in, one GraphModule out. Knows no matcher."""

from .build import build
from .comparable import Comparable
from .extract import extract
from .heads import Heads, head_parameters, unreadable
from .modules import versions
from .norms import batch_norms, recompute_statistics
from .outputs import same_outputs
from .parameters import merge_parameters
from .partition import Partition, cut_points, owned, partition
from .signature import Signature, difference, signature
from .tails import Tails, join
from .unmerge import Unmerge
from .zipped import Zipped

__all__ = [
    "Comparable",
    "Heads",
    "Partition",
    "Signature",
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
    "merge_parameters",
    "owned",
    "partition",
    "recompute_statistics",
    "same_outputs",
    "signature",
    "unreadable",
    "versions",
]
