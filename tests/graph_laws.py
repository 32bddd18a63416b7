"""What must hold for any network, checked on one: the inferred spaces are proven, and a scrambled copy merges back."""

from __future__ import annotations

import warnings

import torch
from random_net import RandomNet
from torch import Tensor, nn

import fxzip
from fxzip.infer import analyse
from fxzip.rewrite import recompute_statistics
from fxzip.trace import trace
from fxzip.verify import Verification, verify_spaces

FAR = 1e-6  # relative, float64


def judge(net: RandomNet, methods: tuple[str, ...] = ("permute", "zip")) -> str:
    """ "sound", "refused" (nothing can be merged), "inconclusive: ..."; or what is wrong, "unsound: ...",
    "scrambled: ...", "not recovered: ...". """
    data = net.inputs(48)
    recompute_statistics(net, [data], lambda batch: (batch,))
    found = proof(net)
    if found.error >= 1e-6 and not found.chaotic or found.roles >= 1e-6:
        return f"unsound: {found}"
    wanted = outputs(net, data)
    other = fxzip.scramble(net, data[:2], seed=1)
    gap = far(outputs(other, data), wanted)
    if not gap < FAR:
        return f"scrambled: off by {gap:.1e}"
    for method in methods:
        try:
            zipped = merged(net, other, data, method)
        except fxzip.SpaceError as error:
            if "nothing can be merged" in str(error):
                return "refused: nothing can be merged"
            raise
        gap = max(far(y, wanted) for y in outputs(zipped, data))
        if not gap < 1e-4:
            return f"not recovered: by {method}, off by {gap:.1e}"
    return "sound" if found.ok else f"inconclusive: {found.problems[0]}"


def proof(net: RandomNet) -> Verification:
    """Inference and proof, afresh: also for rules that a test replaced."""
    x = net.inputs(2)
    traced = trace(net, x)
    return verify_spaces(traced, analyse(traced.graph_module, (x,)), (x,))


def merged(net: nn.Module, other: nn.Module, data: Tensor, method: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxzip.MergeWarning)
        return fxzip.merge([net, other], [data], method=method, progress=False, verify=False)


def outputs(module: nn.Module, data: Tensor):
    with torch.no_grad():
        return module(data)


def far(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def caught(net: RandomNet) -> bool:
    """Whether the proof fails on it, beyond saying that it proves nothing."""
    found = proof(net)
    return not found.ok and not found.inconclusive
