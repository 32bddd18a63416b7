"""`eval`, `report`, `push`, `pull`: the folder that `merge` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import DATA_HELP, INPUT, LOOK, RESULT, SHARE, Folder, Force, Quiet, TrustCode, Verbose, command, option

Repository = Annotated[str, typer.Argument(help="A repository, user/name, or a local folder.")]


@command(LOOK)
def eval_(
    out: Folder,
    data: Annotated[list[str], option(INPUT, f"{DATA_HELP}, with labels: one, or TASK=DATA for each task.")],
    classes: Annotated[list[str] | None, option(INPUT, "TASK=0,1,2: the class of each output.")] = None,
    image_size: Annotated[int | None, option(INPUT, "Default: the recipe's.", min=1)] = None,
    parents: Annotated[bool, option(RESULT, "The models themselves and their ensemble, too.")] = True,
    trust_code: TrustCode = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Accuracy of a merge beside its models and their ensemble."""
    from . import job, score

    zipped, read = job.opened(out, trust_code)
    task_data, one = score.assigned(data, read.recipe.tasks)
    test = score.labelled(read, task_data, one, classes or [], image_size)
    print(score.scores(zipped, read, test, parents=parents, trust_code=trust_code))


@command(LOOK)
def report(
    out: Folder,
    html: Annotated[Path | None, option(RESULT, "The page; default: OUT/report.html.", "-o", "--html")] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """What a merge did: a summary here, all of it on a page of HTML. Needs neither models nor data."""
    from ..files.plan import PAGE
    from ..html import write
    from .job import saved_report

    found = saved_report(out)
    path = write(found, html or out / PAGE)
    if not quiet:
        print(found)
        print(f"\nwrote {path}")


@command(SHARE)
def push(
    out: Folder,
    repository: Repository,
    public: Annotated[bool, option(RESULT, "A new repository is private otherwise.", "--public")] = False,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Upload a merge to the Hugging Face hub."""
    from ..files import hub

    where = hub.push(out, repository, private=not public, force=force)
    if not quiet:
        print(where)


@command(SHARE)
def pull(
    repository: Repository,
    out: Annotated[Path, typer.Argument(help="Where to write.", metavar="OUT")],
    revision: Annotated[str | None, option(INPUT, "Branch, tag or commit.")] = None,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Download a merge from the Hugging Face hub and check its files. `fxzip report OUT` makes its page."""
    from ..files import hub

    hub.pull(repository, out, revision=revision, force=force)
    if not quiet:
        print(f"wrote {out}")
