"""The application: what all commands share, and the commands in their order."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

EPILOG = """\
fxzip demo · fxzip inspect torchvision:resnet50 · fxzip merge recipe.yaml out/

fxzip merge --model torchvision:resnet18 --weights a.pt b.pt --data images/ --out out/

Exit codes: 0 done, 1 refused or failed, 2 the call is wrong.
"""
DO, LOOK, SHARE = "Merge", "Look", "Share"
MODEL, INPUT, METHOD, RESULT, MESSAGES = "Model", "Input", "Method", "Result", "Messages"

app = typer.Typer(
    help="Merge trained PyTorch models of one architecture by rewriting their FX graphs.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def option(panel: str, text: str, *names: str, **more: Any) -> Any:
    """What an option says of itself, and under which heading."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


Quiet = Annotated[bool, option(MESSAGES, "Only results and errors.", "-q", "--quiet")]
Verbose = Annotated[bool, option(MESSAGES, "What is done, and the traceback of an error.", "-v", "--verbose")]
Force = Annotated[bool, option(RESULT, "Replace files that fxzip did not write.", "--force")]
TrustCode = Annotated[bool, option(MODEL, "Allow path/to/file.py:FACTORY, which runs that file.", "--trust-code")]
Folder = Annotated[Path, typer.Argument(help="A folder that merge wrote.", metavar="OUT")]
MODEL_HELP = "torchvision:NAME, timm:NAME, hf:NAME, hf:FOLDER or path/to/file.py:FACTORY; options as ?key=value"
RECIPE_HELP = "A YAML file, or a folder that merge wrote."
DATA_HELP = "A folder of images, torchvision:CIFAR10?root=DIR, a file .npz, or random:3x224x224"


def command(panel: str) -> Callable[[Callable[..., int | None]], Callable[..., None]]:
    """Register a function as a command: messages as -q and -v say, errors as exit codes."""

    def register(run: Callable[..., int | None]) -> Callable[..., None]:
        @wraps(run)
        def guarded(**given: Any) -> None:
            quiet, verbose = given.get("quiet", False), given.get("verbose", False)
            if quiet and verbose:
                raise typer.BadParameter("-q and -v exclude each other")
            logging.basicConfig(format="fxzip: %(message)s", stream=sys.stderr, force=True)
            logging.getLogger("fxzip").setLevel(logging.DEBUG if verbose else logging.WARNING)
            raise typer.Exit(_guarded(run, given, verbose))

        app.command(run.__name__.rstrip("_"), rich_help_panel=panel)(guarded)
        return guarded

    return register


def progress(quiet: bool) -> bool:
    """Bars are for people who watch."""
    return not quiet and sys.stderr.isatty()


def _guarded(run: Callable[..., int | None], given: dict[str, Any], verbose: bool) -> int:
    from ..errors import FxzipError, InputError, MergeWarning

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MergeWarning)  # the report that merge prints has them as notices
            return run(**given) or 0
    except (FxzipError, OSError) as error:
        if verbose:
            logging.getLogger("fxzip").exception("failed")
        else:
            print(f"fxzip: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1


def _version(asked: bool) -> None:
    if not asked:
        return
    from ..version import installed

    print(f"fxzip {installed()}")
    raise typer.Exit


@app.callback()
def _top(
    version: Annotated[  # noqa: ARG001
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None: ...


# they register themselves, in the order of the help
from . import merging  # noqa: E402,F401,I001
from . import looking  # noqa: E402,F401
from . import plotting  # noqa: E402,F401
from . import outputs  # noqa: E402,F401
