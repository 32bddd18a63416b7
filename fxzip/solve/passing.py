"""Values that are not kept: what is made of one other value for next to nothing is made whenever it is read.

Views, the parts of a tuple, and batch norms in eval: of a convolution, its norm and the ReLU behind it two values are
kept rather than four, in memory or in files.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

from torch import fx

from .affine import BATCH_NORMS, packet
from .slots import argument


def passing_nodes(dynamic: Mapping[str, fx.Node]) -> dict[str, str]:
    """Of nodes that cost next to nothing: the name of the one operand that depends on the data."""
    found = {}
    for name, node in dynamic.items():
        operands = [i.name for i in node.all_input_nodes if i.name in dynamic]
        cheap = node.target is operator.getitem or _views(node)
        cheap = cheap or (packet(node) in BATCH_NORMS and not argument(node, "training"))
        if node.op == "call_function" and len(operands) == 1 and cheap:
            found[name] = operands[0]
    return found


def _views(node: fx.Node) -> bool:
    """Whether an op gives memory of its operand, by its schema. Kept in a file its values would lie otherwise, and
    kernels round by that."""
    returns = getattr(getattr(node.target, "_schema", None), "returns", ())
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def readers(name: str, dynamic: Mapping[str, fx.Node], passing: Mapping[str, str]) -> set[str]:
    """The nodes that read a value, or what passes it on, and keep what they make of it."""
    found: set[str] = set()
    for user in (u.name for u in dynamic[name].users if u.name in dynamic):
        found |= readers(user, dynamic, passing) if user in passing else {user}
    return found
