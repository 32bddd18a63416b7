"""Proof on the user's own model that what was inferred is right: `verify`, and `scramble` for tests.

In float64, with perturbed weights and calibrated norms: a random element of the inferred group must leave
the output unchanged; leaving out one use of it must not (negative control). For roles: a unit is duplicated
and consuming weight shifted between the copies; the output must not move, and must move when the weight is
taken from one copy only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map

from .allocator import retained
from .errors import InputError
from .infer import FeatureSpace, Spaces, analyse
from .infer.group import axis_indices, duplicated, moved, permuted
from .infer.sampling import sample
from .rewrite.norms import recompute_statistics
from .trace import Traced, beside, bind, duplicate, make_plain, rows, state_by_all_names, state_of, trace, unwrap
from .trace.guards import seeded
from .trace.precision import double_by_default, in_double
from .verification import TOLERANCE, Verification, fires

_CONTROLS = 3  # that are always tried
_MORE_CONTROLS = 64  # while none fires
_DRAWS = 4


def verify(
    model: nn.Module, example_inputs: Any, seed: int = 0, forward_fn: Callable[..., Any] | None = None
) -> Verification:
    """Prove (numerically, in float64) that the spaces inferred for `model` are feature spaces.

    model: any traceable module; it is not changed. example_inputs: a batch (tensor, tuple or dict).
    forward_fn: called as forward_fn(model, x, ...) instead of model(x, ...).
    Raises TraceError when the model cannot be traced, InputError when it has no values, SpaceError when what was
    inferred contradicts itself. Takes about ten forward passes of one sample.

    >>> bool(verify(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 4)))
    True
    """
    _refuse_meta(model, "verify")
    traced = trace(model, example_inputs, forward_fn=forward_fn)
    args = beside(bind(example_inputs, signature(traced.graph_module.forward)), traced.graph_module)
    return verify_spaces(traced, analyse(traced.graph_module, args), args, seed)


@retained()
def verify_spaces(traced: Traced, spaces: Spaces, args: tuple, seed: int = 0) -> Verification:
    """As `verify`, for spaces that are known already. args: positional example arguments, any batch size.

    A draw that proves nothing (the units it moves are silent on its sample) is followed by another, on more samples,
    _DRAWS in all, and then by one on random parameters, which counts if it proves or disproves anything.
    """
    drawn: list[Verification] = []
    while not drawn or (drawn[-1].inconclusive and len(drawn) < _DRAWS):
        drawn.append(_one_proof(traced, spaces, args, seed + 1000 * len(drawn), 4 ** len(drawn)))
    if drawn[-1].inconclusive and not drawn[-1].chaotic:
        other = _one_proof(traced, spaces, args, seed, 4**_DRAWS, redrawn=True)
        if not other.inconclusive and np.isfinite(other.error):
            return other
    return drawn[-1]


def _one_proof(
    traced: Traced, spaces: Spaces, args: tuple, seed: int, samples: int, redrawn: bool = False
) -> Verification:
    rng = np.random.default_rng(seed)
    quiet = seeded(seed, state_of(traced.graph_module).values())
    with quiet, torch.no_grad(), double_by_default(), in_double(traced.graph_module) as module:
        first, other = _two_inputs(args, samples)
        if redrawn:
            _redraw(module)
        _perturb(module, first, other)
        state = state_of(module)

        def outputs(parameters: Mapping[str, Tensor], inputs: tuple = first) -> list[Tensor]:
            return _floating(functional_call(module, dict(parameters), inputs, tie_weights=True))

        reference = outputs(state)
        sensitivity = _distance(outputs(state, other), reference)
        indices = axis_indices(spaces, sample(spaces, rng, draws=16), state)
        with moved(state, indices):
            error = _distance(outputs(state), reference)
        controls = {}
        several = {(g.parameter, g.axis) for space in spaces if _uses(space) > 1 for g in space.segments}
        candidates = [use for use in indices if use in several]  # leaving out an only use is no change at all
        for tried, i in enumerate(rng.permutation(len(candidates))[:_MORE_CONTROLS]):
            if tried >= _CONTROLS and any(fires(c, error) for c in controls.values()):
                break
            use = candidates[i]
            with moved(state, indices, leave_out=[use]):
                controls[f"{use[0]}[{use[1]}]"] = _distance(outputs(state), reference)
        again = copy.deepcopy(rng)
        roles, roles_control = _roles(spaces, state, outputs, rng)
        small = error < TOLERANCE and not roles >= TOLERANCE
        rounding = 0.0 if small else max(_roundings(spaces, state, outputs, again))
    return Verification(error, controls, roles, roles_control, sensitivity, len(spaces), rounding, redrawn)


def _uses(space: FeatureSpace) -> int:
    return len({(g.parameter, g.axis) for g in space.segments})


def _roles(spaces: Spaces, state, outputs, rng) -> tuple[float, float]:
    """Output change when weight moves between copies, and when it is taken from one; nan when no space has
    both a consumer and two exchangeable units to copy."""
    found = [outputs(state) for _ in duplicated(state, _lowest(spaces), rng)]
    if not found:
        return float("nan"), float("nan")
    base, shifted, control = found
    return _distance(shifted, base), _distance(control, base)


def _lowest(spaces: Spaces) -> list[FeatureSpace]:
    above = {p.space for space in spaces for p in space.parents}
    return [s for s in spaces if s.name not in above]


def _roundings(spaces: Spaces, state, outputs, rng) -> Iterator[float]:
    """Output change by rounding alone, as the network is and where `_roles` begins: it may be chaotic in one only."""
    yield _distance(outputs(_nudged(state)), outputs(state))
    with closing(duplicated(state, _lowest(spaces), rng)) as steps:
        for _ in steps:
            yield _distance(outputs(_nudged(state)), outputs(state))
            return


def _nudged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every number off by a few units of rounding."""
    return {n: t * (1 + 1e-15 * torch.randn_like(t)) if t.is_floating_point() else t for n, t in state.items()}


def scramble(
    model: nn.Module, example_inputs: Any, seed: int = 0, forward_fn: Callable[..., Any] | None = None
) -> nn.Module:
    """A copy of `model` that computes the same function with randomly re-coordinated features.

    Every inferred space is permuted at random (structure respected); weights that are computed become plain
    ones. The standard test input of fxzip: merging a model with its scrambled copy must give back the model.

    >>> m = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)); x = torch.randn(2, 4)
    >>> s = scramble(m, x); torch.allclose(s(x), m(x), atol=1e-6), torch.equal(s[0].weight, m[0].weight)
    (True, False)
    """
    _refuse_meta(model, "scramble")
    traced = trace(model, example_inputs, forward_fn=forward_fn)
    args = beside(bind(example_inputs, signature(traced.graph_module.forward)), traced.graph_module)
    spaces = analyse(traced.graph_module, args)
    other = duplicate(model)
    make_plain(other)
    bare = unwrap(other)[0]
    tensors = state_by_all_names(bare)  # the graph need not call tied ones as named_parameters does
    state = {n: t.detach() for n, t in tensors.items()}
    indices = axis_indices(spaces, sample(spaces, np.random.default_rng(seed)), state)
    with torch.no_grad():
        for name, value in permuted(state, indices).items():
            if value is not state[name]:
                tensors[name].copy_(value)
    return other


def _refuse_meta(model: nn.Module, call: str) -> None:
    empty = next((n for n, p in model.named_parameters() if p.is_meta), None)
    if empty is not None:
        raise InputError(
            f"fxzip.{call}: {empty} is on the meta device and has no values, so nothing can be computed; give it some"
            " (to_empty() and load_state_dict()), or see fxzip.inspect for what shapes alone tell"
        )


def _two_inputs(args: tuple, samples: int) -> tuple[tuple, tuple]:
    """Two inputs in float64: the example's first sample and (for samples > 1) noise of the same scale, and noise.
    Integers are shuffled."""

    def noise(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.dim():
            return x
        if x.is_floating_point():
            scale = x.std() if x.numel() > 1 and x.std() > 0 else torch.ones((), dtype=x.dtype)
            return x.mean() + scale * torch.randn_like(x)
        return x.flatten()[torch.randperm(x.numel())].reshape(x.shape)

    def stacked(*parts: Any) -> Any:
        return torch.cat(parts) if isinstance(parts[0], Tensor) and parts[0].dim() else parts[0]

    one = tree_map(
        lambda x: x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x, rows(args, 1)
    )
    first = one if samples == 1 else tree_map(stacked, one, *(tree_map(noise, one) for _ in range(samples - 1)))
    return first, tree_map(noise, first)


def _perturb(module: fx.GraphModule, first: tuple, other: tuple) -> None:
    """Make every parameter matter: noise on near-constant ones, norm statistics from data, then noise on them."""
    for parameter in module.parameters():
        if parameter.is_floating_point() and parameter.numel() > 1 and _nearly_constant(parameter):
            scale = 0.2 * max(float(parameter.abs().mean()), 1.0)
            parameter.add_(scale * torch.randn_like(parameter))
    several = tree_map(lambda a, b: torch.cat([a, b]) if isinstance(a, Tensor) and a.dim() else a, first, other)
    recompute_statistics(module, [several], lambda batch: batch)
    for name, buffer in module.named_buffers():
        if name.endswith("running_var"):
            buffer.clamp_(min=1e-6).mul_(0.6 + 0.8 * torch.rand_like(buffer))
        elif name.endswith("running_mean"):
            buffer.add_(0.2 * buffer.std(unbiased=False).clamp(min=1e-3) * torch.randn_like(buffer))


def _redraw(module: fx.GraphModule) -> None:
    """Every parameter anew, matrices at a scale that keeps that of what passes."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            parameter.copy_(torch.randn_like(parameter) / max(fan_in, 1) ** 0.5)


def _nearly_constant(parameter: Tensor) -> bool:
    return parameter.dim() <= 1 or bool(parameter.std() < 1e-2 * parameter.abs().max().clamp(min=1e-2))


def _floating(outputs: Any) -> list[Tensor]:
    """The numbers among the outputs, complex ones as pairs; copies, as an output may be a parameter that is edited."""
    tensors = [x for x in tree_flatten(outputs)[0] if isinstance(x, Tensor)]
    plain = [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in tensors]
    return [x.clone() for x in plain if x.is_floating_point()]


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Of the output that differs most; NaN where one has any, which is no proof."""
    found = [_apart(x, y) for x, y in zip(a, b, strict=True) if y.numel()]
    return float(np.max(found)) if found else float("nan")
