"""Heads that can be compared: one number per sample and head, added to the logits of that head."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Comparable(nn.Module):
    """logits [n, c, ...] -> logits of the same shape and dtype, to be compared with those of other heads.

    A head knows its own classes alone, so how large its logits are on samples of the others says little. Its confidence
    is its largest logit after each logit was standardised over unlabelled samples of all tasks, itself standardised
    over these (after "Standardized Max Logits", Jung et al., ICCV 2021, who standardise the largest logit by the
    predicted class, to find what a network has not seen). What comes out is logits - max(logits) + confidence: the
    surest head wins, by its own first class. Within a head nothing changes: differences of logits, and so its softmax,
    are what they were.

    Buffers, of the logits' dtype: mean and deviation [c] of the logits, shift and scale [] of the confidence.

    >>> head = Comparable(2)
    >>> head(torch.full((1, 2), 3.0))
    tensor([[3., 3.]])
    """

    mean: Tensor
    deviation: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(classes))
        self.register_buffer("deviation", torch.ones(classes))
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    @classmethod
    def like(cls, logits: Tensor) -> Comparable:
        """For logits [n, c, ...] like these."""
        return cls(logits.shape[1]).to(logits)

    def largest(self, logits: Tensor) -> Tensor:
        """[n, c, ...] -> [n, 1, ...]: the largest logit in deviations above its mean."""
        shape = (-1, *(1,) * (logits.dim() - 2))
        return ((logits - self.mean.view(shape)) / self.deviation.view(shape)).amax(1, keepdim=True)

    def forward(self, logits: Tensor) -> Tensor:
        return logits - logits.amax(1, keepdim=True) + (self.largest(logits) - self.shift) / self.scale
