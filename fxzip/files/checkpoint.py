"""Checkpoints of ordinary networks: read without running what is in them, and put into a model strictly."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import InputError
from ..trace import state_by_all_names

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # where training scripts put the weights
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and torch.compile
SHOWN = 4  # keys in a message


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Name -> tensor (on the CPU) of a `.safetensors` file or of what `torch.save` wrote; no code of it runs.

    A dict with the weights under one of "state_dict", "model_state_dict", "model", "net" is opened.
    Raises InputError for a missing or damaged file, a pickled module, a compressed archive, or what holds no tensors.

    >>> from tempfile import mkdtemp
    >>> torch.save({"state_dict": nn.Linear(2, 1).state_dict(), "epoch": 3}, path := mkdtemp() + "/a.pt")
    >>> list(read_checkpoint(path))
    ['weight', 'bias']
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"weights {str(path)!r}: no such file")
    if path.suffix == ".safetensors":
        try:
            return load_file(str(path))
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"weights {str(path)!r}: not a safetensors file ({error})") from error
    _refuse_compressed(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError and others, by what is wrong with it
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"weights {str(path)!r}: cannot be read as weights only ({reason[:160]}). A whole pickled module runs code"
            " when loaded; save model.state_dict() or safetensors instead"
        ) from error
    return _state(content, path)


def load_weights(model: nn.Module, state: Mapping[str, Tensor], what: str = "weights") -> None:
    """Put `state` into `model`: all keys and all shapes must agree, or nothing is changed.

    Its tensors become the model's own where dtypes agree and none of them is there twice: those of a safetensors file
    stay in the file, of which the system reads what is used and drops what it needs room for. Otherwise values are
    copied. The prefixes "module." and "_orig_mod." are stripped if, and only if, that makes the keys equal.
    what: for messages. Raises InputError that lists the keys that differ.

    >>> load_weights(model := nn.Linear(2, 1), {"module.weight": torch.ones(1, 2), "module.bias": torch.zeros(1)})
    >>> model.weight.tolist()
    [[1.0, 1.0]]
    """
    own = model.state_dict()
    state = stripped(state, own)
    problems = [f"lacks {_few([n for n in own if n not in state])}"] if own.keys() - state.keys() else []
    problems += [f"has {_few([n for n in state if n not in own])}, which the model has not"] * bool(
        state.keys() - own.keys()
    )
    shapes = [
        f"{n} is {list(t.shape)}, in the model {list(own[n].shape)}"
        for n, t in state.items()
        if n in own and t.shape != own[n].shape
    ]
    problems += [_few(shapes)] if shapes else []
    if problems:
        raise InputError(f"{what} does not fit the model: it " + "; ".join(problems))
    model.load_state_dict(dict(state), assign=_fit_as_they_are(model, state))


def _fit_as_they_are(model: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Whether a model can hold these tensors themselves: of its dtypes and devices, and none tied to another."""
    own = state_by_all_names(model)
    apart = len({id(t) for t in own.values()}) == len(own)
    apart = apart and len({t.data_ptr() for t in state.values()}) == len(state)
    return apart and all((own[n].dtype, own[n].device) == (t.dtype, t.device) for n, t in state.items() if n in own)


def stripped(state: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """`state` without the wrappers' prefixes, where that gives exactly the wanted keys; else `state` itself."""
    keys = {name: name for name in state}
    for _ in range(4):  # wrappers may be nested
        if keys.keys() == wanted.keys():
            return {name: state[old] for name, old in keys.items()}
        prefix = next((p for p in PREFIXES if keys and all(name.startswith(p) for name in keys)), None)
        if prefix is None:
            break
        keys = {name.removeprefix(prefix): old for name, old in keys.items()}
    return state


def _state(content: Any, path: Path) -> dict[str, Tensor]:
    """The mapping of tensors in what a checkpoint holds."""
    if _is_state(content):
        return dict(content)
    if isinstance(content, Mapping):
        found = [k for k in WRAPPERS if _is_state(content.get(k))]
        if len(found) == 1:
            return dict(content[found[0]])
        held = f"a dict with the keys {_few([str(k) for k in content])}"
        raise InputError(
            f"weights {str(path)!r}: {held}, and tensors under {'more than one' if found else 'none'} of"
            f" {', '.join(WRAPPERS)}: save the state_dict alone"
        )
    raise InputError(f"weights {str(path)!r}: holds a {type(content).__name__}, not a state_dict")


def _is_state(content: Any) -> bool:
    return isinstance(content, Mapping) and bool(content) and all(isinstance(v, Tensor) for v in content.values())


def _refuse_compressed(path: Path) -> None:
    """torch.save stores tensors as they are; an archive that inflates could be of any size."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            swollen = [i for i in archive.infolist() if i.compress_type != zipfile.ZIP_STORED]
    except Exception as error:  # BadZipFile, NotImplementedError, UnicodeDecodeError and others
        raise InputError(f"weights {str(path)!r}: a damaged archive ({error})") from error
    if swollen:
        entry = swollen[0].filename
        raise InputError(f"weights {str(path)!r}: entry {entry!r} is compressed, which torch.save never does")


def _few(items: list[str]) -> str:
    more = len(items) - SHOWN
    return ", ".join(items[:SHOWN]) + (f" and {more} more" if more > 0 else "")
