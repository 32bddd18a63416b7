"""Data by name: a folder of images, a data set of torchvision, an `.npz`, or random inputs for dry runs."""

from __future__ import annotations

import inspect
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from ..errors import InputError
from .spec import Spec, inside, nearest, parse

SOURCES = ("torchvision", "random")
HOW = "a folder of images, torchvision:CIFAR10?root=FOLDER, a file .npz, or random:3x224x224"
LABELS = ("y", "label", "labels", "target", "targets")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's networks expect
LIMIT = 16 << 30  # bytes that an .npz may hold
RANDOM = 64  # samples of random data


@dataclass(frozen=True)
class Images:
    """How images become inputs: the short side to image_size * 256 / 224, the centre cut out, 0..1, normalised.

    image_size: if None, 224 for a folder, and images of a data set keep their size.
    """

    image_size: int | None = None
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD


class Samples(Dataset):
    """A map-style data set of (input, label), or of inputs alone. classes: names of the labels, if it has them."""

    def __init__(self, items: Any, read: Callable[[Any], Any] | None = None, classes: Any = (), labelled: bool = True):
        read = read or (lambda x: x)
        self.items, self.read, self.classes, self.labelled = items, read, tuple(classes), labelled

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, k: int) -> Any:
        return self.read(self.items[k])


def samples(text: str, images: Images | None = None, folder: Path = Path(), seed: int = 0) -> Samples:
    """The data set that `text` names; nothing is downloaded unless an option says so.

    Raises InputError: no such thing, unreadable, empty, or beyond the limits.
    """
    images = images or Images()
    spec = parse(text, SOURCES)
    if spec.source == "random":
        found = _random(spec, seed)
    elif spec.source == "torchvision":
        found = _torchvision(spec, images, folder)
    elif (path := inside(spec.name, folder)).is_dir():
        found = _folder(path, images)
    elif path.suffix == ".npz" and path.is_file():
        found = _npz(path)
    else:
        kind = "no such file" if path.suffix == ".npz" else f"no such folder or file; data is {HOW}"
        raise InputError(f"data {text!r}: {kind}")
    if not len(found):
        raise InputError(f"data {text!r}: is empty")
    return found


def loader(data: Samples, batch_size: int = 64, count: int | None = None, seed: int = 0) -> DataLoader:
    """Batches of `count` samples drawn without replacement by `seed`; of all of them, in order, if None."""
    chosen: Dataset = data
    if count is not None:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        chosen = Subset(data, order[:count].tolist())
    return DataLoader(chosen, batch_size, collate_fn=_collate)


def relative(text: str, change: Callable[[Path], str], folder: Path) -> str:
    """`text` with the path in it changed; for recipes that are written elsewhere."""
    spec = parse(text, SOURCES)
    if spec.source == "torchvision":
        from torchvision import datasets

        kind = getattr(datasets, spec.name, None)
        if kind is None or "root" not in inspect.signature(kind).parameters:
            return text
        head, _, options = text.partition("?")
        root = quote(change(inside(str(spec.options.get("root", ".")), folder)), safe="/")
        return "?".join([head, "&".join([f"root={root}", *(o for o in options.split("&") if o[:5] != "root=" and o)])])
    return text.replace(spec.name, change(inside(spec.name, folder)), 1) if not spec.source else text


# ------------------------------------------------------------------------------------------------- sources


def _random(spec: Spec, seed: int) -> Samples:
    """`random:3x224x224`: normal floats; with `?high=30522` integers below that, `&name=input_ids` by name."""
    try:
        shape = [int(n) for n in spec.name.split("x")]
        unknown = [k for k in spec.options if k not in ("count", "high", "name")]
        count, high = int(spec.options.get("count", RANDOM)), spec.options.get("high")
        if unknown or min([*shape, count]) < 1 or (high is not None and int(high) < 1):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise InputError(
            f"data {spec.text!r}: write random:3x224x224, with ?count=64, ?high=1000 (integers) or ?name=input_ids"
        ) from error
    generator = torch.Generator().manual_seed(seed)
    size = (count, *shape)
    x = torch.randn(size, generator=generator) if high is None else torch.randint(int(high), size, generator=generator)
    name = spec.options.get("name")
    return Samples([{name: row} for row in x] if name else x, labelled=False)


def _torchvision(spec: Spec, images: Images, folder: Path) -> Samples:
    from torchvision import datasets

    kind = getattr(datasets, spec.name, None)
    if spec.name not in datasets.__all__ or kind is None:
        hint = nearest(spec.name, datasets.__all__) or "torchvision.datasets.__all__ lists them"
        raise InputError(f"torchvision has no data set {spec.name!r}: {hint}")
    if spec.name.startswith("LSUN"):
        raise InputError(f"data {spec.text!r}: torchvision unpickles a file in that folder, which may run code")
    options = dict(spec.options)
    if "root" in inspect.signature(kind).parameters:
        options["root"] = str(inside(str(options.get("root", ".")), folder))
    try:
        data = kind(**options, transform=_transform(images))
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        raise InputError(f"data {spec.text!r}: {type(error).__name__}: {error}") from error
    return Samples(data, classes=getattr(data, "classes", ()))


def _folder(path: Path, images: Images) -> Samples:
    """A folder per class, or images side by side without labels."""
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader

    size = images.image_size or 224
    change = _transform(Images(size, images.mean, images.std))
    try:
        if any(p.is_dir() for p in path.iterdir()):
            data = ImageFolder(str(path), transform=change)
            return Samples(data, classes=data.classes)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"data {str(path)!r}: {str(error).splitlines()[0]}") from error
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in IMG_EXTENSIONS)
    if not files:
        raise InputError(f"data {str(path)!r}: no images in it, nor a folder per class")
    return Samples(files, lambda file: change(default_loader(str(file))), labelled=False)


def _npz(path: Path) -> Samples:
    """Arrays by name: labels under one of LABELS; one other array is the input, several are inputs by name."""
    if not zipfile.is_zipfile(path):
        raise InputError(f"data {str(path)!r}: not an .npz file")
    try:
        with zipfile.ZipFile(path) as archive:
            held = sum(i.file_size for i in archive.infolist())
        if held > LIMIT:
            gib = held / 2**30
            raise InputError(f"data {str(path)!r}: holds {gib:.0f} GiB, more than the {LIMIT >> 30} that are read")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except InputError:
        raise
    except Exception as error:  # BadZipFile, zlib.error, MemoryError and others, by what is wrong with it
        raise InputError(f"data {str(path)!r}: {type(error).__name__}: {error}") from error
    strange = next((n for n, a in arrays.items() if not isinstance(a, np.ndarray)), None)
    if strange is not None:
        raise InputError(f"data {str(path)!r}: {strange} is no array")
    label = next((n for n in LABELS if n in arrays), None)
    inputs = {n: _tensor(path, n, a) for n, a in arrays.items() if n != label}
    sizes = {n: len(a) if a.ndim else 0 for n, a in arrays.items()}
    if not inputs or len(set(sizes.values())) != 1:
        raise InputError(f"data {str(path)!r}: needs inputs of one length, labels under y; it has {sizes}")
    if label and arrays[label].dtype.kind not in "fiub":
        raise InputError(f"data {str(path)!r}: {label} is {arrays[label].dtype}, not numbers")
    classes = torch.from_numpy(arrays[label]).long() if label else None

    def read(k: int) -> Any:
        x: Any = {n: t[k] for n, t in inputs.items()} if len(inputs) > 1 else next(iter(inputs.values()))[k]
        return x if classes is None else (x, classes[k])

    return Samples(range(sizes[next(iter(inputs))]), read, labelled=classes is not None)


def _tensor(path: Path, name: str, array: np.ndarray) -> Tensor:
    """Floats as float32, integers as int64; pixel values need a scale that only the user knows."""
    if array.dtype == np.uint8:
        raise InputError(
            f"data {str(path)!r}: {name} is uint8: save floats, scaled and normalised as the networks expect"
        )
    if array.dtype.kind not in "fiub":
        raise InputError(f"data {str(path)!r}: {name} is {array.dtype}, not numbers")
    tensor = torch.from_numpy(array)
    return tensor.float() if tensor.is_floating_point() else tensor if tensor.dtype == torch.bool else tensor.long()


def _transform(images: Images) -> Callable[[Any], Tensor]:
    from torchvision import transforms as t

    size = images.image_size
    steps = [t.Resize(size * 256 // 224), t.CenterCrop(size)] if size else []
    return t.Compose([*steps, t.ToTensor(), t.Normalize(list(images.mean), list(images.std))])


def _collate(batch: list[Any]) -> Any:
    try:
        return default_collate(batch)
    except RuntimeError as error:
        raise InputError(f"data: samples are not of one size; set image_size ({str(error).splitlines()[0]})") from error
