"""From matchings to one network: its parameters, its widths, its graph, its batch-norm statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from .errors import InputError
from .evaluate import cost
from .infer import Spaces
from .match import Matching, lossless
from .measure.moments import Moments
from .prepared import Prepared
from .processes import ALONE, Processes
from .rewrite import Heads, build, head_parameters, merge_parameters, owned, recompute_statistics
from .trace import rows, state_by_all_names
from .widths import Term, allocate, cost_terms, probe, resizable


def merged_parameters(p: Prepared, matchings: Mapping[str, Matching]) -> tuple[dict[str, Tensor], Heads]:
    """Zipped weights of the shared part, and what every model keeps with U absorbed or explicit."""
    modules = p.graph_modules
    states = [state_by_all_names(m) for m in modules]
    shared = merge_parameters(states, p.spaces, matchings, owned(modules[0], p.cut.shared), p.shares)
    return shared, head_parameters(modules, p.cut, p.spaces, matchings, feature_axis(p.spaces), p.args)


def assemble(
    p: Prepared, shared: Mapping[str, Tensor], private: Heads, models: Sequence[nn.Module], heads: str
) -> fx.GraphModule:
    """One GraphModule of these parameters."""
    originals = [m.state_dict() for m in models]
    return build(
        p.graph_modules, p.cut, shared, private, p.names, p.args, as_dict=p.as_dict, heads=heads, originals=originals,
        shares=p.shares, tails=p.tails,
    )  # fmt: skip


def choose_widths(
    p: Prepared, moments: Moments, budget: float, models: Sequence[nn.Module], round_to: int = 8
) -> dict[str, int]:
    """Widths within the budget. Spaces that turn out not to take a new width keep theirs, and we allocate again."""
    merged = p.merged_spaces()
    terms = [*cost_terms(p.spaces, p.cut, len(p.names)), *_stem_terms(p)]
    free = resizable(p.spaces, merged, round_to)
    while free:
        widths = allocate(terms, merged, moments, free, budget, round_to)
        wrong = _not_taken(p, widths, models)
        if not wrong:
            return widths
        free -= wrong
    raise InputError(f"budget={budget}: no space of this network can change its width; use until= to spend more")


def check_widths(p: Prepared, wanted: Mapping[str, int], models: Sequence[nn.Module]) -> None:
    """Raises InputError, with every problem, for widths that the user gives and the network does not take."""
    merged = {s.name: s for s in p.merged_spaces()}
    changed = {s: m for s, m in wanted.items() if s in merged and m != merged[s].size}
    free = resizable(p.spaces, list(merged.values()), 1)
    most = {s: sum(map(len, p.real[s])) if s in p.real else len(p.names) * merged[s].size for s in changed}
    found = [f"{s} is no shared space" for s in wanted if s not in merged]
    found += [f"{s} keeps its width ({merged[s].structure})" for s in changed if s not in free]
    found += [f"{s} cannot have {m} features: all models together have {most[s]}"
              for s, m in changed.items() if m > most[s]]  # fmt: skip
    if not found and changed:
        wrong = _not_taken(p, changed, models)
        free -= wrong
        found = [f"{s} does not take {m} features: the network stops, or gives other shapes"
                 for s, m in changed.items() if s in wrong]  # fmt: skip
    if found:
        spaces = ", ".join(f"{s} ({merged[s].structure})" for s in merged if s in free) or "none"
        told = InputError.listing(f"{p.call}: budget as widths", found)
        hint = "print(fxzip.inspect(model)) says which layers they are"
        raise InputError(f"{told}\nspaces that can change: {spaces}; {hint}")


def _not_taken(p: Prepared, widths: Mapping[str, int], models: Sequence[nn.Module]) -> set[str]:
    """Spaces that do not take these widths: see `probe`."""
    merged = p.merged_spaces()

    def build_at(widths: Mapping[str, int]) -> fx.GraphModule:
        matchings = {s.name: plain_matching(s.size, widths.get(s.name, s.size), len(p.names)) for s in merged}
        return assemble(p, *merged_parameters(p, matchings), models, "separate")

    return probe(build_at, p.spaces, p.graph_modules[0], p.args, widths)


def _stem_terms(p: Prepared) -> list[Term]:
    """What the models' own stems cost, whatever the widths behind them."""
    return [Term(cost(part, rows(p.stems.args, 1)).flops) for part in p.stems.parts] if p.stems else []


def plain_matching(size: int, width: int, models: int) -> Matching:
    """Some matching of the right shape: slot k holds feature k (mod n) of every model."""
    slots = torch.arange(width) % size
    unmerge = torch.zeros(size, width, dtype=torch.float64)
    unmerge[slots, torch.arange(width)] = 1
    unmerge = unmerge / unmerge.sum(1, keepdim=True).clamp(min=1)
    chosen = torch.zeros(width, size, dtype=torch.float64)
    chosen[torch.arange(width), slots] = 1
    return Matching(chosen.repeat(1, models) / models, unmerge.repeat(models, 1), (size,) * models)


def feature_axis(spaces: Spaces):
    """FX node name -> (feature axes of its value, [(space, positions [n])]); None without features."""

    def of(name: str):
        nodes = spaces.lowered.values.get(name, ())
        layouts = spaces.layouts(nodes[0].name) if nodes else ()
        if not layouts:
            return None
        layout = layouts[0]
        return layout.axes, [(s, column) for s, positions in layout.runs for column in positions.T]

    return of


def agree(p: Prepared, matchings: Mapping[str, Matching], moments: Moments) -> bool:
    """Whether the models are equal, or compute the same features in another order."""
    whole = [t.graph_module for t in p.stems.own] if p.stems else p.graph_modules  # bodies begin with other `Enter`s
    first, *others = (state_by_all_names(m) for m in whole)
    used = first.keys() - set(p.spaces.untouched)  # counters of batches are not
    if all(s[n].shape == first[n].shape and torch.equal(s[n], first[n]) for s in others for n in used):
        return True
    placed = {parent.space for s in p.spaces for parent in s.parents}  # by what their children are
    known = all(n in moments or n in placed for n in matchings)
    return bool(moments) and known and all(lossless(m, moments[n]) for n, m in matchings.items() if n in moments)


def calibrate(
    zipped: fx.GraphModule, batches: list[tuple], agree: bool, processes: Processes = ALONE
) -> list[str]:
    """Recompute batch-norm statistics of the merged network; what the user should know if that is not possible.

    agree: nothing is lost by the matching, so the models' own statistics are right, and better than a sample's."""
    if agree:
        return ["the models agree feature by feature: batch-norm statistics are their own, not recomputed"]
    if batches:
        recompute_statistics(zipped, batches, lambda batch: batch, processes)
        return []
    if any(name.endswith("running_var") for name, _ in zipped.named_buffers()):
        return ["batch-norm statistics were averaged, not recomputed: pass a loader, or expect chance accuracy"]
    return []
