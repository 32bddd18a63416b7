"""The command line: `fxzip demo`, `fxzip inspect torchvision:resnet50`, `fxzip verify torchvision:vit_b_16`.

Torch is imported inside the commands: `fxzip --help` answers at once.
Exit codes: 0 done, 1 a proof or the work failed, 2 the call is wrong.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

EXAMPLES = """\
examples:
  fxzip demo                                             train, merge, compare: about a minute
  fxzip inspect torchvision:resnet50                     the feature spaces, a row each
  fxzip inspect torchvision:resnet50 --explain layer2.0.conv1
  fxzip verify torchvision:vit_b_16                      prove them on the model itself

exit codes: 0 done, 1 verification or the work failed, 2 the call is wrong
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; -> its exit code."""
    args = parser().parse_args(argv)
    from .errors import FxzipError, InputError

    try:
        return args.run(args)
    except FxzipError as error:
        if args.verbose:
            raise
        print(f"fxzip: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1


def parser() -> argparse.ArgumentParser:
    """Every command and option."""
    top = argparse.ArgumentParser(
        prog="fxzip",
        description="Merge trained PyTorch models of one architecture by rewriting their FX graphs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = top.add_subparsers(title="commands", dest="command", required=True)
    _add_demo(commands)
    _add_inspect(commands)
    _add_verify(commands)
    return top


def demo(args: argparse.Namespace) -> int:
    """Train two networks on digits, merge them with every method, print the table."""
    from . import demo as job

    job.main(args.seed, args.width, args.epochs, progress=not args.quiet)
    return 0


def inspect(args: argparse.Namespace) -> int:
    """Print the feature spaces of a model, or explain one module."""
    model, image = load(args.model, args.image_size, args.seed)
    import fxzip

    spaces = fxzip.inspect(model, image)
    print(spaces.explain(args.explain) if args.explain else spaces)
    return 0


def verify(args: argparse.Namespace) -> int:
    """Prove the feature spaces of a model on the model itself."""
    model, image = load(args.model, args.image_size, args.seed)
    import fxzip

    result = fxzip.verify(model, image, seed=args.seed)
    if not (args.quiet and result.ok):
        print(result)
    return 0 if result.ok else 1


def load(spec: str, image_size: int, seed: int) -> tuple[nn.Module, Tensor]:
    """"torchvision:NAME" -> that classification model with random weights, and one random image."""
    from .errors import InputError

    source, _, name = spec.partition(":")
    if source != "torchvision" or not name:
        raise InputError(f"model {spec!r}: write torchvision:NAME, for example torchvision:resnet50")
    if image_size < 1:
        raise InputError(f"--image-size {image_size}: must be at least 1")
    import torch
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        near = get_close_matches(name, names, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "torchvision.models.list_models() lists them"
        raise InputError(f"torchvision has no classification model {name!r}: {hint}")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the way some models initialise
        torch.manual_seed(seed)
        return models.get_model(name, weights=None).eval(), torch.randn(1, 3, image_size, image_size)


def _add_demo(commands: argparse._SubParsersAction) -> None:
    command = _command(commands, "demo", demo)
    work = command.add_argument_group("work")
    work.add_argument("--width", type=int, default=16, help="channels of the first stage (16)")
    work.add_argument("--epochs", type=int, default=30, help="training epochs per network (30)")
    work.add_argument("--seed", type=int, default=0, help="of split, initialisations and merges (0)")


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    command = _command(commands, "inspect", inspect)
    _add_model(command)
    output = command.add_argument_group("output")
    output.add_argument("--explain", metavar="MODULE", help="only this module or parameter, in words")


def _add_verify(commands: argparse._SubParsersAction) -> None:
    _add_model(_command(commands, "verify", verify))


def _add_model(command: argparse.ArgumentParser) -> None:
    model = command.add_argument_group("model")
    model.add_argument("model", metavar="torchvision:NAME", help="a classification model of torchvision")
    model.add_argument("--image-size", type=int, default=224, metavar="PIXELS", help="of the example (224)")
    model.add_argument("--seed", type=int, default=0, help="of the random weights and of the proof (0)")


def _command(commands: argparse._SubParsersAction, name: str, run) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
    command.set_defaults(run=run)
    talk = command.add_argument_group("messages").add_mutually_exclusive_group()
    talk.add_argument("-q", "--quiet", action="store_true", help="no progress; verify: only failures")
    talk.add_argument("-v", "--verbose", action="store_true", help="the full traceback of an error")
    return command


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fxzip")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "(not installed)"
