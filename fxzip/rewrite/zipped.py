"""The merged module: a GraphModule whose notes survive pickling."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..errors import InputError

KEY = "fxzip"


class Zipped(fx.GraphModule):
    """A `torch.fx.GraphModule`. Plain ones forget `.meta` when pickled; this one keeps it.

    meta["fxzip"]: tasks, as_dict, heads, shares (of the models in a mean of outputs); targets {private target:
    (task, original)} and nodes {private node: original}; untouched {task: {name: tensor}}, aliases {name: first
    name} and state_names (all keys) of the users' state_dicts; the report; and what fxzip.save writes down: cut,
    cloned (names), unmerges {target: (boundary node, task)}, example (arguments on the meta device), originals
    (per model {name: (shape, dtype)}) and signature (of the graph as built). With private stems also since (the
    module's path, the entries, see `Stems`) and stems {task: names of its nodes}.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        restore, arguments = super().__reduce__()
        return _restored, (restore, arguments, self.meta)


def _restored(restore: Any, arguments: tuple, meta: dict) -> Zipped:
    plain = restore(*arguments)
    zipped = Zipped(plain, plain.graph, class_name=plain.__class__.__name__)
    zipped.meta = meta
    return zipped


def notes(zipped: fx.GraphModule) -> dict[str, Any]:
    """meta["fxzip"] of a merged module; InputError for any other."""
    found = getattr(zipped, "meta", {}).get(KEY)
    if not isinstance(found, dict) or "tasks" not in found:
        raise InputError(
            f"expected the result of fxzip.merge, got a {type(zipped).__name__} without its notes"
        )
    return found
