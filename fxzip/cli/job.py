"""A recipe carried out, and the folder that comes of it opened again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

import fxzip

from ..errors import InputError
from ..files.checkpoint import read_checkpoint
from ..files.plan import CARD, PAGE, PLAN, PROGRAM, RECIPE, TENSORS, Plan, is_merge, read_plan, strangers
from ..files.save import sha256_of
from ..processes import ALONE, Processes
from . import data as datas
from . import models
from .recipe import Read, absent, check, method_of, read
from .spec import inside

log = logging.getLogger("fxzip")


@dataclass(frozen=True)
class Job:
    """What a recipe stands for. loader: batches, or a dict of them by task, or None; example: inputs, without one;
    hashes: of the weights, by how the recipe writes them."""

    networks: dict[str, nn.Module]
    named: bool
    loader: Any
    example: Any
    hashes: dict[str, str]


def load_recipe(path: Path) -> Read:
    """The recipe in a file, or in a folder that `merge` wrote; `prepared` looks for its files."""
    return read(path / RECIPE if path.is_dir() else path, files=False)


def prepared(given: Read, trust_code: bool = False, problems: Sequence[str] = (), more: int = 0) -> Job:
    """Every model and the data of a recipe. problems: found already, listed with the rest. more: samples that the
    loader has beyond those of calibration.

    Raises one InputError with all that is wrong."""
    recipe = given.recipe
    gone = absent(recipe, given.folder)
    found = [*problems, *gone.values()]

    def tried(where: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except InputError as error:
            found.append(f"{where}: {error}")

    hashes: dict[str, str] = {}
    networks: dict[str, nn.Module] = {}
    example = None
    for i, (task, entry) in enumerate(zip(recipe.tasks, recipe.models, strict=True)):
        log.info("model %s: %s %s", task, entry.model or recipe.model, entry.weights or "")
        made = tried(f"models[{i}]", lambda e=entry: models.architecture(_spec(given, e), given.folder, trust_code))
        if made is None or i in gone:
            continue
        networks[task] = tried(f"models[{i}]", lambda e=entry, m=made: _network(given, e, m, hashes))
        if example is None and made.example and networks[task] is not None:
            example = made.example(networks[task])
    sources = {t: e.data for t, e in zip(recipe.tasks, recipe.models, strict=True) if e.data}
    one = tried("data", lambda: _batches(given, recipe.data, more)) if recipe.data else None
    own = {t: tried(f"data of {t}", lambda d=d: _batches(given, d, more)) for t, d in sources.items()}
    if found:
        raise InputError.listing("recipe", list(dict.fromkeys(found)))
    named = any(m.name for m in recipe.models)
    return Job(networks, named, own or one, None if own or one else example, hashes)


def run(
    given: Read,
    out: Path,
    *,
    trust_code: bool = False,
    pt2: bool = False,
    html: bool = False,
    progress: bool = True,
    force: bool = False,
    resume: Path | None = None,
    processes: Processes = ALONE,
) -> fx.GraphModule:
    """Merge as the recipe says and write the folder `out`: what `fxzip.save` writes, and the recipe in full.

    html: also the report as a page; one that an earlier merge left in `out` is written anew in any case. A model.pt2
    that it left goes, unless pt2.
    Raises InputError before anything is merged if `out` holds files that fxzip did not write, unless `force`.
    processes: those that share the work; rank 0 writes.
    """
    html = html or (is_merge(out) and (out / PAGE).is_file())
    names = (CARD, RECIPE, TENSORS, PLAN, *([PROGRAM] if pt2 else []), *([PAGE] if html else []))
    problems = [] if force else strangers(out, names)
    recipe, job = given.recipe, prepared(given, trust_code, problems)
    log.info("merging %s by %s", ", ".join(job.networks), recipe.method)
    zipped = fxzip.merge(
        job.networks if job.named else list(job.networks.values()),
        job.loader,
        method=method_of(recipe),
        until=recipe.until,
        since=recipe.since,
        budget=recipe.budget,
        round_to=recipe.round_to,
        heads=recipe.heads,
        model_weights=recipe.model_weights,
        example_inputs=job.example,
        calibration=recipe.calibration,
        seed=recipe.seed,
        device=recipe.device,
        strict=recipe.strict,
        verify=recipe.verify,
        progress=progress,
        resume=resume,
        memory=recipe.memory,
        distributed=processes.world > 1,
    )
    if processes.rank:
        return zipped
    if recipe.dtype:
        zipped.to(getattr(torch, recipe.dtype))
    log.info("writing %s", out)
    texts = {RECIPE: given.text_for(out, job.hashes)}
    if html:
        texts[PAGE] = fxzip.html.page(fxzip.report(zipped).with_(seconds={}))  # as in plan.json: the same bytes again
    fxzip.save(zipped, out, pt2=pt2, texts=texts, force=force)
    return zipped


def opened(folder: Path, trust_code: bool = False) -> tuple[fx.GraphModule, Read]:
    """The merged network in a folder, by its recipe; the models' weights are not needed.

    Raises InputError for what `fxzip.load` refuses, or without a recipe.
    """
    plan = read_plan(folder / PLAN)
    if not (folder / RECIPE).is_file():
        raise InputError(f"{str(folder)!r} has no {RECIPE}: open it in Python, with fxzip.load(folder, model_fn)")
    given = read(folder / RECIPE, files=False)
    return fxzip.load(folder, _makers(plan, given, trust_code)), given


def saved_report(folder: Path) -> fxzip.Report:
    """What a merge did, from the folder it wrote. Raises InputError for other folders."""
    found = read_plan(folder / PLAN).report
    if found is None:
        raise InputError(f"{str(folder)!r} holds no report: its network was not made by fxzip.merge")
    return found


def _spec(given: Read, entry: Any) -> str:
    return entry.model or given.recipe.model or ""


def _network(given: Read, entry: Any, made: models.Architecture, hashes: dict[str, str]) -> nn.Module:
    if entry.weights is None:
        if not made.held:
            raise InputError(f"{made.text} without weights would be random: give weights")
        return models.build(made, seed=given.recipe.seed)
    path = inside(entry.weights, given.folder)
    hashes[entry.weights] = found = sha256_of(path)
    if entry.sha256 and entry.sha256 != found:
        differs = f"sha256 {found[:12]}.., not {entry.sha256[:12]}.."
        raise InputError(f"weights {str(path)!r} are not those of the recipe: {differs}")
    return models.build(made, read_checkpoint(path), f"weights {str(path)!r}", given.recipe.seed)


def _batches(given: Read, data: Any, more: int) -> Any:
    samples = data.samples(given.folder, given.recipe.seed)
    return datas.loader(samples, data.batch_size, given.recipe.calibration + more, given.recipe.seed)


def _makers(plan: Plan, given: Read, trust_code: bool) -> Mapping[str, Callable[[], nn.Module]]:
    """Per task a function that builds its architecture with the shapes of the plan."""
    entries = dict(zip(given.recipe.tasks, given.recipe.models, strict=True))
    lacks = [t for t in plan.tasks if t not in entries]
    if lacks:
        raise InputError(f"{RECIPE} has no model {lacks[0]!r}, which {PLAN} has")

    def maker(task: str, shapes: Mapping[str, Tensor]) -> Callable[[], nn.Module]:
        made = models.architecture(_spec(given, entries[task]), given.folder, trust_code)
        return lambda: models.build(made, shapes)

    return {
        task: maker(task, {n: torch.empty(s, device="meta") for n, (s, _) in kinds.items()})
        for task, kinds in zip(plan.tasks, plan.originals, strict=True)
    }


def from_flags(given: Mapping[str, Any]) -> Read:
    """A recipe from command-line options; paths start from the working directory."""
    return check(given, Path(), "merge", files=False)
