"""Which columns of a covariance to keep so that the rest is best rebuilt from them: choose, then exchange.

Everything is read off one symmetric matrix T, the covariance S swept on the kept set K (Beaton 1964; Goodnight,
A tutorial on the SWEEP operator, 1979):

    T_KK = -S_KK^-1        T_KJ = S_KK^-1 S_KJ  (how to rebuild J from K)        T_JJ = S_JJ - S_JK S_KK^-1 S_KJ

What is left unexplained is tr(G R), R the residual T_JJ filled up with zeros and G a metric. Keeping j explains
r_j^T G r_j / T_jj more of it, with r_j the column of R; dropping k loses b_k^T G b_k / -T_kk, with b_k = (T_kJ, 1
at k).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

EXPLAINED = 1e-6  # a feature with less than this share of its variance left has nothing new to say
GAIN = 1e-3  # of what is left unexplained: what a round of exchanges must gain for another one
AHEAD = 4  # candidates for each place of a block
ROUNDS = 8  # of exchanges of one size
TILE = 1024  # rows that are swept at once


class Elimination:
    """covariance: float64 [n, n], symmetric; metric: float64 [n, n], symmetric and positive, or its blocks along the
    diagonal where it is 0 elsewhere; none is modified, but for the covariance where it is `spent`, if it is laid out
    as is needed.

    >>> e = Elimination(np.array([[1, 0.9, 0], [0.9, 1, 0], [0, 0, 1]]), np.eye(3))
    >>> e.fill(2), round(e.left, 2)
    ([0, 2], 0.19)
    """

    def __init__(
        self, covariance: np.ndarray, metric: np.ndarray | Sequence[np.ndarray], spent: bool = False
    ) -> None:
        made = np.asarray if spent else np.array
        self.swept = made(covariance, np.float64, order="C")
        self.metric = [metric] if isinstance(metric, np.ndarray) else list(metric)
        self.kept: list[int] = []
        self.images: dict[int, np.ndarray] = {}  # of the rows that were looked at last
        self.variance = self.swept.diagonal().copy()
        image = self._image(self.swept)
        self.power = np.einsum("ij,ij->i", image, self.swept)  # v G v^T of every row v of `_rows`
        self.left = float(image.trace())  # tr(G R)

    def fill(self, width: int, block: int = 1) -> list[int]:
        """Keep the best feature, the next best given it, and so on, up to `width` in all, if so many say something
        new; `block` at a time, the best of AHEAD times as many candidates. Returns all that are kept."""
        while len(self.kept) < width and (best := self._best(min(block, width - len(self.kept)))):
            self._sweep(best, 1)
        return self.kept

    def exchange(self, block: int) -> None:
        """Drop the `block` features that are missed least, keep the best again; on with half as many when that no
        longer pays."""
        width, rounds = len(self.kept), 0
        while block:
            before = (self.swept.copy(), self.power.copy(), list(self.kept), self.left)
            self._sweep(self._worst(block), -1)
            self.fill(width, block)
            rounds += 1
            if self.left > before[-1] or len(self.kept) < width:
                self.swept, self.power, self.kept, self.left = before
            if self.left > before[-1] * (1 - GAIN) or rounds == ROUNDS:
                block, rounds = block // 2, 0

    def _best(self, count: int) -> list[int]:
        """Up to `count` features to keep, each the best given those before it."""
        rest = self.swept.diagonal()
        new = rest > EXPLAINED * self.variance
        new[self.kept] = False
        return self._choose(new, rest, EXPLAINED * self.variance, count, 1)

    def _worst(self, count: int) -> list[int]:
        """`count` features to drop, each the least missed given those before it. In S_KK^-1 that is the same step."""
        held = self._held()
        return self._choose(held, -self.swept.diagonal(), np.zeros(len(held)), count, -1)

    def _choose(self, open_: np.ndarray, own: np.ndarray, least: np.ndarray, count: int, sign: int) -> list[int]:
        score = np.where(open_, sign * self.power / np.where(open_, own, 1), -np.inf)
        among = np.argsort(-score, kind="stable")[: min(AHEAD * count if count > 1 else 1, int(open_.sum()))]
        if count == 1:
            return among.tolist()
        rows = self._rows(among)
        pivots, images = sign * self.swept[np.ix_(among, among)], self._image(rows)
        chosen = _greedy(pivots, images @ rows.T, least[among], count, sign)
        self.images = {int(among[k]): images[k] for k in chosen}
        return list(self.images)

    def _held(self) -> np.ndarray:
        """Which features are kept, bool [n]."""
        held = np.zeros(len(self.power), bool)
        held[self.kept] = True
        return held

    def _rows(self, index: np.ndarray) -> np.ndarray:
        """Per feature not kept, its column of R; per kept one (T_kJ, 1 at k). [len(index), n]"""
        rows = self.swept[index]
        rows[:, self.kept] = 0
        held = self._held()[index]
        rows[held, index[held]] = 1
        return rows

    def _image(self, rows: np.ndarray) -> np.ndarray:
        """rows G. [., n]"""
        ends = np.cumsum([len(g) for g in self.metric])
        return np.concatenate([rows[:, e - len(g) : e] @ g for e, g in zip(ends, self.metric, strict=True)], axis=1)

    def _sweep(self, block: list[int], sign: int) -> None:
        """Keep (sign 1) or drop (-1) all features of a block at once."""
        if not block:
            return
        p = np.array(block)
        rows = self._rows(p)
        known = [self.images[k] for k in block if k in self.images]
        image = (np.stack(known) if len(known) == len(block) else self._image(rows)).T  # [n, b]
        self.images = {}  # of the matrix as it was
        inner = rows @ image
        seen = self.swept @ np.where(self._held()[:, None], 0, image)
        seen[self.kept] += image[self.kept]  # v G v_p^T, for all v
        pivot = np.linalg.inv(self.swept[np.ix_(p, p)])
        pivot = (pivot + pivot.T) / 2
        across = self.swept[:, p].copy()
        share = across @ pivot  # C
        self.left -= sign * float((sign * pivot * inner).sum())
        self.power += np.einsum("ib,ib->i", share, share @ inner - 2 * seen)
        self.power[p] = np.einsum("ab,ab->a", pivot @ inner, pivot)
        for i in range(0, len(share), TILE):  # a product as large as the matrix would be half of what all this takes
            self.swept[i : i + TILE] -= share[i : i + TILE] @ across.T
        self.swept[:, p] = sign * share
        self.swept[p] = sign * share.T
        self.swept[np.ix_(p, p)] = -pivot
        self.kept = self.kept + block if sign > 0 else [k for k in self.kept if k not in set(block)]


def _greedy(own: np.ndarray, power: np.ndarray, least: np.ndarray, count: int, sign: int) -> list[int]:
    """Indices in order of power_kk / own_kk, the greatest (sign 1) or the least (-1) first, each given those before."""
    own, power = own.copy(), power.copy()
    chosen: list[int] = []
    for _ in range(count):
        open_ = own.diagonal() > least
        open_[chosen] = False
        if not open_.any():
            break
        score = np.where(open_, sign * power.diagonal() / np.where(open_, own.diagonal(), 1), -np.inf)
        k = int(score.argmax())
        share, row = own[:, k] / own[k, k], power[k].copy()
        power += np.outer(share, share) * row[k] - np.outer(share, row) - np.outer(row, share)
        own -= np.outer(share, own[k])
        chosen.append(k)
    return chosen
