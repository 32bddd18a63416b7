"""How far fxzip gets with one model; and the table of those that were tried, docs/COVERAGE.md."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from fnmatch import fnmatch
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxzip

from ..errors import FxzipError, InputError
from ..report import table
from ..rewrite import recompute_statistics
from ..trace import bind, counted, first_rows, tensors_of
from ..trace.guards import seeded

TABLES = (Path(__file__).parent.parent / "coverage.json", Path(__file__).parents[2] / "docs" / "coverage.json")
RECOVERED = 1e-3  # relative error
BATCH = 4


@dataclass(frozen=True)
class Row:
    """Answers in order; the first that is no ends the list."""

    answers: tuple[tuple[str, bool, str], ...]

    @property
    def ok(self) -> bool:
        """Traced, sound and recovered."""
        return all(good for _, good, _ in self.answers)

    def __str__(self) -> str:
        return "\n".join(f"{name:10}{'yes' if good else 'no':5}{text}" for name, good, text in self.answers)


def measured(model: nn.Module, example: Any, seed: int = 0) -> Row:
    """Traced? Sound? And is the model recovered when it is merged with a copy whose features were shuffled?"""
    found: list[tuple[str, bool, str]] = []
    try:
        spaces = fxzip.inspect(model, example)
    except FxzipError as error:
        return Row((("traced", False, str(error)),))
    found.append(("traced", True, next(iter(spaces.notices), "")))
    frozen = [str(f) for f in spaces.frozen]
    found.append(("spaces", True, f"{len(list(spaces))}; frozen: {'; '.join(frozen) or 'none'}"))
    proof = fxzip.verify(model, example, seed=seed)
    found.append(("sound", proof.ok, str(proof)))
    if proof.ok:
        found.append(_recovery(copy.deepcopy(model), example, seed))
    return Row(tuple(found))


def published(only: str = "*") -> str:
    """The committed table, as text. Raises InputError if this installation has none."""
    path = next((p for p in TABLES if p.is_file()), None)
    if path is None:
        raise InputError("this installation has no table: see docs/COVERAGE.md in fxzip's repository")
    rows = [r for r in json.loads(path.read_text(encoding="utf-8")) if fnmatch(r["name"], only)]
    if not rows:
        raise InputError(f"--only {only!r}: no such model in the table")
    shown = [
        (
            f"{r['suite']}:{r['name']}",
            *("yes" if yes else "no" for yes in ("rung" in r, bool(r.get("sound")))),
            {True: "yes", False: "no"}.get(r.get("recovered"), "not tried"),  # type: ignore[arg-type]
            f"{100 * r['free']:.1f}" if "free" in r else "-",
        )
        for r in rows
    ]
    traced, sound = sum("rung" in r for r in rows), sum(r.get("sound") is True for r in rows)
    total = f"{len(rows)} models, {traced} traced, {sound} sound"
    return "\n".join([*table(("model", "traced", "sound", "recovered", "free %"), shown), "", total])


def _recovery(model: nn.Module, example: Any, seed: int) -> tuple[str, bool, str]:
    """Features of a new network are all alike in their biases and norms: these are moved apart first."""
    batch = first_rows(example, BATCH)
    with seeded(seed, model.parameters()), torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and tensor.numel() > 1 and tensor.dim() <= 1 and "running_var" not in name:
                tensor.add_(0.1 * torch.randn_like(tensor))
    try:
        run = copy.deepcopy(model)  # one of transformers that has run carries hooks
        recompute_statistics(run, [batch], lambda b: bind(b, signature(model.forward)))
        model.load_state_dict(run.state_dict())
        scrambled = fxzip.scramble(model, batch, seed)
        zipped = fxzip.merge([model, scrambled], [batch], method="permute", seed=seed, verify=False, progress=False)
    except FxzipError as error:
        return "recovered", False, str(error)
    error = _far(zipped, model, batch)
    return "recovered", error < RECOVERED, f"relative error {error:.1e}, after a merge with a shuffled copy"


@torch.no_grad()
def _far(zipped: nn.Module, model: nn.Module, batch: Any) -> float:
    """Largest deviation of an output, relative to the largest output."""
    outputs = zipped(*bind(batch, signature(zipped.forward)))
    wanted = [t for t in tensors_of(counted(model(*bind(batch, signature(model.forward))))) if t.is_floating_point()]
    worst = 0.0
    for output in outputs:
        given = [t for t in tensors_of(output) if t.is_floating_point()]
        for a, b in zip(given, wanted, strict=True):
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)))
    return worst
