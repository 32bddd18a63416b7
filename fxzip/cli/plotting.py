"""`plot`: figures of a recipe, of the folder that came of it, of a model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import LOOK, METHOD, RECIPE_HELP, RESULT, Quiet, TrustCode, Verbose, command, option, progress

if TYPE_CHECKING:
    from ..frontier import Frontier


class Figure(StrEnum):
    frontier = "frontier"
    correlations = "correlations"
    layers = "layers"
    similarity = "similarity"
    spaces = "spaces"
    graph = "graph"


WHAT = (
    "frontier: budgets and cuts of a recipe; correlations, layers, similarity: of a folder that merge wrote;"
    " spaces, graph: of such a folder or a model, torchvision:resnet50"
)


@command(LOOK)
def plot(
    source: Annotated[str, typer.Argument(help=f"{RECIPE_HELP} Or a model.", metavar="RECIPE")],
    figure: Annotated[Figure, option(RESULT, WHAT)] = Figure.frontier,
    out: Annotated[Path | None, option(RESULT, ".png, .svg or .pdf; default: FIGURE.png", "-o", "--out")] = None,
    space: Annotated[str | None, option(RESULT, "Of similarity; default: the last.")] = None,
    budget: Annotated[list[float] | None, option(METHOD, "Of frontier: times a model's FLOPs; 1, 1.15, 1.33")] = None,
    until: Annotated[list[str] | None, option(METHOD, "Of frontier: cuts to try, too; several.")] = None,
    trust_code: TrustCode = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Draw a merge, a model, or what budgets and cuts cost and keep.

    The frontier merges a recipe at each budget and cut, measures how far the outputs drift, prints the table too.
    """
    from .. import plot as figures

    path = out or Path(f"{figure}.png")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise typer.BadParameter(f"--out {out}: end it in .png, .svg or .pdf")
    if figure != "frontier" and (budget or until):
        raise typer.BadParameter(f"--budget and --until belong to the frontier, not to {figure}")
    if figure != "similarity" and space:
        raise typer.BadParameter(f"--space belongs to similarity, not to {figure}")
    if figure == "frontier":
        found = _frontier(Path(source), budget or [1.0, 1.15, 1.33], until or [], trust_code, progress(quiet))
        print(found)
        made = found.plot()
    elif figure in ("spaces", "graph"):
        made = getattr(figures, figure)(_spaces(source, trust_code))
    else:
        made = _of_merge(Path(source), figure, space)
    made.savefig(path, dpi=150)
    if not quiet:
        print(f"\nwrote {path}" if figure == "frontier" else f"wrote {path}")


def _frontier(source: Path, budget: list[float], until: list[str], trust_code: bool, bar: bool) -> Frontier:
    import fxzip

    from ..errors import InputError
    from ..frontier import HOLDOUT
    from . import job

    read = job.load_recipe(source)
    work = job.prepared(read, trust_code, more=HOLDOUT)
    if work.loader is None:
        raise InputError(f"{source}: plot measures drift on data; the recipe has none")
    return fxzip.frontier(
        work.networks if work.named else list(work.networks.values()),
        work.loader,
        budget,
        untils=until,
        since=read.recipe.since,
        calibration=read.recipe.calibration,
        seed=read.recipe.seed,
        device=read.recipe.device,
        method=job.method_of(read.recipe),
        model_weights=read.recipe.model_weights,
        memory=read.recipe.memory,
        round_to=read.recipe.round_to,
        verify=read.recipe.verify,
        strict=read.recipe.strict,
        progress=bar,
    )


def _spaces(source: str, trust_code: bool) -> Any:
    import fxzip

    from .looking import chosen

    return fxzip.inspect(*chosen(source, None, None, None, 0, trust_code))


def _of_merge(folder: Path, figure: str, space: str | None) -> Any:
    from .. import plot as figures
    from ..errors import InputError
    from .job import saved_report

    report = saved_report(folder)
    if figure != "similarity":
        return getattr(figures, figure)(report)
    drawn = [s.name for s in report.spaces if s.matched is not None]
    if not drawn:
        raise InputError(f"{str(folder)!r}: {report.method} measured no activations")
    return figures.similarity(report, space or drawn[-1])
