"""trace: a model -> a GraphModule that computes the same -> a functional ATen graph that can be run."""

from __future__ import annotations

from .borrow import borrow, own
from .call import call_signature, counted, tensors_of
from .compare import alike, compare_graphs, compare_shapes, compare_sizes
from .execute import overwriting, run
from .guards import unwrap
from .inputs import batch_size, beside, bind, describe, first_rows, on, plain_batch, rows, shapes_only, to_meta
from .interpreter import watched
from .kernels import kernel
from .ladder import Traced, trace
from .lower import Lowered, corresponding, lower
from .plain import duplicate, make_plain, plain
from .state import state_by_all_names, state_of

__all__ = [
    "Lowered",
    "Traced",
    "alike",
    "batch_size",
    "beside",
    "bind",
    "borrow",
    "call_signature",
    "compare_graphs",
    "compare_shapes",
    "compare_sizes",
    "corresponding",
    "counted",
    "describe",
    "duplicate",
    "first_rows",
    "kernel",
    "lower",
    "make_plain",
    "on",
    "overwriting",
    "own",
    "plain",
    "plain_batch",
    "rows",
    "run",
    "shapes_only",
    "state_by_all_names",
    "state_of",
    "tensors_of",
    "to_meta",
    "trace",
    "unwrap",
    "watched",
]
