"""Models by name. The one place of fxzip that knows where networks come from; none of them is downloaded."""

from __future__ import annotations

import inspect
import runpy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files.checkpoint import load_weights, stripped
from ..trace.guards import seeded
from .spec import Spec, inside, nearest, parse

SOURCES = ("torchvision", "timm", "hf")
HOW = "write torchvision:NAME, timm:NAME, hf:NAME, hf:FOLDER or path/to/file.py:FACTORY"
CLASSES = "num_classes"
# Options with which these libraries read a file in a way of their own, or run code that lies beside one.
UNSAFE = {
    "checkpoint_path": "give the file as weights",
    "trust_remote_code": "write path/to/file.py:FACTORY, with --trust-code",
}


@dataclass(frozen=True)
class Architecture:
    """make(**options) builds it with random weights; sized: it takes num_classes; example: an input it takes;
    held: it comes with weights."""

    text: str
    make: Callable[..., Any]  # what it returns is checked
    sized: bool = False
    example: Callable[[nn.Module], Any] | None = None
    held: bool = False


def architecture(text: str, folder: Path = Path(), trust_code: bool = False) -> Architecture:
    """What `text` names. Raises InputError: unknown, its library is not installed, code without --trust-code, or one of
    the options UNSAFE."""
    spec = parse(text, SOURCES)
    refused = next((k for k in UNSAFE if k in spec.options), "") if spec.source else ""
    if refused:
        raise InputError(f"model {text!r}: {refused} may run code that is in files: {UNSAFE[refused]}")
    if spec.source == "torchvision":
        return _torchvision(spec)
    if spec.source == "timm":
        return _timm(spec)
    if spec.source == "hf":
        return _transformers(spec, folder)
    if ".py:" in spec.name:
        return _factory(spec, folder, trust_code)
    raise InputError(f"model {text!r}: {HOW}, for example torchvision:resnet50")


def build(
    made: Architecture, state: Mapping[str, Tensor] | None = None, what: str = "weights", seed: int = 0
) -> nn.Module:
    """The network in eval mode, with `state` or else random weights from `seed`; the random state is as before.

    The number of classes is read off the weights, where that explains every shape that differs; of weights on the
    meta device only the shapes count. Raises InputError when the weights do not fit.
    """
    with seeded(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the way some models initialise
        model = _made(made)
        if state is not None:
            classes = _classes(model.state_dict(), state) if made.sized else None
            model = _made(made, **{CLASSES: classes}) if classes else model
            if not any(t.is_meta for t in state.values()):
                load_weights(model, state, what)
    return model.eval()


def relative(text: str, change: Callable[[Path], str], folder: Path) -> str:
    """`text` with the path in it, if there is one, changed; for recipes that are written elsewhere."""
    spec = parse(text, SOURCES)
    if spec.source == "hf" and (path := inside(spec.name, folder)).is_dir():
        return text.replace(spec.name, change(path), 1)
    if not spec.source and ".py:" in spec.name:
        file = spec.name.rpartition(":")[0]
        return text.replace(file, change(inside(file, folder)), 1)
    return text


def _made(made: Architecture, **options: Any) -> nn.Module:
    try:
        model = made.make(**options)
    except (TypeError, ValueError, RuntimeError, AssertionError, OSError) as error:
        given = "".join(f", {k}={v}" for k, v in options.items())
        raise InputError(f"model {made.text!r}{given} cannot be built: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"model {made.text!r}: its factory returns a {type(model).__name__}, not an nn.Module")
    return model


def _classes(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> int | None:
    """The number of classes in `state`, if all shapes that differ differ in their first axis, and alike."""
    state = stripped(state, own)
    differ = [(own[n].shape, t.shape) for n, t in state.items() if n in own and own[n].shape != t.shape]
    found = {(a[:1], b[:1]) for a, b in differ}
    if len(found) != 1 or any(a[1:] != b[1:] for a, b in differ):
        return None
    return int(differ[0][1][0])


# ------------------------------------------------------------------------------------------------- sources


def _torchvision(spec: Spec) -> Architecture:
    from torchvision import models

    names = [n for m in (models, models.segmentation, models.video) for n in models.list_models(module=m)]
    if spec.name not in names:
        hint = nearest(spec.name, names) or "torchvision.models.list_models() lists them"
        raise InputError(
            f"torchvision has no classification, segmentation or video model {spec.name!r}: {hint}"
        )
    plain = {"weights": None}
    if "weights_backbone" in inspect.signature(models.get_model_builder(spec.name)).parameters:
        plain["weights_backbone"] = None
    image = _image(3, 16, 112, 112) if spec.name in models.list_models(module=models.video) else _image(3, 224, 224)
    make = lambda **more: models.get_model(spec.name, **{**plain, **spec.options, **more})  # noqa: E731
    return Architecture(spec.text, make, CLASSES not in spec.options, image)


def _timm(spec: Spec) -> Architecture:
    try:
        import timm  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(f"model {spec.text!r} needs timm: pip install timm") from error
    if not timm.is_model(spec.name):
        hint = nearest(spec.name, timm.list_models()) or "timm.list_models() lists them"
        raise InputError(f"timm has no model {spec.name!r}: {hint}")
    make = lambda **more: timm.create_model(spec.name, pretrained=False, **{**spec.options, **more})  # noqa: E731

    def image(model: nn.Module) -> Tensor:
        size = spec.options.get("img_size")
        return _image(*((3, size, size) if size else model.pretrained_cfg.get("input_size", (3, 224, 224))))(model)  # type: ignore[union-attr]

    return Architecture(spec.text, make, CLASSES not in spec.options, image)


def _transformers(spec: Spec, folder: Path) -> Architecture:
    """hf:FOLDER: the network that lies there, with its weights; hf:NAME: a configuration of that name, at random."""
    try:
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(f"model {spec.text!r} needs transformers: pip install transformers") from error
    options = dict(spec.options)
    head = options.pop("head", "")
    auto = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel", None)
    if auto is None:
        known = [n.removeprefix("AutoModelFor") for n in dir(transformers) if n.startswith("AutoModelFor")]
        raise InputError(f"transformers has no head {head!r}: {nearest(str(head), known) or ', '.join(known)}")
    path = inside(spec.name, folder)
    if path.is_dir():
        return Architecture(spec.text, lambda: _from_folder(transformers, auto if head else None, path, options),
                            False, _dummy, True)  # fmt: skip
    if spec.name not in transformers.CONFIG_MAPPING:
        hint = nearest(spec.name, transformers.CONFIG_MAPPING) or "nor a folder"
        raise InputError(f"transformers has no configuration {spec.name!r}: {hint} (models are not downloaded)")
    return Architecture(
        spec.text, lambda: auto.from_config(transformers.AutoConfig.for_model(spec.name, **options)), example=_dummy
    )


def _from_folder(transformers: Any, auto: Any, path: Path, options: dict[str, Any]) -> nn.Module:
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    if auto is None:
        names = config.architectures or []
        auto = getattr(transformers, names[0], None) if len(names) == 1 else transformers.AutoModel
        if auto is None:
            raise InputError(f"model 'hf:{path}': transformers has no class {names[0]}; its own code is not run")
    return auto.from_pretrained(path, local_files_only=True, use_safetensors=True, **options)


def _factory(spec: Spec, folder: Path, trust_code: bool) -> Architecture:
    name, _, attribute = spec.name.rpartition(":")
    path = inside(name, folder)
    if not path.is_file():
        raise InputError(f"model {spec.text!r}: no such file: {str(path)!r}")
    if not trust_code:
        raise InputError(f"model {spec.text!r} runs {str(path)!r}: read it, then pass --trust-code")
    try:
        made = runpy.run_path(str(path))
    except Exception as error:
        raise InputError(f"model {spec.text!r}: {path.name} fails: {type(error).__name__}: {error}") from error
    factory: Any = made.get(attribute)
    if not callable(factory):
        hint = nearest(attribute, [k for k, v in made.items() if callable(v)])
        raise InputError(f"model {spec.text!r}: {path.name} has no function {attribute!r} {hint}".rstrip())
    sized = CLASSES in inspect.signature(factory).parameters and CLASSES not in spec.options
    return Architecture(spec.text, lambda **more: factory(**{**spec.options, **more}), sized, held=True)


def _image(*shape: int) -> Callable[[nn.Module], Tensor]:
    return lambda _: torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


def _dummy(model: Any) -> Any:
    return model.dummy_inputs
