"""Post passes for networks that were merged by anything: batch-norm statistics anew, REPAIR and RESCALE."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import nn

from . import passes
from .errors import InputError
from .measure import read_batches
from .repair import affine_sites, repair_parameters
from .rewrite import owned, recompute_statistics
from .trace import state_by_all_names

M = TypeVar("M", bound=nn.Module)


def reset_statistics(network: M, loader: Iterable, *, calibration: int = 2048, seed: int = 0) -> M:
    """A copy of any network whose batch norms have the statistics of these batches; all else is as it was.

    loader, calibration, seed: as for `merge`; labels are ignored. Averaged weights make other values than either model,
    so averaged statistics are wrong: without this an interpolated or merged network is near chance.
    Raises InputError where there is no batch norm, or no batch.

    >>> net = nn.Sequential(nn.BatchNorm1d(2)).eval()
    >>> reset_statistics(net, [torch.full((4, 2), 3.0)])[0].running_mean, net[0].running_mean
    (tensor([3., 3.]), tensor([0., 0.]))
    """
    fresh = copy.deepcopy(network)
    device = next((t.device for t in (*fresh.parameters(), *fresh.buffers())), torch.device("cpu"))
    batches = read_batches(loader, signature(fresh.forward), calibration, device, seed)
    if not recompute_statistics(fresh, batches, lambda batch: batch):
        raise InputError("fxzip.reset_statistics: the network has no batch norm that tracks statistics")
    return fresh


def respread(
    network: M,
    models: Sequence[nn.Module] | Mapping[str, nn.Module],
    loader: Iterable,
    *,
    shift: bool = True,
    model_weights: Any = None,
    calibration: int = 2048,
    seed: int = 0,
    **options: Any,
) -> M:
    """REPAIR as a pass of its own: a copy of `network` whose features have the mean and deviation that the models' have
    on average; shift=False (RESCALE) leaves the means.

    Jordan et al., ICLR 2023, as in `Repair`. network: of the models' architecture, merged or interpolated by anything;
    its features correspond to theirs in the order they are in, as after an alignment. What is corrected is written into
    weights and biases of the layers before the head, and batch-norm statistics are recomputed: no hook stays behind.
    loader, model_weights, calibration, seed and further options (device, forward_fn): as for `merge`.
    Raises InputError for a network of another architecture, and what `merge` raises.

    >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2))
    >>> half = copy.deepcopy(a)
    >>> for p, q in zip(half.parameters(), b.parameters()):
    ...     p.data = p.data.lerp(q.data, 0.5)
    >>> x = torch.randn(256, 4)
    >>> fixed, want = respread(half, [a, b], [x])[0](x).std(0), (a[0](x).std(0) + b[0](x).std(0)) / 2
    >>> bool(torch.allclose(fixed, want, rtol=1e-3))
    True
    """
    call = "fxzip.respread"
    if not isinstance(network, nn.Module):
        raise InputError(f"{call}: network must be an nn.Module, not {type(network).__name__}")
    graph = passes.start(models, loader, call=call, progress=False, calibration=calibration,
                         model_weights=model_weights, **options)  # fmt: skip
    for stage in (passes.Infer(), passes.Cut(), passes.Read(calibration, seed), passes.Match("average")):
        graph = stage(graph).graph_module
    job = passes.job(graph)
    p, state = job.prepared, state_by_all_names(network)
    names = owned(p.graph_modules[0], p.cut.shared)
    own = state_by_all_names(p.graph_modules[0])
    odd = [n for n in names if n not in state or state[n].shape != own[n].shape]
    if odd:
        found = f"is {list(state[odd[0]].shape)}, not {list(own[odd[0]].shape)}" if odd[0] in state else "is missing"
        raise InputError(f"{call}: network has not the models' architecture: {odd[0]} {found}")
    shared = {n: state[n].detach().to(own[n]) for n in names}
    if not affine_sites(p.spaces, p.cut, shared)[0]:
        raise InputError(f"{call}: no layer before the head has a weight and a bias of its own: nothing to correct")
    repaired, _ = repair_parameters(p.graph_modules, p.spaces, p.cut, job.matchings, shared, job.batches, shift,
                                    p.shares)  # fmt: skip
    fresh = copy.deepcopy(network)
    with torch.no_grad():
        for name, tensor in state_by_all_names(fresh).items():
            if name in repaired:
                tensor.copy_(repaired[name])
    recompute_statistics(fresh, job.batches, lambda batch: batch)
    return fresh
