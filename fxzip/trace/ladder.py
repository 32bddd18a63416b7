"""trace(): a model -> a GraphModule proven equal to it on the example, at two batch sizes."""

from __future__ import annotations

import copy
import difflib
import inspect
import linecache
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from ..errors import InputError, TraceError
from .call import Call, call_signature, counted, tensors_of
from .exported import NOTICE as EVAL_ONLY
from .exported import exported
from .guards import kept_rng, untraceable, unwritten
from .hooks import without_onlookers
from .inputs import batch_size, beside, bind, describe, faking, on_meta, rows
from .lengths import symbolic_lengths
from .lines import FXZIP_ROOT, TORCH_ROOT, user_line
from .plain import plain
from .state import empty
from .symbolic import frozen_functionals, symbolic

# Tried in order; each is rung(model, call) -> GraphModule and may raise anything.
RUNGS = (symbolic, exported)
Forward = Callable[[tuple], list[Tensor]]
SHAPES_ONLY = "on the meta device: shapes were compared, not values, and nothing is proven"
_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}  # relative; float32 and float64: 1e-4


@dataclass(frozen=True)
class Traced:
    """graph_module: over deep copies of the parameters, in eval; rung: which front end made it;
    notices: what the user should know."""

    graph_module: fx.GraphModule
    rung: str
    notices: tuple[str, ...]


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    leaf_modules: Sequence[str | type] = (),
    concrete_args: Mapping[str, Any] | None = None,
    forward_fn: Callable[..., Any] | None = None,
) -> Traced:
    """Trace an eval-mode deep copy of `model`; the model itself, global modes and RNG are left as they are.

    example_inputs: a batch as a loader gives it (see `bind`), on any device. Optional arguments it does not give are
        fixed at their defaults and leave the signature.
    leaf_modules: names or classes to keep whole. concrete_args: name -> value of arguments to fix.
    forward_fn: called as forward_fn(model, x, ...) instead of model(x, ...), to choose what comes out.

    The graph must give the original's outputs on the example and at another batch size, to 1e-4 relative.
    Weights that are computed (weight norm and other parametrizations) become plain ones, with a notice; of a model
    on the meta device shapes alone are compared, with a notice.
    Raises InputError if the call is wrong or the model itself fails on the example; TraceError if no rung
    gives an equal graph, or if hooks that do anything, or randomness in eval, would be lost.

    >>> traced = trace(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), torch.ones(2, 3))
    >>> traced.rung, [n.op for n in traced.graph_module.graph.nodes]
    ('symbolic', ['placeholder', 'call_module', 'call_module', 'output'])
    """
    model, notices = plain(model)
    problems = untraceable(model)
    if problems:
        raise TraceError("trace: " + "; ".join(problems))
    name = type(model).__name__
    leaves = _checked_leaves(model, tuple(leaf_modules))
    signature = call_signature(model, forward_fn)
    concrete = _checked_concrete(signature, dict(concrete_args or {}))
    args, fixed = _arguments(example_inputs, signature, concrete)
    args = beside(args, model)
    notices = (*notices, SHAPES_ONLY) if on_meta(model) else notices
    with kept_rng([*model.parameters(), *model.buffers()]), torch.no_grad():
        reference = _copy(model)
        how = Call(signature, args, fixed, leaves, forward_fn=forward_fn)

        def call(args: tuple) -> list[Tensor]:
            mine = _cloned(args)
            with unwritten(reference, mine, how.names), faking() if on_meta(reference) else nullcontext():
                return tensors_of(how.run(reference, mine))

        expected, more = _expected(call, name, args, signature)
        model, looking, problems = without_onlookers(model, lambda m: tensors_of(how.run(m, _cloned(args))))
        if problems:
            raise TraceError("trace: " + "; ".join(problems))
        notices = (*notices, *looking)
        how = replace(how, resizable=len(expected) > 1)
        failures = []
        for rung in RUNGS:
            traced_copy = _copy(model, reference)
            try:
                with symbolic_lengths(traced_copy, forward_fn):
                    graph_module = rung(traced_copy, how)
                _agree(graph_module, expected)
            except Exception as error:
                failures.append(f"  {rung.__name__}: {_reason(error, traced_copy)}")
                empty(traced_copy)
                continue
            more = (*more, EVAL_ONLY) if rung is exported else (*more, *_frozen(graph_module))
            empty(reference)
            empty(traced_copy, graph_module)
            return Traced(graph_module, rung.__name__, (*notices, *more))
        _refuse_random(call, name, *expected[0])
    raise TraceError("\n".join([f"{name} could not be traced", *failures, _WAYS_OUT]))


_WAYS_OUT = (
    "  Ways out: write what stops both in tensor operations; forward_fn=lambda model, x: model(x, flag=False) fixes an"
    " argument that steers Python control flow."
)


def _checked_leaves(model: nn.Module, leaves: tuple[str | type, ...]) -> tuple[str | type, ...]:
    names = [name for name, _ in model.named_modules() if name]
    for leaf in leaves:
        if not isinstance(leaf, (str, type)):
            raise InputError(f"leaf_modules takes module names and classes, not {leaf!r}")
        if isinstance(leaf, str) and leaf not in names:
            raise InputError(f"leaf_modules: no module is named {leaf!r}{_did_you_mean(leaf, names)}")
    return leaves


def _checked_concrete(signature: inspect.Signature, concrete: dict[str, Any]) -> dict[str, Any]:
    for name in concrete:
        if name not in signature.parameters:
            hint = _did_you_mean(name, list(signature.parameters))
            raise InputError(f"concrete_args: forward has no parameter {name!r}{hint}; it takes {signature}")
    return concrete


def _did_you_mean(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _arguments(example: Any, signature: inspect.Signature, concrete: Mapping[str, Any]) -> tuple[tuple, dict]:
    """Tensor arguments by position, and everything else of the signature by name and value."""
    free = signature.replace(parameters=[p for n, p in signature.parameters.items() if n not in concrete])
    given = bind(example, free)
    names = [p for p in free.parameters.values() if p.kind is not p.VAR_KEYWORD]
    fixed = {p.name: p.default for p in names[len(given) :] if p.default is not p.empty} | dict(concrete)
    args = []
    for p, value in zip(names, given, strict=False):
        if any(isinstance(x, Tensor) for x in tree_flatten(value)[0]):
            args.append(value)
        else:
            fixed[p.name] = value
    args += given[len(names) :]  # a forward with *args
    return tuple(args), fixed


def _copy(model: nn.Module, lender: nn.Module | None = None) -> nn.Module:
    """A deep copy in eval mode. lender: an equal copy that has run and has not written to its parameters: they are in
    memory once for both."""
    lent = dict(lender.named_parameters()) if lender else {}
    memo = {
        id(p): nn.Parameter(lent[n].detach(), p.requires_grad)
        for n, p in model.named_parameters()
        if n in lent and type(p) is type(lent[n]) is nn.Parameter and lent[n].shape == p.shape
    }
    try:
        duplicate = copy.deepcopy(model, memo).eval()
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} cannot be deep-copied: {type(error).__name__}: {error}"
        ) from error
    for module in duplicate.modules():
        module._compiled_call_impl = None  # module.compile(): the plain forward is what we compare with
    return duplicate


def _expected(call: Forward, name: str, args: tuple, signature: inspect.Signature):
    """[(args, output tensors)] of the untouched model at two batch sizes, and notices."""
    try:
        first = call(args)
    except TraceError:
        raise
    except Exception as error:
        raise InputError(
            f"{name} fails on the example inputs {describe(args)}; forward takes {signature}:"
            f" {type(error).__name__}: {error}"
        ) from error
    if not first:
        raise TraceError(f"{name}.forward returns no tensor")
    size = batch_size(args)
    other = rows(args, 2 if size == 1 else 1)
    try:
        return [(args, first), (other, call(other))], ()
    except TraceError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        notice = f"checked at batch size {size} only: the model itself fails at another ({reason})"
        return [(args, first)], (notice,)


def _refuse_random(call: Forward, name: str, args: tuple, first: list[Tensor]) -> None:
    """A second pass of the untouched model must repeat the first."""
    if _difference(first, call(args)):
        raise TraceError(
            f"{name} is random in eval mode: two passes on one batch differ. Make the randomness depend on"
            f" self.training, or take the noise as an input"
        )


def _cloned(args: tuple) -> tuple:
    return tuple(x.clone() if isinstance(x, Tensor) else copy.deepcopy(x) for x in args)


def _agree(graph_module: fx.GraphModule, expected: list[tuple[tuple, list[Tensor]]]) -> None:
    graph_module.graph.lint()
    for args, wanted in expected:
        difference = _difference(wanted, tensors_of(counted(graph_module(*_cloned(args)))))
        if difference:
            raise TraceError(
                f"the graph does not compute the same at batch size {batch_size(args)}: {difference}"
            )


def _difference(wanted: list[Tensor], given: list[Tensor]) -> str:
    """ "" if equal up to rounding, else what differs first."""
    if len(wanted) != len(given):
        return f"{len(given)} output tensors instead of {len(wanted)}"
    for k, (a, b) in enumerate(zip(wanted, given, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"output {k} is {describe(b)} instead of {describe(a)}"
        if a.is_meta and b.is_meta:
            continue
        if not a.is_floating_point() and not a.is_complex():
            if not torch.equal(a, b):
                return f"output {k} ({describe(a)}) differs"
            continue
        a, b = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (a, b))
        finite = a[a.isfinite()].abs()
        scale = float(finite.max()) if finite.numel() else 0.0
        limit = _TOLERANCE.get(wanted[k].dtype, 1e-4) * scale
        if not torch.allclose(a, b, rtol=0, atol=max(limit, 1e-30), equal_nan=True):
            gap = float((a - b).abs().nan_to_num(torch.inf).max())
            return f"output {k} is off by {gap:.2g}, where values reach {scale:.2g}"
    return ""


def _reason(error: Exception, model: nn.Module) -> str:
    """The error in one line, with the user's line and the innermost of the user's modules at fault."""
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    if "'len' is not supported" in text:
        text = "len() of a tensor is a plain number, which cannot be traced: write x.shape[0]"
    frames = [
        (frame, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if not frame.f_code.co_filename.startswith((TORCH_ROOT, FXZIP_ROOT, "<"))
    ]
    if not frames:
        return text
    frame, line = frames[-1]
    code = linecache.getline(frame.f_code.co_filename, line).strip()
    text += f" at {os.path.basename(frame.f_code.co_filename)}:{line}: {code}"
    owners = [f.f_locals.get("self") for f, _ in frames]
    names = {id(m): n for n, m in model.named_modules() if n}
    inside = [names[id(m)] for m in owners if id(m) in names]
    return text + (f" (in module {inside[-1]!r})" if inside else "")


def _frozen(graph_module: fx.GraphModule) -> tuple[str, ...]:
    """One notice for all dropout-like functions whose training flag the trace has fixed."""
    nodes = frozen_functionals(graph_module)
    if not nodes:
        return ()
    names = " and ".join(sorted({getattr(n.target, "__name__", str(n.target)) for n in nodes}))
    line = user_line(nodes[0])
    at = f", first at {line}" if line else ""
    are = "are" if " and " in names else "is"
    return (f"functional {names} {are} frozen in eval mode ({len(nodes)} call{'s' * (len(nodes) > 1)}{at})",)
