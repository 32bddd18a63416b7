"""`inspect`, `verify`, `coverage`: one model, or the folder of a merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .app import DATA_HELP, INPUT, LOOK, MODEL, MODEL_HELP, RESULT, Quiet, TrustCode, Verbose, command, option

ModelName = Annotated[str, typer.Argument(help=f"{MODEL_HELP}; or a folder that merge wrote", metavar="MODEL")]
Weights = Annotated[Path | None, option(MODEL, "A checkpoint; default: random weights.")]
Data = Annotated[str | None, option(INPUT, f"{DATA_HELP}. Default: what the model takes, at random.")]
ImageSize = Annotated[int | None, option(INPUT, "Of the example image.", min=1)]
Seed = Annotated[int, option(INPUT, "Of random weights, inputs and the proof.", min=0)]


@command(LOOK)
def inspect(
    model: ModelName,
    weights: Weights = None,
    data: Data = None,
    image_size: ImageSize = None,
    explain: Annotated[str | None, option(RESULT, "Only this one, in words.", metavar="MODULE")] = None,
    seed: Seed = 0,
    trust_code: TrustCode = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Feature spaces of a model, a row each, or one module explained."""
    import fxzip

    network, example = chosen(model, weights, data, image_size, seed, trust_code)
    spaces = fxzip.inspect(network, example)
    print(spaces.explain(explain) if explain else spaces)


@command(LOOK)
def verify(
    model: ModelName,
    weights: Weights = None,
    data: Data = None,
    image_size: ImageSize = None,
    seed: Seed = 0,
    trust_code: TrustCode = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Prove the feature spaces of a model on the model itself.

    Of a folder that merge wrote, the files are checked, too. Exit code 1: no proof.
    """
    import fxzip

    try:
        network, example = chosen(model, weights, data, image_size, seed, trust_code)
    except fxzip.InputError as error:
        if not (Path(model) / "plan.json").is_file():
            raise
        raise fxzip.VerificationError(str(error)) from error  # the files are not as they were written
    result = fxzip.verify(network, example, seed=seed)
    if not (quiet and result.ok):
        print(result)
    return 0 if result.ok else 1


@command(LOOK)
def coverage(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP, metavar="MODEL")] = None,
    weights: Weights = None,
    data: Data = None,
    image_size: ImageSize = None,
    only: Annotated[str, option(RESULT, "Without a model: rows of these names.", metavar="GLOB")] = "*",
    seed: Seed = 0,
    trust_code: TrustCode = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Which models work: the published table, or one model measured now.

    Traced, sound (spaces proven), recovered (from a merge with its own copy whose features were shuffled).
    """
    from . import coverage as job

    if model is None:
        print(job.published(only))
        return 0
    row = job.measured(*chosen(model, weights, data, image_size, seed, trust_code), seed)
    print(row)
    return 0 if row.ok else 1


def chosen(
    text: str, weights: Path | None, data: str | None, image_size: int | None, seed: int, trust_code: bool
) -> tuple[Any, Any]:
    """The network that `text` names, and an example input."""
    import torch

    from ..errors import InputError
    from ..files.checkpoint import read_checkpoint
    from ..files.plan import PLAN
    from . import data as datas
    from . import models

    if (Path(text) / PLAN).is_file():
        return _extracted(Path(text), seed, trust_code)
    made = models.architecture(text, trust_code=trust_code)
    state = read_checkpoint(weights) if weights else None
    network = models.build(made, state, f"weights {str(weights)!r}", seed)
    if data is not None:
        samples = datas.samples(data, datas.Images(image_size), seed=seed)
        return network, next(iter(datas.loader(samples, 2, 2, seed)))
    if made.example is None:
        raise InputError(f"model {text!r}: fxzip cannot know what it takes; pass --data, such as random:3x224x224")
    example = made.example(network)
    if image_size is not None:
        if not isinstance(example, torch.Tensor):
            raise InputError("--image-size: this model takes no image; pass --data")
        size = (*example.shape[:-2], image_size, image_size)
        example = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return network, example


def _extracted(folder: Path, seed: int, trust_code: bool) -> tuple[Any, Any]:
    """The first task's network out of a folder whose files have been checked."""
    import torch

    import fxzip

    from ..files.example import example_from_json
    from ..files.plan import PLAN, read_plan
    from . import job

    zipped, _ = job.opened(folder, trust_code)
    plan = read_plan(folder / PLAN)
    example = example_from_json(plan.example, torch.device("cpu"), torch.Generator().manual_seed(seed))
    return fxzip.extract(zipped, plan.tasks[0]), example
