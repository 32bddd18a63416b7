"""`merge`, `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .app import (
    DATA_HELP,
    DO,
    INPUT,
    METHOD,
    MODEL,
    MODEL_HELP,
    RECIPE_HELP,
    RESULT,
    Force,
    Quiet,
    TrustCode,
    Verbose,
    command,
    option,
    progress,
)

VERIFY = {"true": True, "false": False, "report": "report"}


@command(DO)
def merge(
    recipe: Annotated[Path | None, typer.Argument(help=RECIPE_HELP, metavar="RECIPE")] = None,
    out_folder: Annotated[Path | None, typer.Argument(help="Where to write.", metavar="OUT")] = None,
    model: Annotated[str | None, option(MODEL, MODEL_HELP)] = None,
    weights: Annotated[list[str] | None, option(MODEL, "Checkpoints, one per model: --weights a.pt b.pt")] = None,
    name: Annotated[list[str] | None, option(MODEL, "Names of the tasks; default: those of the files.")] = None,
    trust_code: TrustCode = False,
    data: Annotated[list[str] | None, option(INPUT, f"{DATA_HELP}. Once, or per model. Labels are not used.")] = None,
    image_size: Annotated[int | None, option(INPUT, "Of a folder's images (224), a data set's (as is).")] = None,
    calibration: Annotated[int | None, option(INPUT, "Samples to use (2048).")] = None,
    method: Annotated[str | None, option(METHOD, "solve (default), zip, permute, ..., zip+repair")] = None,
    until: Annotated[str | None, option(METHOD, "First module that stays per model, such as layer3.")] = None,
    since: Annotated[str | None, option(METHOD, "First module that is shared; default: all before until.")] = None,
    budget: Annotated[str | None, option(METHOD, "FLOPs, times those of one model, or widths: s0=48,s4=96")] = None,
    round_to: Annotated[int | None, option(METHOD, "Steps in which a budget widens layers (8 features).")] = None,
    heads: Annotated[str | None, option(METHOD, "separate (default), concat, joint or average")] = None,
    seed: Annotated[int | None, option(METHOD, "Of all that is drawn (0).")] = None,
    verify: Annotated[str | None, option(METHOD, "true (default); report: merge although the proof fails")] = None,
    device: Annotated[str | None, option(METHOD, "auto (default), cpu, cuda, ...")] = None,
    memory: Annotated[str | None, option(METHOD, "Cap, such as 4GB: more goes to files, -v tells the plan.")] = None,
    dtype: Annotated[str | None, option(RESULT, "float32, bfloat16, ...; default: the models'.")] = None,
    out: Annotated[Path | None, option(RESULT, "Where to write, without a recipe.")] = None,
    pt2: Annotated[bool, option(RESULT, "Also model.pt2, which runs without fxzip.", "--pt2")] = False,
    html: Annotated[bool, option(RESULT, "Also report.html, which needs no network.", "--html")] = False,
    resume: Annotated[Path | None, option(RESULT, "A folder that keeps what was measured, to go on from.")] = None,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Merge trained models into one network.

    `fxzip merge recipe.yaml OUT`, or `fxzip merge --model M --weights a.pt b.pt --data DIR --out OUT`.
    `torchrun --nproc-per-node=K -m fxzip merge ...` shares the work among K processes.
    OUT gets model.safetensors, plan.json, README.md (a model card) and recipe.yaml, which makes it again.
    """
    flags = {
        "model": model, "weights": weights, "name": name, "data": data, "image_size": image_size,
        "calibration": calibration, "method": method, "until": until, "since": since, "budget": budget,
        "round_to": round_to, "heads": heads, "seed": seed, "device": device, "memory": memory, "dtype": dtype,
        "verify": VERIFY.get(verify or "", verify),
    }  # fmt: skip
    given = {k: v for k, v in flags.items() if v is not None and v != []}
    given |= {"budget": _budget(budget)} if budget else {}
    target = out or out_folder
    if recipe is not None and given:
        words = ", ".join("--" + k.replace("_", "-") for k in given)
        raise typer.BadParameter(f"a recipe and {words}: write them into the recipe")
    if recipe is None and not ({"model", "weights"} <= given.keys()):
        raise typer.BadParameter("give a recipe and a folder, or --model, --weights and --out")
    if target is None or (out and out_folder):
        raise typer.BadParameter("name one folder to write to: merge recipe.yaml OUT, or --out OUT")

    import fxzip

    from . import job
    from .ranks import ranks

    read = job.load_recipe(recipe) if recipe is not None else job.from_flags(_recipe(given))
    with ranks(read.recipe.device) as processes:
        zipped = job.run(
            read, target, trust_code=trust_code, pt2=pt2, html=html, progress=progress(quiet), force=force,
            resume=resume, processes=processes,
        )  # fmt: skip
    if not quiet and processes.rank == 0:
        print(fxzip.report(zipped))
        print(f"\nwrote {target}: {', '.join(sorted(p.name for p in target.iterdir() if p.name[0] != '.'))}")


@command(DO)
def demo(
    width: Annotated[int, typer.Option(help="Channels of the first stage.")] = 16,
    epochs: Annotated[int, typer.Option(help="Training epochs per network.")] = 30,
    seed: Annotated[int, typer.Option(help="Of split, initialisations and merges.")] = 0,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train two small networks, merge them with every method, print the table."""
    from .. import demo as job

    job.main(seed, width, epochs, progress=progress(quiet))


def _budget(text: str) -> float | dict[str, int]:
    """A number, or widths by space."""
    try:
        if "=" not in text:
            return float(text)
        pairs = [(name.strip(), int(width)) for name, _, width in (part.partition("=") for part in text.split(","))]
        if len(dict(pairs)) == len(pairs) and all(name for name, _ in pairs):
            return dict(pairs)
    except ValueError:
        pass
    raise typer.BadParameter(f"--budget {text}: a number, such as 1.33, or a width for each space, such as s0=48,s4=96")


def _recipe(given: dict[str, Any]) -> dict[str, Any]:
    """Options as the keys of a recipe."""
    weights, names, data = given.pop("weights"), given.pop("name", None), given.pop("data", [])
    size = given.pop("image_size", None)
    stems = [Path(w).stem for w in weights]
    if names and len(names) != len(weights):
        raise typer.BadParameter(f"{len(names)} names for {len(weights)} weights")
    if len(data) > 1 and len(data) != len(weights):
        raise typer.BadParameter(f"{len(data)} data for {len(weights)} weights: give one for all, or one per model")
    names = names or (stems if len(set(stems)) == len(stems) else [None] * len(stems))
    models = [{"weights": w, **({"name": n} if n else {})} for w, n in zip(weights, names, strict=True)]
    sources = [{"source": d, **({"image_size": size} if size else {})} for d in data]
    if len(sources) == 1:
        given["data"] = sources[0]
    for model, source in zip(models, sources if len(sources) > 1 else [], strict=False):
        model["data"] = source
    return {**given, "models": models}
