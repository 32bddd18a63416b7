"""Networks, and merges of them, that are saved and loaded by another process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from helpers import unchanged
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from toys import Recurrent, UNet, randomise

import fxzip
from fxzip.match import Matching
from fxzip.measure.moments import SpaceMoments


class Conv(nn.Module):
    """Batch norms, a buffer that state_dict does not list, an auxiliary head, a tensor constant."""

    scale: Tensor

    def __init__(self, classes: int = 3, act: type[nn.Module] = nn.ReLU, width: int = 8, eps: float = 1e-5):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width, eps)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.act = act()
        self.aux, self.fc = nn.Linear(width, classes), nn.Linear(width, classes)
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.conv1(x * self.scale)))
        x = self.act(self.norm2(self.conv2(x)) + x).mean((2, 3)) + torch.ones(1)
        return self.fc(x) + self.aux(x) if self.training else self.fc(x)


class Renamed(Conv):
    """Conv with one more op."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tanh(x))


class Tied(nn.Module):
    """Two layers have one weight, and so do the embedding and the output; the input is integer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid, self.mid2 = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.mid2.weight = self.mid.weight
        self.out = nn.Linear(6, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.mid2(F.relu(self.mid(self.embed(x))))))


class TwoInputs(nn.Module):
    """A dict of inputs, a dict of outputs, a parameter that the graph reads itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(3, 6), nn.Linear(4, 6), nn.Linear(6, 2)
        self.shift = nn.Parameter(torch.zeros(1, 6))

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        h = F.gelu(self.a(left) + self.b(right) + self.shift)
        return {"logits": self.out(h), "features": h.sum(1)}


class SpectralConv(nn.Module):
    """A complex parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(4, 6), nn.Linear(6, 2)
        self.filter = nn.Parameter(torch.randn(1, 6, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.inp(x)) * self.filter.abs())


IMAGES = torch.randn(8, 2, 5, 5, generator=torch.Generator().manual_seed(5))
CLASSES = {"cats": 3, "big-dogs": 4, "emus": 5}


def by_task(task: str) -> Conv:
    return Conv(CLASSES[task])


class Mixed(fxzip.Zip):
    """Merged features that are mixtures of the models', so that reading them takes a matrix product."""

    def __call__(self, moments: SpaceMoments, width: int) -> Matching:
        plain = super().__call__(moments, width)
        generator = torch.Generator().manual_seed(3)
        mix = torch.linalg.qr(torch.randn(plain.width, plain.width, generator=generator).double())[0]
        return Matching(mix.T @ plain.merge, plain.unmerge @ mix, plain.sizes)


@dataclass(frozen=True)
class Case:
    """One merge: how the models are built, on what, and with which options."""

    model_fn: Any
    batch: Any
    tasks: tuple[str, ...] = ("a", "b")
    keyed: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    change: Callable[[fx.GraphModule], Any] = lambda z: None

    def models(self) -> list[nn.Module]:
        made = []
        for seed, task in enumerate(self.tasks):
            fn = self.model_fn[task] if isinstance(self.model_fn, dict) else self.model_fn
            made.append(randomise(fn(task) if fn is by_task else fn(), seed + 1))
        return made

    def merged(self) -> fx.GraphModule:
        models: Any = self.models()
        models = dict(zip(self.tasks, models, strict=True)) if self.keyed else models
        zipped = fxzip.merge(models, [self.batch], progress=False, **{"method": "zip", **self.options})
        self.change(zipped)
        return zipped

    def run(self, zipped: fx.GraphModule) -> list[Tensor]:
        """All output tensors."""
        with torch.no_grad():
            out = zipped(**self.batch) if isinstance(self.batch, dict) else zipped(self.batch)
        return tree_leaves(out)


def trained_a_step(zipped: fx.GraphModule) -> None:
    """Other values, and a frozen part."""
    with torch.no_grad():
        for p in zipped.parameters():
            p.mul_(1.1)
    zipped.get_submodule("conv1").requires_grad_(False)


TOKENS = torch.arange(12).reshape(4, 3) % 7
GENERATOR = torch.Generator().manual_seed(6)
PAIRS = {"left": torch.randn(6, 3, generator=GENERATOR), "right": torch.randn(6, 4, generator=GENERATOR)}
VECTORS = torch.randn(9, 4, generator=GENERATOR)
CASES = {
    "tuple": Case(Conv, IMAGES),
    "dict, heads differ": Case(by_task, IMAGES, ("cats", "big-dogs"), True),
    "functions by task": Case({"a": Conv, "b": lambda: Conv(5)}, IMAGES, ("a", "b"), True),
    "three models": Case(by_task, IMAGES, ("cats", "big-dogs", "emus"), True),
    "averaged heads": Case(Conv, IMAGES, options={"heads": "average"}),
    "explicit unmerge": Case(Conv, IMAGES, options={"until": "norm2"}),
    "unmerge by matrix": Case(Conv, IMAGES, options={"until": "norm2", "method": Mixed()}),
    "unmerge by gather": Case(Conv, IMAGES, options={"until": "norm2", "method": "permute"}),
    "three models, cut": Case(
        by_task, IMAGES, ("cats", "big-dogs", "emus"), True, {"until": "conv2", "method": "average"}
    ),
    "skip unmerged": Case(UNet, torch.randn(4, 3, 6, 6, generator=GENERATOR), options={"until": "mid"}),
    "tied": Case(Tied, TOKENS, options={"method": "average"}),
    "tied, cut": Case(Tied, TOKENS, options={"until": "mid"}),
    "dict inputs and outputs": Case(TwoInputs, PAIRS),
    "recurrent": Case(
        lambda: Recurrent(nn.GRU), torch.randn(4, 3, 5, generator=GENERATOR), options={"method": "average"}
    ),
    "complex": Case(SpectralConv, VECTORS, options={"method": "average", "verify": False}),
    "channels last": Case(Conv, IMAGES, change=lambda z: z.to(memory_format=torch.channels_last)),
    "trained": Case(Conv, IMAGES, change=trained_a_step),
}


HERE = Path(__file__).parent
LOAD_ALL = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
sys.path[:0] = [sys.argv[2], str(Path(sys.argv[2]).parent)]
torch.set_num_threads(1)
import fxzip
from file_nets import CASES
for k, (name, case) in enumerate(CASES.items()):
    outputs = case.run(fxzip.load(Path(sys.argv[1]) / str(k), case.model_fn))
    save_file({str(i): t.clone().contiguous() for i, t in enumerate(outputs)}, f"{sys.argv[1]}/{k}.out")
"""


def saved_and_loaded(root: Path) -> dict[str, Any]:
    """Every case merged and saved in `root`, then loaded and run in one new process."""
    merged = {}
    for k, (name, case) in enumerate(CASES.items()):
        merged[name] = case.merged()
        with unchanged(merged[name]):
            fxzip.save(merged[name], root / str(k))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD_ALL, str(root), str(HERE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return merged


def folder_of(saved: Any, name: str) -> Path:
    return saved[0] / str(list(CASES).index(name))
