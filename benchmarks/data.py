"""Images for the benchmarks: from a directory given with --data, otherwise downloaded by torchvision.

In the directory, the first of these that exists is read:
    NAME/{train,test}/CLASS/*       an ImageFolder (cifar10)
    NAME*.tar                       a tar of that layout, decoded once and cached
    NAME*/*-images-idx3-ubyte.gz    idx files; without training files, the test set is split 8,000 / 2,000
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import datasets
from tqdm import tqdm

CACHE = Path.home() / ".cache" / "fxzip-bench"
HELD_OUT = 0.2  # of an image set that has one part only
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashion-mnist": ((0.2860,), (0.3530,)),
    "kmnist": ((0.1918,), (0.3483,)),
}
DOWNLOADS = {
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
    "mnist": datasets.MNIST,
    "fashion-mnist": datasets.FashionMNIST,
    "kmnist": datasets.KMNIST,
}

Part = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Data:
    """train, test: (images uint8 [n, c, h, w], labels int64 [n]); mean, std per channel, of pixels in 0..1.

    flip: whether a mirrored image is still an image of its class.
    """

    name: str
    train: Part
    test: Part
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    source: str

    @property
    def shape(self) -> tuple[int, int]:
        """Channels and height."""
        return self.train[0].shape[1], self.train[0].shape[2]

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [n, c, h, w] -> float32, standardised"""
        mean, std = (torch.tensor(s).view(1, -1, 1, 1) for s in (self.mean, self.std))
        return (images.float() / 255 - mean) / std

    def calibration(self, count: int, seed: int) -> Tensor:
        """`count` random training images of all classes, without labels. float32 [count, c, h, w]"""
        return self.normalise(self.train[0][_shuffled(len(self.train[0]), seed)[:count]])

    def only(self, classes: Sequence[int]) -> Data:
        """The images of some classes."""
        wanted = torch.tensor(classes)
        parts = ((x[own], y[own]) for x, y in (self.train, self.test) for own in [torch.isin(y, wanted)])
        train, test = parts
        return replace(self, train=train, test=test)

    def halved(self) -> Data:
        """Images of half the height and width, by the mean of four pixels."""
        parts = ((F.avg_pool2d(x.float(), 2).round().byte(), y) for x, y in (self.train, self.test))
        train, test = parts
        return replace(self, name=f"{self.name}-half", train=train, test=test)

    def with_test(self, count: int | None, seed: int = 0) -> Data:
        """The same with `count` random test images."""
        if count is None or count >= len(self.test[0]):
            return self
        pick = _shuffled(len(self.test[0]), seed)[:count]
        return replace(self, test=(self.test[0][pick], self.test[1][pick]))


def load(name: str, root: str | None, seed: int = 0) -> Data:
    """One of `STATISTICS`, from `root`, or downloaded into the cache if root is None; or scikit-learn's "digits"."""
    if name == "digits":
        return _digits(seed)
    train, test, source = _download(name) if root is None else _find(name, Path(root), seed)
    mean, std = STATISTICS[name]
    return Data(name, train, test, mean, std, name in ("cifar10", "cifar100", "fashion-mnist"), source)


def _digits(seed: int) -> Data:
    """1,797 images of 8 pixels, a fifth of them for tests."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images * 15).byte().unsqueeze(1)  # 0 to 16 in the set
    train, test = _split((images, torch.from_numpy(found.target).long()), seed)
    mean, std = (float(f(found.images) / 17) for f in (np.mean, np.std))
    return Data("digits", train, test, (mean,), (std,), False, "scikit-learn")


def concatenate(parts: list[Data]) -> Data:
    """Image sets of one shape as one, classes counted on: [0, 10), [10, 20), ...

    All are normalised alike, so that the brightness of an image does not tell its set.
    """
    offset = np.cumsum([0] + [int(d.train[1].max()) + 1 for d in parts[:-1]]).tolist()
    train, test = (
        (torch.cat([p[0] for p in side]), torch.cat([p[1] + o for p, o in zip(side, offset, strict=True)]))
        for side in ([d.train for d in parts], [d.test for d in parts])
    )
    mean, std = (tuple(np.mean([getattr(d, s) for d in parts], 0).tolist()) for s in ("mean", "std"))
    name, source = "+".join(d.name for d in parts), ", ".join(dict.fromkeys(d.source for d in parts))
    return Data(name, train, test, mean, std, False, source)


def _find(name: str, root: Path, seed: int) -> tuple[Part, Part, str]:
    if not root.is_dir():
        raise SystemExit(f"--data {root}: no such directory")
    if (root / name / "train").is_dir():
        return _folder(root / name / "train"), _folder(root / name / "test"), str(root / name)
    tars = sorted(root.glob(f"{name}*.tar"))
    if tars:
        train, test = _tar(tars[0])
        return train, test, tars[0].name
    for folder in sorted(root.glob(f"{name}*")):
        if (folder / "train-images-idx3-ubyte.gz").exists():
            return _idx(folder, "train"), _idx(folder, "t10k"), folder.name
        if (folder / "t10k-images-idx3-ubyte.gz").exists():
            return *_split(_idx(folder, "t10k"), seed), f"{folder.name} (split with seed {seed})"
    raise SystemExit(f"--data {root}: nothing for {name}; see benchmarks/data.py for the layouts")


def _download(name: str) -> tuple[Part, Part, str]:
    parts = []
    for train in (True, False):
        found = DOWNLOADS[name](str(CACHE / "torchvision"), train=train, download=True)
        images = torch.as_tensor(found.data)
        images = images.permute(0, 3, 1, 2).contiguous() if images.dim() == 4 else images.unsqueeze(1)
        parts.append((images, torch.as_tensor(found.targets)))
    return parts[0], parts[1], "torchvision"


def _folder(path: Path) -> Part:
    found = datasets.ImageFolder(str(path))
    indices = tqdm(range(len(found)), desc=str(path), leave=False, disable=None)
    images = [np.asarray(found[k][0].convert("RGB")) for k in indices]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(found.targets)


def _tar(path: Path) -> tuple[Part, Part]:
    cached = CACHE / f"{path.stem}-{path.stat().st_size}.npz"
    if not cached.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(f".{os.getpid()}.npz")  # other benchmarks may be at it as well
        np.savez(partial, allow_pickle=False, **_decode(path))
        partial.replace(cached)
    found = np.load(cached)
    train_x, train_y, test_x, test_y = (
        torch.from_numpy(found[key]) for key in ("train_x", "train_y", "test_x", "test_y")
    )
    return (train_x, train_y), (test_x, test_y)


def _decode(path: Path) -> dict[str, np.ndarray]:
    """{train,test}/CLASS/* in the tar -> train_x uint8 [n, 3, h, w], train_y int64 [n], ...

    Classes are numbered in sorted order, as ImageFolder does.
    """
    images: dict[str, list] = {"train": [], "test": []}
    names: dict[str, list[str]] = {"train": [], "test": []}
    with tarfile.open(path) as tar:
        for member in tqdm(tar, desc=f"decode {path.name}", leave=False, disable=None):
            side, *rest = member.name.removeprefix("./").split("/")
            if member.isfile() and side in images and len(rest) == 2:
                content = tar.extractfile(member)
                assert content is not None
                images[side].append(np.asarray(Image.open(io.BytesIO(content.read())).convert("RGB")))
                names[side].append(rest[0])
    classes = sorted(set(names["train"]))
    arrays = {}
    for side in images:
        arrays[f"{side}_x"] = np.ascontiguousarray(np.stack(images[side]).transpose(0, 3, 1, 2))
        arrays[f"{side}_y"] = np.array([classes.index(n) for n in names[side]], np.int64)
    return arrays


def _idx(folder: Path, side: str) -> Part:
    """The idx format: a header of big-endian int32 (magic number, sizes), then bytes."""
    arrays = []
    for kind, dims in (("images-idx3", 3), ("labels-idx1", 1)):
        raw = gzip.decompress((folder / f"{side}-{kind}-ubyte.gz").read_bytes())
        shape = np.frombuffer(raw, ">i4", count=dims, offset=4)
        arrays.append(np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape).copy())
    return torch.from_numpy(arrays[0]).unsqueeze(1), torch.from_numpy(arrays[1].astype(np.int64))


def _split(part: Part, seed: int) -> tuple[Part, Part]:
    order = _shuffled(len(part[0]), seed)
    cut = len(order) - round(HELD_OUT * len(order))
    first, rest = order[:cut], order[cut:]
    return (part[0][first], part[1][first]), (part[0][rest], part[1][rest])


def _shuffled(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
