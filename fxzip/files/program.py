"""model.pt2: the merged network as an exported program, which runs without fxzip."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import InputError
from ..trace import batch_size, rows, state_by_all_names
from .example import example_from_json

BATCH = 5  # 0 and 1 are special to torch.export, 2 to 4 are sizes of other axes


def export_program(zipped: fx.GraphModule, example: Any) -> ExportedProgram:
    """`zipped` by torch.export, on invented inputs like `example` (see `example_to_json`), for any batch size where
    that is possible. Raises InputError with torch's reason."""
    first = next(iter(state_by_all_names(zipped).values()), None)
    device = first.device if first is not None else torch.device("cpu")
    args = example_from_json(example, device, torch.Generator().manual_seed(0))
    dtype = next((t.dtype for t in zipped.parameters() if t.is_floating_point()), torch.float32)
    args = tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, args)
    size = batch_size(args)
    shared = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.dim() and len(x) == size]
    args = rows(args, BATCH) if shared else args
    shapes = tree_map(
        lambda x: {0: Dim.AUTO} if shared and isinstance(x, Tensor) and x.dim() and len(x) == BATCH else None, args
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.export.export(zipped, args, dynamic_shapes=tuple(shapes), strict=False)
        except Exception as error:  # torch.export raises many kinds
            raise InputError(f"save: torch.export refuses this network: {str(error).splitlines()[0]}") from error


def write_program(program: ExportedProgram, path: Path) -> None:
    with open(path, "wb") as file:  # torch.export.save asks for a name that ends in .pt2
        torch.export.save(program, file)
