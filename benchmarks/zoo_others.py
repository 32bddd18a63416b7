"""Models for coverage.py beside the large libraries: recurrent and plain transformer layers, detectors of ultralytics
and a U-Net of diffusers. The latter two are no dependency of fxzip (ultralytics is AGPL): to measure them, install
them beside torch in an environment of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from zoo import SUITES, Made, images, suite

__all__ = ["SUITES"]

class _Recurrent(nn.Module):
    def __init__(self, cell: type[nn.Module]) -> None:
        super().__init__()
        self.rnn = cell(6, 12, num_layers=2, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0].mean(1))


@suite
def toys() -> dict[str, Callable[[], Made]]:
    def sequence(n: int) -> Tensor:
        return torch.randn(n, 7, 6)

    layer: dict[str, Any] = {"d_model": 16, "nhead": 4, "dim_feedforward": 24, "batch_first": True}

    def encoder() -> nn.Module:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer), 2)

    return {
        "lstm": lambda: (_Recurrent(nn.LSTM), sequence),
        "gru": lambda: (_Recurrent(nn.GRU), sequence),
        "nn.TransformerEncoder": lambda: (
            nn.Sequential(nn.Linear(6, 16), encoder(), nn.Linear(16, 3)),
            sequence,
        ),
        "nn.Transformer": lambda: (
            nn.Transformer(16, 4, 1, 1, 24, batch_first=True),
            lambda n: (torch.randn(n, 7, 16), torch.randn(n, 5, 16)),
        ),
    }


# ------------------------------------------------------------------------------------------------- others

_YOLO = ("yolov5n", "yolov8n", "yolo11n")


@suite
def others() -> dict[str, Callable[[], Made]]:
    found: dict[str, Callable[[], Made]] = {name: lambda name=name: (_yolo(name, 80), images(64)) for name in _YOLO}
    return {**found, "diffusers.UNet2DModel": _unet, "diffusers.UNet2DConditionModel": _conditional_unet}


class _Predictions(nn.Module):
    """The first output of a detector in eval mode; the second are the features that the loss reads."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, x: Tensor) -> Tensor:
        return self.detector(x)[0]


def _yolo(name: str, classes: int) -> nn.Module:
    from ultralytics.nn.tasks import DetectionModel  # type: ignore[import-not-found]

    return _Predictions(DetectionModel(name + ".yaml", ch=3, nc=classes, verbose=False))


# Models of the same architecture for other classes: only their heads differ.
RELATIVES: dict[str, Callable[[], nn.Module]] = {
    f"others:{name}": lambda name=name: _yolo(name, 20) for name in _YOLO
}


_UNET: dict[str, Any] = {"sample_size": 16, "in_channels": 3, "out_channels": 3, "layers_per_block": 1,
                         "block_out_channels": (32, 64), "norm_num_groups": 8}  # fmt: skip


def _unet() -> Made:
    from diffusers import UNet2DModel  # type: ignore[import-not-found]

    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    model = UNet2DModel(**_UNET, **blocks)
    return model, lambda n: {"sample": torch.randn(n, 3, 16, 16), "timestep": torch.randint(0, 1000, (n,))}


def _conditional_unet() -> Made:
    from diffusers import UNet2DConditionModel  # type: ignore[import-not-found]

    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    model = UNet2DConditionModel(**_UNET, **blocks, cross_attention_dim=24, attention_head_dim=8)

    def batch(n: int) -> dict[str, Tensor]:
        noise = {"sample": torch.randn(n, 3, 16, 16), "timestep": torch.randint(0, 1000, (n,))}
        return {**noise, "encoder_hidden_states": torch.randn(n, 5, 24)}

    return model, batch
