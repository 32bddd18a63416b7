"""Training of the parents: recipes, a cache of what was trained, augmentation."""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from data import Data
from torch import Tensor, nn
from tqdm import tqdm

BATCH = 128


@dataclass(frozen=True)
class Recipe:
    """How to train one family of networks: optimiser "sgd" or "adamw", peak learning rate, epochs, and how many
    images of its classes at most (None: all). batch; share of the steps in which the rate rises; whether it does so,
    and falls, in a straight line or by a cosine."""

    optimiser: str
    rate: float
    epochs: int
    images: int | None = None
    # not in repr, which names cached parents
    batch: int = field(default=BATCH, repr=False)
    rising: float = field(default=0.3, repr=False)
    straight: bool = field(default=False, repr=False)

    def adjusted(self, args: argparse.Namespace) -> Recipe:
        """With --epochs and --train, where they are given."""
        return replace(self, epochs=args.epochs or self.epochs, images=args.train or self.images)

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.optimiser == "adamw":
            return torch.optim.AdamW(model.parameters(), self.rate, weight_decay=0.05)
        return torch.optim.SGD(model.parameters(), self.rate, momentum=0.9, weight_decay=5e-4, nesterov=True)


def train(
    key: str, make: Callable[[], nn.Module], data: Data, classes: Sequence[int], recipe: Recipe, seed: int,
    args: argparse.Namespace,
) -> tuple[nn.Module, float]:  # fmt: skip
    """A network for `classes` of `data`, in eval mode, and the seconds its training took; kept in the cache.

    key: names the architecture. Both its initialisation and its batches follow `seed`.
    """
    recipe = recipe.adjusted(args)
    chosen = "".join(f"{c}." for c in classes)
    # The source too: what is a test image in one copy of a set may be a training image in another.
    facts = hashlib.sha256(repr((data.source, len(data.train[0]), recipe)).encode()).hexdigest()[:8]
    path = Path(args.cache) / f"{data.name}-{key}-c{chosen}s{seed}-e{recipe.epochs}-{facts}.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        if path.exists():
            found = torch.load(path, weights_only=True)
            model.load_state_dict(found["state_dict"])
            return model.eval(), found["seconds"]
        start = time.perf_counter()
        _fit(model, data, classes, recipe, f"train {key} {chosen[:-1]}")
    seconds = time.perf_counter() - start
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": model.state_dict(), "classes": list(classes), "seconds": seconds}, path)
    return model.eval(), seconds


def _fit(model: nn.Module, data: Data, classes: Sequence[int], recipe: Recipe, name: str) -> None:
    own = torch.tensor(classes)
    images, labels = data.train
    mine = torch.isin(labels, own).nonzero().flatten()
    mine = mine[torch.randperm(len(mine))[: recipe.images]]
    images, target = data.normalise(images[mine]), torch.full((int(own.max()) + 1,), -1)
    target[own] = torch.arange(len(own))
    labels = target[labels[mine]]
    picks = list(_batches(len(images), recipe))
    fit(model, ((augment(images[pick], data.flip), labels[pick]) for pick in picks), len(picks), recipe, name)


def fit(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], steps: int, recipe: Recipe, name: str) -> None:
    """Train on `steps` batches of images [b, c, h, w] and labels [b], by cross-entropy, where the model is."""
    optimiser = recipe.build(model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, recipe.rate, total_steps=steps, pct_start=recipe.rising,
        anneal_strategy="linear" if recipe.straight else "cos",
    )  # fmt: skip
    where = next(model.parameters()).device
    model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a quarter faster
    bar = tqdm(batches, total=steps, desc=name, leave=False, disable=None)
    for step, (images, labels) in enumerate(bar):
        x = images.to(where).contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(model(x), labels.to(where))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}")
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def augment(images: Tensor, flip: bool, pixels: int = 2) -> Tensor:
    """Shifted by up to `pixels` (the whole batch alike), and every other image mirrored."""
    dy, dx = torch.randint(0, 2 * pixels + 1, (2,)).tolist()
    height, width = images.shape[-2:]
    images = F.pad(images, (pixels,) * 4, mode="replicate")[..., dy : dy + height, dx : dx + width]
    if not flip:
        return images
    return torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)


def _batches(count: int, recipe: Recipe) -> Iterator[Tensor]:
    size = min(recipe.batch, count)
    for _ in range(recipe.epochs):
        yield from torch.randperm(count)[: count // size * size].split(size)
