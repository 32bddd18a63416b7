"""How a model is called: which arguments are tensors, which are fixed, and what of its output counts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import BoundArguments, Parameter, Signature, signature
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..errors import InputError

_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_CONTAINERS = (tuple, list, dict, OrderedDict)
_PLAIN = (Tensor, bool, int, float, str, type(None))


@dataclass(frozen=True)
class Call:
    """args: example values of the arguments that hold tensors, in order; fixed: all others, by name;
    leaves: modules to keep whole; resizable: the model runs at other batch sizes; forward_fn: what is called
    instead of the model, with the model first."""

    signature: Signature
    args: tuple
    fixed: Mapping[str, Any]
    leaves: tuple[str | type, ...] = ()
    resizable: bool = True
    forward_fn: Callable[..., Any] | None = None

    @property
    def names(self) -> list[str]:
        """A name for each of `args`."""
        found = []
        for p in self.signature.parameters.values():
            if p.kind is p.VAR_POSITIONAL:
                found += [f"{p.name}_{k}" for k in range(len(self.args) - len(found))]
            elif p.name not in self.fixed and p.kind is not p.VAR_KEYWORD:
                found.append(p.name)
        return found[: len(self.args)]

    def run(self, model: nn.Module, args: tuple) -> Any:
        """The counted outputs of `model` on `args`."""
        bound = BoundArguments(self.signature, OrderedDict(self.fixed))
        rest = list(args)
        for p in self.signature.parameters.values():
            if p.kind is p.VAR_POSITIONAL:
                bound.arguments[p.name], rest = tuple(rest), []
            elif p.name not in self.fixed and rest:
                bound.arguments[p.name] = rest.pop(0)
        if self.forward_fn is not None:
            return counted(self.forward_fn(model, *bound.args, **bound.kwargs))
        return counted(model(*bound.args, **bound.kwargs))


def call_signature(model: nn.Module, forward_fn: Callable[..., Any] | None) -> Signature:
    """The parameters of the model's forward, or of `forward_fn` after the model.

    >>> call_signature(nn.Linear(2, 1), lambda model, x, mask=None: model(x * mask))
    <Signature (x, mask=None)>
    """
    if forward_fn is None:
        return signature(model.forward)
    whole = signature(forward_fn)
    parameters = list(whole.parameters.values())
    if not parameters or parameters[0].kind not in _POSITIONAL:
        raise InputError(f"forward_fn{whole} must take the model first: forward_fn(model, x)")
    return whole.replace(parameters=parameters[1:])


def counted(output: Any) -> Any:
    """What of a model's output a merged model returns: tensors in plain containers as they are; of any other
    object (a transformers ModelOutput) its `logits`, or else its first floating tensor.

    >>> from types import SimpleNamespace; import torch
    >>> counted(SimpleNamespace(loss=None, logits=torch.ones(2), cache=object()))
    tensor([1., 1.])
    """
    if _is_plain(output):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    return next((x for x in tensors_of(output) if x.is_floating_point()), output)


def tensors_of(output: Any) -> list[Tensor]:
    """Tensors of a model's output, in order: pytrees, mappings and dataclass-like objects."""
    found = []
    for leaf in tree_flatten(output)[0]:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (type, nn.Module)):
            found += [x for x in tree_flatten(list(vars(leaf).values()))[0] if isinstance(x, Tensor)]
    return found


def _is_plain(output: Any) -> bool:
    """Whether `output` holds nothing but tensors and numbers, in containers that fx can write down."""
    if type(output) in _CONTAINERS or (isinstance(output, tuple) and hasattr(output, "_fields")):
        values = output.values() if isinstance(output, dict) else output
        return all(_is_plain(v) for v in values)
    return isinstance(output, _PLAIN)
