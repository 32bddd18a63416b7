"""Slow, obvious versions of what fxzip does fast, and the data to compare on."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import torch

from fxzip.measure.moments import Accumulator


def zipit(correlation, sizes, width, alpha, beta, order=None):
    """ZipIt!'s greedy on shrinking matrices, as published: list of groups (lists of features), or None where
    only banned pairs are left (the published code goes wrong there). order: gets the merges, by first features."""
    c = np.array(correlation, np.float64)
    np.fill_diagonal(c, -np.inf)
    groups = [[i] for i in range(len(c))]
    origin = [model for model, n in enumerate(sizes) for _ in range(n)]
    budget = [int((len(c) - width) // len(sizes) * beta + 1e-4)] * len(sizes)
    while len(groups) > width:
        i, j = sorted(divmod(int(c.argmax()), len(c)))
        if c[i, j] == -np.inf:
            return None
        if order is not None:
            order.append((groups[i][0], groups[j][0]))
        groups[i] = groups[i] + groups[j]
        row = np.minimum(c[i], c[j]) * alpha
        row[i] = -np.inf
        c[i], c[:, i] = row, row
        c = np.delete(np.delete(c, j, 0), j, 1)
        same = origin[i] == origin[j]
        del groups[j], origin[j]
        if same:
            budget[origin[i]] -= 1
            if budget[origin[i]] <= 0:
                mine = np.array(origin) == origin[i]
                c[np.ix_(mine, mine)] = -np.inf
    return groups


def best_permutation(correlation, n):
    """The permutation p that maximises the sum of correlation[k, n + p[k]], by trying all."""
    return max(permutations(range(n)), key=lambda p: sum(correlation[k, n + p[k]] for k in range(n)))


def eliminate(correlation, width, floor=1e-6):
    """Pivoted elimination with the residual formed at every step: the features kept, in order."""
    r = np.array(correlation, np.float64)
    chosen: list[int] = []
    for _ in range(width):
        score = {
            k: (r[:, k] ** 2).sum() / r[k, k] for k in range(len(r)) if k not in chosen and r[k, k] > floor
        }
        if not score:
            break
        j = max(score, key=lambda k: (score[k], -k))
        chosen.append(j)
        r = r - np.outer(r[:, j], r[j]) / r[j, j]
    return chosen


def features(n, seed=0, rows=300, relu=True):
    """Correlated features with means, as of a hidden layer. [rows, n]"""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, n, generator=g) @ torch.randn(n, n, generator=g) + torch.randn(n, generator=g)
    return x.relu() if relu else x


def moments_of(*blocks):
    a = Accumulator([b.shape[1] for b in blocks])
    a.add(torch.cat(blocks, 1))
    return a.moments()


def two(n, seed=0):
    x = features(2 * n, seed)
    return moments_of(x[:, :n], x[:, n:])


def random_correlation(n, seed):
    x = np.random.default_rng(seed).standard_normal((n, n + 3))
    return np.asarray(np.corrcoef(x))


def onehot(slots, width):
    return torch.eye(width, dtype=torch.float64)[torch.as_tensor(slots)]


def slots_of(matching, model):
    block = matching.blocks_unmerge(model)
    assert torch.equal(block.sum(0), torch.ones(len(block)).double())
    return block.argmax(1).numpy()
