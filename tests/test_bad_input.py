"""Wrong, odd and hostile calls: refused in the words of bad_inputs.txt, or right; and the user's models unchanged."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from bad_inputs import CASES, Case, outcome
from bad_loaders import X
from bad_models import Net
from helpers import unchanged
from torch import nn

import fxzip
from fxzip.trace import unwrap

torch.set_num_threads(1)
TEXTS = Path(__file__).parent / "bad_inputs.txt"


@pytest.fixture(autouse=True)
def no_process_group_stays():
    """Sharded weights need one."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def texts() -> dict[str, str]:
    """Case -> what it says; blocks of `## name` and lines."""
    blocks = TEXTS.read_text().split("## ")[1:] if TEXTS.exists() else []
    return {name: text.strip() for name, _, text in (b.partition("\n") for b in blocks)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bad_input(case: Case, update_golden: bool):
    torch.manual_seed(0)
    call = case.call()
    given = list(call[0].values()) if isinstance(call[0], dict) else call[0] if isinstance(call[0], list) else []
    ours = [m for m in given if isinstance(m, nn.Module) and _walkable(m)]
    with unchanged(ours):
        found = outcome(Case(case.name, lambda: call, case.works))
    assert (found == "works") == case.works, found
    if update_golden:
        known = {c.name: t for c in CASES if (t := {**texts(), case.name: found}.get(c.name)) not in (None, "works")}
        TEXTS.write_text("".join(f"## {name}\n{text}\n\n" for name, text in known.items()).rstrip() + "\n")
    assert found == texts().get(case.name, "works")


def _walkable(model: nn.Module) -> bool:
    """Whether state and hooks can be compared: not of what is scripted, quantised, sharded or a cycle."""
    try:
        repr(model)
    except RecursionError:
        return False
    kinds = (nn.Parameter, torch.Tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [t for m in unwrap(model)[0].modules() for t in (*m._parameters.values(), *m._buffers.values())]
    return all(t is None or type(t) in kinds and t.layout is torch.strided and not t.is_meta for t in tensors)


def test_the_table():
    """Every kind is there, each once; nothing in the texts is left over."""
    assert len({c.name for c in CASES}) == len(CASES) >= 60
    assert set(texts()) == {c.name for c in CASES if not c.works}


def test_a_failing_proof_can_be_overruled(monkeypatch):
    from fxzip.infer.rules.registry import _RULES, Rule

    def wrong(ctx, out, input, weight, bias=None, **_):
        for group in weight.type.groups:
            ctx.role(group.labels, "consume")
        product = ctx.einsum([(input.type, "ay"), (weight.type, "zy")], "az", out[0].shape)
        return ctx.pointwise([product, bias.type], out[0].shape)

    monkeypatch.setitem(_RULES, "linear", Rule(wrong, True))
    torch.manual_seed(0)
    models = [Net(), Net()]
    with pytest.raises(fxzip.VerificationError, match="Nothing was merged"):
        fxzip.merge(models, [X], method="permute", progress=False)
    with pytest.warns(fxzip.MergeWarning, match="the proof failed"):
        zipped = fxzip.merge(models, [X], method="permute", progress=False, verify="report")
    assert any("the proof failed" in n for n in fxzip.report(zipped).notices)
    assert "NOT SOUND" in str(fxzip.report(zipped))
