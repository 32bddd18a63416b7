"""One streaming pass: count, mean and second moment of every space over all models on the same batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..allocator import spare
from ..errors import FxzipError, InputError
from ..infer import Anchor, FeatureSpace
from ..processes import ALONE, Processes
from ..trace import batch_size, describe
from .gram import finite
from .moments import Accumulator, Moments, SpaceMoments
from .programs import Programs, rows_in, rows_of
from .resume import Checkpoint

ROWS = 16_384  # per space: of that many independent rows a correlation is known to 0.8 % (standard error, at most)
PER_FEATURE = 8  # rows, at least: of a space wider than 1,024, over all models, for least squares on its features
MINOR = 8  # times fewer rows of an anchor that hardly counts, which tells silent features apart


def collect_moments(
    programs: Programs,
    spaces: Sequence[FeatureSpace],
    batches: Iterable[tuple],
    count: int,
    *,
    seed: int = 0,
    progress: bool = True,
    checkpoint: Checkpoint | None = None,
    processes: Processes = ALONE,
    only: Collection[str] | None = None,
    keep: Callable[[str, SpaceMoments], SpaceMoments] = lambda _, moments: moments,
) -> Moments:
    """Moments of `spaces` over `batches` (positional argument tuples), every model on every batch.

    Features are pooled over all anchors of a space with equal weight per anchor; pixels and tokens are
    subsampled at random, the same ones in every model. count: expected number of samples, for the quota.
    Accumulates in float64. checkpoint: keeps the sums, and what it has of an earlier run is not measured again.
    processes: every rank measures its share of the batches, all get the sums; what is drawn is what one would draw.
    only: names of the spaces to measure, as one pass over all of them would. keep: what becomes of each one's moments,
    whose sums are gone by then.
    Raises InputError naming node, line and model where a value is not finite, or the batch where a model fails.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = list(batches)
    with processes.alike():
        done, sums = checkpoint.load(generator, _device(programs)) if checkpoint else (0, {})
    bar = tqdm(total=count, desc="measure", unit="sample", disable=not progress, leave=False)
    watching = checkpoint.watching() if checkpoint else nullcontext()
    with processes.alike(), bar, torch.no_grad(), watching:
        for k, args in enumerate(batches):
            size = max(batch_size(args), 1)
            bar.set_postfix_str(f"batch {k + 1} of {len(batches)}")
            if k >= done:
                measured = _run_batch if processes.mine(k) else _draws
                measured(programs, spaces, args, size / max(count, size), generator, only, k, sums)
                spare()
                if checkpoint:
                    checkpoint.check(k + 1, len(batches), sums, generator)
            bar.update(size)
    if processes.world > 1:
        sums = _summed(sums, processes, _device(programs))
    if not batches and spaces:
        raise InputError("fxzip.collect: the loader yielded no batch")
    order = [s.name for s in spaces if s.name in sums]
    return Moments({name: keep(name, sums.pop(name).moments(spent=True)) for name in order})


def _device(programs: Programs) -> torch.device:
    return next((t.device for state in programs.states for t in state.values()), torch.device("cpu"))


def _run_batch(programs: Programs, spaces, args, share: float, generator, only, index: int, sums: dict) -> None:
    """`_one_batch`; what a model raises comes out with the batch's number."""
    try:
        _one_batch(programs, spaces, args, share, generator, only, sums)
    except FxzipError:
        raise
    except (MemoryError, RuntimeError, IndexError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(
            f"measuring stopped at batch {index} (counted from 0), {describe(args)}: {reason}"
            + (_OUT_OF_MEMORY if "memory" in reason.lower() else "")
        ) from error


_OUT_OF_MEMORY = (
    ". Smaller batches need less; memory='4GB' says how much there is, and the spaces are measured a few at a time;"
    " method='rebasin' measures nothing; until= leaves out wide late layers"
)


def _draws(
    programs: Programs, spaces, args, share: float, generator: torch.Generator, only: Collection[str] | None, *_
) -> dict[tuple[str, int], Tensor | None]:
    """(space, index of an anchor) -> which rows of it are taken (None: all). They are drawn for all spaces in the order
    of the graph, whoever measures them; those not in `only` are forgotten."""
    anchors, at = places(programs, spaces, args)
    graph, twin = programs.lowered(0, args)
    back = {twin[n]: n for n in at}
    chosen: dict[tuple[str, int], Tensor | None] = {}
    for node in graph.graph.nodes:
        for space, i in at.get(back.get(node.name, ""), ()):
            rows = rows_in(anchors[space.name][i], tuple(node.meta["shape"]))
            drawn = _subsample(rows, quota(space, anchors[space.name], i, len(programs.states), share), generator)
            if only is None or space.name in only:
                chosen[space.name, i] = drawn
    return chosen


def _summed(sums: dict[str, Accumulator], processes: Processes, device: torch.device) -> dict[str, Accumulator]:
    """The sums over all ranks; a rank may have seen no batch, and so none of the spaces."""
    told = processes.gather({name: a.sizes for name, a in sums.items()})
    sizes = {name: s for facts in told for name, s in facts.items()}
    found = {name: sums.get(name) or Accumulator(s, device) for name, s in sizes.items()}
    counts = [torch.tensor([a.count], dtype=torch.float64, device=a.total.device) for a in found.values()]
    processes.sum(*counts, *(t for a in found.values() for t in (a.total, a.gram)))
    for own, count in zip(found.values(), counts, strict=True):
        own.count = float(count)
    return found


def places(programs: Programs, spaces: Sequence[FeatureSpace], args: tuple):
    """(anchors of every space at this batch shape, node name -> (space, index of its anchor) there)."""
    anchors = {s.name: programs.visible(s, args) for s in spaces}
    at: dict[str, list[tuple[FeatureSpace, int]]] = defaultdict(list)
    for space in spaces:
        for i, anchor in enumerate(anchors[space.name]):
            at[anchor.node].append((space, i))
    return anchors, at


def _one_batch(
    programs: Programs, spaces, args, share: float, generator: torch.Generator, only: Collection[str] | None, sums: dict
) -> None:
    """Run all models on one batch; the rows of one anchor are added once the last model has shown them."""
    chosen = _draws(programs, spaces, args, share, generator, only)
    anchors, at = places(programs, [s for s in spaces if only is None or s.name in only], args)
    held: dict[tuple[str, int], list[Tensor]] = defaultdict(list)

    def sink(name: str, value: Tensor) -> None:
        for space, i in at[name]:
            anchor = anchors[space.name][i]
            key = (space.name, i)
            rows = rows_of(anchor, value, chosen[key])
            rows = torch.cat([rows.real, rows.imag]) if rows.is_complex() else rows
            _check_finite(programs, name, current, rows)
            held[key].append(rows)
            if current == models - 1:
                parts = held.pop(key)
                joint = torch.cat(parts, 1)  # [rows, sum n_i]
                if space.name not in sums:
                    sums[space.name] = _accumulator(space, [r.shape[1] for r in parts], joint.device)
                # equal weight per anchor, however many pixels it has; a sample counts as one row
                total = sum(a.weight for a in anchors[space.name])
                sums[space.name].add(joint, weight=size * anchor.weight / total / len(joint))

    models, size = len(programs.states), max(batch_size(args), 1)
    for current in range(models):
        programs.observe(current, args, list(at), sink)


def _accumulator(space: FeatureSpace, sizes: list[int], device: torch.device) -> Accumulator:
    try:
        return Accumulator(sizes, device)
    except (MemoryError, RuntimeError) as error:
        gigabytes = 8 * sum(sizes) ** 2 / 1e9
        raise InputError(
            f"out of memory: the second moments of {space.name} ({' + '.join(map(str, sizes))} features) take"
            f" {gigabytes:.1f} GB{_OUT_OF_MEMORY}"
        ) from error


def quota(space: FeatureSpace, anchors: Sequence[Anchor], i: int, models: int, share: float) -> int:
    """How many rows of a batch, which is `share` of the data, the i-th anchor of a space gives: the space's are dealt
    out evenly to the anchors that count; one that hardly does gives an eighth."""
    rows = max(ROWS, PER_FEATURE * space.size * models) / max(sum(a.weight == 1 for a in anchors), 1)
    taken = max(64, int(share * rows))
    return taken if anchors[i].weight == 1 else max(taken // MINOR, 16)


def _subsample(rows: int, quota: int, generator: torch.Generator) -> Tensor | None:
    if rows <= quota:
        return None
    drawn = torch.randint(rows, (quota,), generator=generator)
    return drawn.sort().values  # neighbours share cache lines where they are gathered


def _check_finite(programs: Programs, name: str, model: int, rows: Tensor) -> None:
    if finite(rows):
        return
    node = next(n for n in programs.spaces.lowered.graph.nodes if n.name == name)
    where = f"%{node.meta.get('origin') or name} ({node.meta.get('line') or node.target})"
    raise InputError(
        f"model {model} yields NaN or Inf at {where} on the calibration data; "
        "check the data's normalisation and the model's weights"
    )
