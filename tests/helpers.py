"""Helpers that several test files use."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from fxzip import passes
from fxzip.solve import Settings, Solved, solve_parameters

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def _snapshot(model: nn.Module) -> dict:
    """Everything a user could see change in a model."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {
        "values": {name: t.detach().clone() for name, t in tensors},
        "identity": {name: (id(t), t.data_ptr(), t.requires_grad, t.dtype) for name, t in tensors},
        "grads": {name: None if t.grad is None else t.grad.clone() for name, t in tensors},
        "modules": {name: (id(m), type(m), m.training) for name, m in model.named_modules()},
        "hooks": {name: [list(getattr(m, h)) for h in HOOKS] for name, m in model.named_modules()},
        "attributes": {name: sorted(vars(m)) for name, m in model.named_modules()},
    }


def _globals() -> dict:
    """Process-wide state that a library must leave alone."""
    return {
        "python random": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "mkldnn": torch._C._get_mkldnn_enabled(),
        "cudnn": torch.backends.cudnn.enabled,
        "mha fastpath": torch.backends.mha.get_fastpath_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "flash attention": torch.backends.cuda.flash_sdp_enabled(),
        "linear": torch.nn.functional.linear,
        "threads": torch.get_num_threads(),
    }


@contextmanager
def unchanged(models: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]) -> Iterator[None]:
    """Assert that the block leaves `models` bit-identical (tensors, flags, hooks, attributes, gradients), and
    the global random states and modes as they were, also if it raises."""
    if isinstance(models, nn.Module):
        models = [models]
    models = list(models.values()) if isinstance(models, Mapping) else list(models)
    before = [_snapshot(m) for m in models]
    rng, legacy, state = torch.get_rng_state(), np.random.get_state(), _globals()
    try:
        yield
    finally:
        for k, (model, old) in enumerate(zip(models, before, strict=True)):
            new = _snapshot(model)
            for what in ("identity", "modules", "hooks", "attributes"):
                assert new[what] == old[what], f"model {k}: {what} changed"
            for what in ("values", "grads"):
                for name, value in old[what].items():
                    assert _same(value, new[what][name]), f"model {k}: {name} changed ({what})"
        assert torch.equal(torch.get_rng_state(), rng), "torch's random state changed"
        pairs = zip(np.random.get_state(), legacy, strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs), "numpy's random state changed"
        assert _globals() == state, "global modes changed"


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Equal bit for bit, NaN included."""
    if a is None or b is None:
        return a is b
    return torch.equal(a, b) or (a.is_floating_point() and torch.allclose(a, b, 0, 0, equal_nan=True))


def solved(nets: list[nn.Module], batches: list, settings: Settings | None, **given) -> Solved:
    """`solve_parameters` on what the passes before it make."""
    graph = passes.start(nets, batches, progress=False)
    for stage in (passes.Infer(), passes.Cut(), passes.Read(), passes.Measure(), passes.Match(), passes.Average()):
        graph = stage(graph).graph_module
    job = passes.job(graph)
    p = job.prepared
    return solve_parameters(p.graph_modules, p.spaces, p.cut, job.matchings, job.shared, job.heads, job.batches,
                            settings, False, **given)  # fmt: skip
