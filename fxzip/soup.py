"""Model soups: which of many networks for one task to merge, by asking."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import fx, nn

from .errors import InputError
from .loaders import Replay
from .merge import merge


def greedy_soup(
    models: Sequence[nn.Module], evaluate: Callable[[nn.Module], float], loader: Iterable | None = None, **options: Any
) -> tuple[nn.Module, tuple[int, ...]]:
    """Merge as many of the models as do not make the result worse; all are for one task.

    Wortsman et al., "Model soups", ICML 2022, recipe 1: best first, a model is kept when `evaluate` of the soup
    with it is at least what it was. There weights are averaged as they are (method="average", the default here,
    for models that were fine-tuned from one checkpoint); any other method of `merge` will do for models that
    were not.

    evaluate: module -> score, larger is better, on held-out data; a merged module gives one output, as the models
    do. loader, options: as for `merge`.
    Returns the soup (model itself if none was added) and the indices of its models, in the order they were added.
    Raises InputError for an empty list, or where `merge` does.

    >>> import torch
    >>> nets = [nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)) for _ in range(3)]
    >>> x, y = torch.randn(64, 2), torch.randn(64, 1)
    >>> soup, kept = greedy_soup(nets, lambda m: -float((m(x) - y).square().mean()), [x])
    >>> 1 <= len(kept) <= 3, tuple(soup(x).shape)
    (True, (64, 1))
    """
    every = list(models)
    if not every:
        raise InputError("greedy_soup: no models; pass a list of networks for one task")
    if "heads" in options:
        raise InputError("greedy_soup: heads= is always 'average' here, the models are for one task")
    options = {"method": "average", "progress": False, **options}
    loader = Replay(loader) if isinstance(loader, Iterator) else loader  # every merge reads it
    scores = [float(evaluate(m)) for m in every]
    order = sorted(range(len(every)), key=lambda k: -scores[k])
    kept, best, soup = [order[0]], scores[order[0]], every[order[0]]
    for k in order[1:]:
        trial = _merged([every[j] for j in (*kept, k)], loader, options)
        score = float(evaluate(trial))
        if score >= best:
            kept, best, soup = [*kept, k], score, trial
    return soup, tuple(kept)


def _merged(models: Sequence[nn.Module], loader: Iterable | None, options: dict[str, Any]) -> fx.GraphModule:
    return merge(models, loader, heads="average", **options)
