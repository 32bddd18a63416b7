"""The user's own line behind an FX node, for messages."""

from __future__ import annotations

import os
import re
from functools import lru_cache

import torch
from torch import fx

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in [^\n]*\n\s*(?P<code>[^\n]*)')
TORCH_ROOT = os.path.dirname(torch.__file__) + os.sep
FXZIP_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def user_line(node: fx.Node | None) -> str:
    """`net.py:41: x = self.conv(x)` of an FX node; "" if the trace kept no line of the user's.

    The innermost frame outside torch and fxzip is taken: in a `Sequential` that is the line that calls it.
    """
    return _innermost(node.stack_trace or "") if node is not None else ""


@lru_cache(maxsize=1024)  # asked for each operator that a node runs
def _innermost(stack_trace: str) -> str:
    own = [f for f in _FRAME.finditer(stack_trace) if not f["file"].startswith((TORCH_ROOT, FXZIP_ROOT))]
    if not own:
        return ""
    return f"{os.path.basename(own[-1]['file'])}:{own[-1]['line']}: {own[-1]['code'].strip()}"


def where(node: fx.Node | None) -> str:
    """`%conv1 (net.py:41: x = self.conv(x))`: how messages point at a node."""
    if node is None:
        return "the graph"
    line = user_line(node)
    return f"%{node.name} ({line})" if line else f"%{node.name}"
