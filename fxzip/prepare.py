"""Everything before the data is touched: trace all models, infer, prove, cut. Shared by merge and collect."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import fx, nn

from .check import Checked, check_merge, compare_graphs, compare_shapes
from .errors import InputError, SpaceError, TraceError
from .infer import Spaces, analyse, annotate
from .nested import apart
from .options import shares, wrong_weights
from .padding import pad
from .prepared import Clock, Prepared, shared_spaces
from .rewrite import Partition, Stems, Tails, join, legal, owned, partition, same_outputs, selected, split, unreadable
from .trace import Traced, bind, borrow, compare_sizes, first_rows, on, state_of, trace
from .verify import verify_spaces


def prepare(
    models: Sequence[nn.Module] | Mapping[str, nn.Module],
    loader: Iterable | Mapping | None,
    *,
    clock: Clock,
    until: str | None = None,
    verify: bool | str = True,
    seed: int = 0,
    **options: Any,
) -> Prepared:
    """Check the call, trace every model, infer on model 0, cut, and prove. options: as for `begin`."""
    with clock.stage("trace"):
        p = begin(models, loader, until=until, **options)
    with clock.stage("infer"):
        p = cut_graph(infer_spaces(p), until)
    if verify:
        with clock.stage("verify"):
            p = prove(p, seed, strict=verify != "report")
    return p


def begin(
    models: Sequence[nn.Module] | Mapping[str, nn.Module],
    loader: Iterable | Mapping | None,
    *,
    call: str,
    until: str | None = None,
    since: str | None = None,
    example_inputs: Any = None,
    device: str | torch.device = "auto",
    calibration: int = 2048,
    needs_data: bool = True,
    forward_fn: Callable[..., Any] | None = None,
    model_weights: Any = None,
    heads: str = "separate",
    copies: bool = False,
) -> Prepared:
    """Check the call and trace every model. See `fxzip.merge` for arguments.

    copies: of all tensors, for whoever writes to them; otherwise the graphs hold the models' own. until: models that
    differ only there and behind it are joined, see `rewrite.join`. since: what comes before it is split off, see
    `rewrite.split`."""
    models, loader, model_weights = apart(models, loader, model_weights)
    checked: Checked = check_merge(
        models,
        loader,
        call=call,
        example_inputs=example_inputs,
        calibration=calibration,
        needs_data=needs_data,
        forward_fn=forward_fn,
        problems=wrong_weights(model_weights, models),
    )
    where = _device(device, checked.models)
    few = first_rows(checked.example, 2)
    traced = tuple(_traced(t, m, few, forward_fn) for t, m in zip(checked.names, checked.models, strict=True))
    for t, model in zip(traced, checked.models, strict=True):
        if not copies:
            borrow(t.graph_module, model)
        t.graph_module.to(where)
    args = on(where, bind(few, signature(traced[0].graph_module.forward)))
    if heads != "separate":
        same_outputs([t.graph_module for t in traced], checked.names, args, heads)
    traced, stems = starts(traced, checked.names, args, since, until)
    args = stems.before(args) if stems else args
    traced, tails = ends(call, traced, checked.names, args, until)
    for t in traced:
        _in_the_order_of(traced[0].graph_module, t.graph_module)
    return Prepared(
        call, tuple(checked.names), isinstance(models, Mapping), traced, args, where, checked.loader,
        models=checked.models, notices=checked.notices, shares=shares(model_weights, checked.names),
        tails=tails, stems=stems,
    )  # fmt: skip


def compare(call: str, traced: Sequence[Traced], names: Sequence[str]) -> None:
    """Raises InputError unless all graphs are alike."""
    problems = compare_graphs(traced, names)
    if problems:
        raise InputError.listing(call, problems)


def ends(
    call: str, traced: tuple[Traced, ...], names: Sequence[str], args: tuple, until: str | None
) -> tuple[tuple[Traced, ...], Tails | None]:
    """The graphs, joined where they differ from `until` on. Raises InputError unless all are alike then."""
    joined = join(traced, args, until) if until is not None and compare_graphs(traced, names) else None
    traced, tails = joined or (traced, None)
    compare(call, traced, names)
    return traced, tails


def starts(
    traced: tuple[Traced, ...], names: Sequence[str], args: tuple, since: str | None, until: str | None = None
) -> tuple[tuple[Traced, ...], Stems | None]:
    """The graphs from `since` on, and what comes before; see `rewrite.split`."""
    if since is None:
        return traced, None
    first: list[Spaces] = []

    def axis(name: str) -> int:
        if not first:
            first.append(analyse(traced[0].graph_module, args))
        return _feature_axis(first[0], traced[0].graph_module, name, since)

    found = split(traced, args, names, since, axis)
    if found and until is not None:
        whole, body = (selected(t.graph_module, until) for t in (traced[0], found[0][0]))
        if whole and not body:
            raise InputError(f'until="{until}" comes before since="{since}": nothing would be shared')
    return found or (traced, None)


def _feature_axis(spaces: Spaces, first: fx.GraphModule, name: str, since: str) -> int:
    """The axis of a value that holds features and nothing else. Raises SpaceError where there is none."""
    nodes = spaces.lowered.values.get(name, ())
    layouts = spaces.layouts(nodes[0].name) if len(nodes) == 1 else ()
    axes = sorted({a for k in layouts for a in k.axes})
    held = {int(p) for k in layouts for _, positions in k.runs for p in positions.flatten()}
    if len(nodes) > 1:
        why = "is several tensors"
    elif len(axes) > 1:
        why = f"has its features along several axes ({', '.join(map(str, axes))})"
    elif not axes or len(held) < next(iter(nodes)).meta["shape"][axes[0]]:
        why = "is not made of features that may be merged alone"
    else:
        return axes[0]
    raise SpaceError(f'since="{since}": %{name}, which crosses there, {why}. {legal(first)}')


def infer_spaces(p: Prepared, strict: bool = False) -> Prepared:
    """Infer the feature spaces on model 0, all models brought to the widths of the widest where that is possible.
    Raises InputError where strict and an operator has no rule."""
    p = _of_one_width(p)
    spaces = analyse(p.graph_modules[p.widest], p.args)
    if strict and spaces.frozen:
        raise InputError.listing(f"{p.call}(strict=True)", [str(f) for f in spaces.frozen])
    if p.tails:
        spaces = replace(spaces, opaque=spaces.opaque.union(*p.tails.nodes))
    return replace(p, spaces=spaces)


def _of_one_width(p: Prepared) -> Prepared:
    found = pad(p.graph_modules, p.args, p.names) if p.tails is None else None
    if found is None or found.reason:
        return replace(p, notices=(*p.notices, *([f"widths differ: {found.reason}"] if found else [])))
    traced = tuple(replace(t, graph_module=g) for t, g in zip(p.traced, found.graph_modules, strict=True))
    sizes = ", ".join(f"{s} {' and '.join(str(len(r)) for r in real)}" for s, real in found.real.items())
    notice = f"widths differ ({sizes}): merged at those of {p.names[found.widest]}"
    return replace(p, traced=traced, unpadded=p.traced, real=found.real, widest=found.widest,
                   notices=(*p.notices, notice))  # fmt: skip


def cut_graph(p: Prepared, until: str | None = None) -> Prepared:
    """Find what stays per model, and write what is known into node.meta of all graphs.

    Layers whose shapes differ between the models stay per model, as does what no private part could read (a value
    with merged features along several axes), and all that is downstream of either.
    Raises InputError where shapes differ and nothing would be left to share, or what is shared is not one program.
    """
    first = p.graph_modules[0]
    reasons = [str(f) for f in p.spaces.frozen]
    cut = partition(first, p.spaces.opaque, until, reasons)
    unpadded = [state_of(t.graph_module) for t in p.unpadded]
    if p.real and not compare_shapes(unpadded, p.names, owned(first, cut.private), p.spaces.untouched):
        plain = replace(p, traced=p.unpadded, unpadded=(), real={}, widest=0, notices=p.notices[:-1])
        return cut_graph(replace(plain, spaces=analyse(plain.graph_modules[0], p.args)), until)
    cut, notices = _above_other_shapes(p, cut, until)
    if until is None:
        cut = _above_unreadable(p, cut)
    if p.stems and p.stems.only(owned(first, cut.shared)):
        points = legal(p.stems.own[0].graph_module)
        raise SpaceError(f'nothing can be merged: no layer is shared from since="{p.stems.since}" on. {points}')
    problems = compare_sizes(p.graph_modules, p.names, cut.shared)
    if problems:
        raise InputError.listing(p.call, problems)
    for module in p.graph_modules:
        annotate(module, p.spaces, cut.private)
    return replace(p, cut=cut, notices=(*p.notices, *notices, *_untied(first, cut)))


def _untied(first: fx.GraphModule, cut: Partition) -> Iterable[str]:
    """A sentence for every parameter of the shared part that is one of the private part, too, by another name."""
    shared, private = (owned(first, nodes) for nodes in (cut.shared, cut.private))
    own = dict(first.named_parameters(remove_duplicate=False))
    for name in private:
        for other in (n for n in shared if n in own and name in own and n != name and own[n] is own[name]):
            yield (f"{other} and {name} are one in the models and two in the result: a class that ties them cannot hold"
                   " the state_dict that extract gives")  # fmt: skip


def _above_other_shapes(p: Prepared, cut: Partition, until: str | None) -> tuple[Partition, tuple[str, ...]]:
    """The cut, moved up to the first layers whose shapes differ between models; a notice if it was."""
    first = p.graph_modules[0]
    states = [state_of(m) for m in p.graph_modules]
    problems = compare_shapes(states, p.names, owned(first, cut.private), p.spaces.untouched)
    if not problems:
        return cut, ()
    other = {k for k, x in states[0].items() if any(k in s and s[k].shape != x.shape for s in states[1:])}
    apart = [n.name for n in first.graph.nodes if n.name in cut.shared and other & set(owned(first, {n.name}))]
    try:
        cut = partition(first, {*p.spaces.opaque, *apart}, until)
    except SpaceError:
        raise InputError.listing(p.call, problems) from None
    left = compare_shapes(states, p.names, owned(first, cut.private), p.spaces.untouched)
    if left:
        raise InputError.listing(p.call, left)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return cut, (f"per model from %{apart[0]} on, where shapes differ: {problems[0]}{more}",)


def _above_unreadable(p: Prepared, cut: Partition) -> Partition:
    """The cut, moved up until every value that private parts read has its features along one axis."""
    first, opaque, found = p.graph_modules[0], {*p.spaces.opaque, *cut.private}, cut
    while True:
        merged = {s.name for s in shared_spaces(p.spaces, found, owned(first, found.shared))}
        bad = [name for name in found.boundary if unreadable(name, p.spaces, merged)]
        if not bad:
            return found
        opaque |= set(bad)
        try:
            found = partition(first, opaque)
        except SpaceError:
            return cut  # a matching that moves nothing is still possible


def prove(p: Prepared, seed: int = 0, strict: bool = True) -> Prepared:
    """Prove the spaces on model 0. Raises VerificationError when the proof fails, if strict."""
    verification = verify_spaces(p.traced[p.widest], p.spaces, p.args, seed)
    if strict:
        verification.check()
    return replace(p, verification=verification)


def _traced(task: str, model: nn.Module, example: Any, forward_fn: Callable[..., Any] | None) -> Traced:
    """`trace`, whose errors say which model they are about."""
    try:
        return trace(model, example, forward_fn=forward_fn)
    except (InputError, TraceError) as error:
        raise type(error)(f"{task}: {error}") from error


def _in_the_order_of(first: nn.Module, other: nn.Module) -> None:
    """Parameters in one order: lowered graphs are compared node by node, and a computed weight that was made plain
    comes after the bias."""
    mine = dict(other.named_modules())
    for name, module in first.named_modules():
        if name in mine and mine[name]._parameters.keys() == module._parameters.keys():
            mine[name]._parameters = {k: mine[name]._parameters[k] for k in module._parameters}


def _device(device: str | torch.device, models: Sequence[nn.Module]) -> torch.device:
    """ "auto": where the models are, or a GPU if they are on the CPU and there is one."""
    if device != "auto":
        return torch.device(device)
    at = next((t.device for m in models for t in (*m.parameters(), *m.buffers())), torch.device("cpu"))
    return torch.device("cuda") if at.type == "cpu" and torch.cuda.is_available() else at
