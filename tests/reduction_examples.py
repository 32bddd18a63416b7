"""One case per op that reduces along axes or resamples the last ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from op_examples import Case, case
from torch import nn

aten = torch.ops.aten


_REDUCE = [
    *(
        case("tokens", name, lambda m, h, f=f: h * f(h))
        for name, f in {
            "all": lambda h: 1 + (h > -0.5).all(1, keepdim=True),
            "amax amin": lambda h: h.amax(1, keepdim=True) + h.amin(2, keepdim=True),
            "aminmax": lambda h: torch.aminmax(h, dim=1, keepdim=True)[0],
            "any": lambda h: (h > 0.5).any(2, keepdim=True),
            "argmax": lambda h: h.argmax(2, keepdim=True),
            "argmin": lambda h: h.argmin(1)[:, None],
            "count_nonzero": lambda h: torch.count_nonzero(h > 0, dim=1)[:, None],
            "linalg_vector_norm": lambda h: F.normalize(h, dim=2),
            "logsumexp": lambda h: h.logsumexp(2, keepdim=True),
            "max": lambda h: h.max(1, keepdim=True)[0] + h[:1].max(),
            "max of two": lambda h: torch.max(h, -h),
            "min": lambda h: h.min(2, keepdim=True)[0],
            "mean": lambda h: h.mean((1, 2), keepdim=True) + h.mean(2)[:, :, None],
            "median": lambda h: h.median(1, keepdim=True)[0],
            "nanmedian": lambda h: h.nanmedian(1, keepdim=True)[0],
            "nansum": lambda h: h.nansum(2, keepdim=True),
            "norm": lambda h: aten.norm(h, 2, [2], True),
            "prod": lambda h: h.prod(2, keepdim=True),
            "std": lambda h: h.std(1, keepdim=True),
            "std_mean": lambda h: torch.std_mean(h, 2, keepdim=True)[0],
            "sum": lambda h: h.sum(1, keepdim=True),
            "var": lambda h: h.var(2, keepdim=True),
            "var_mean": lambda h: torch.var_mean(h, 1, keepdim=True)[0],
            "cummax": lambda h: torch.cummax(h, 1)[0],
            "cummin": lambda h: torch.cummin(h, 2)[0],
            "cumprod": lambda h: h.cumprod(1),
            "cumsum": lambda h: h.cumsum(1),
            "cumsum features": lambda h: h.cumsum(2).amax(2, keepdim=True),
            "unfold features": lambda h: h.unfold(2, 3, 1).prod(3).amax(2, keepdim=True),
            "pool features": lambda h: F.avg_pool1d(h, 3, 1).amax(2, keepdim=True),
            "kthvalue": lambda h: h.kthvalue(2, 1, keepdim=True)[0],
            "logcumsumexp": lambda h: h.logcumsumexp(1),
            "mode": lambda h: h.mode(1, keepdim=True)[0],
            "sort": lambda h: h.sort(1)[0],
            "topk": lambda h: h.topk(5, 1)[0],
            "tril": lambda h: h.tril().amax(2, keepdim=True),
            "triu": lambda h: h.triu().amax(2, keepdim=True),
        }.items()
    ),
    case("signal", "unfold", lambda m, h: h.unfold(2, 3, 1).amax(3)),
]

_SPATIAL = [
    *(
        case(kind, name, lambda m, h, f=f: f(h))
        for kind, name, f in [
            ("signal", "max_pool", lambda h: F.max_pool1d(h, 2)),
            ("signal", "avg_pool", lambda h: F.avg_pool1d(h, 2)),
            ("signal", "reflection_pad1d", lambda h: F.pad(h, (1, 1), "reflect")),
            ("signal", "replication_pad1d", lambda h: F.pad(h, (1, 1), "replicate")),
            ("signal", "upsample_linear1d", lambda h: F.interpolate(h, scale_factor=2, mode="linear")),
            ("signal", "upsample_nearest1d", lambda h: F.interpolate(h, scale_factor=2)),
            (
                "signal",
                "_upsample_nearest_exact1d",
                lambda h: F.interpolate(h, scale_factor=2, mode="nearest-exact"),
            ),
            ("image", "_adaptive_avg_pool2d", lambda h: F.adaptive_avg_pool2d(h, 2)),
            ("image", "adaptive_max_pool2d", lambda h: F.adaptive_max_pool2d(h, 2)),
            ("image", "avg_pool2d", lambda h: F.avg_pool2d(h, 2)),
            ("image", "max_pool2d_with_indices", lambda h: F.max_pool2d(h, 2)),
            (
                "image",
                "pool positions",
                lambda h: F.max_pool2d(h, 2, return_indices=True)[1] * F.max_pool2d(h, 2),
            ),
            ("image", "reflection_pad2d", lambda h: F.pad(h, (1, 1, 1, 1), "reflect")),
            ("image", "replication_pad2d", lambda h: F.pad(h, (1, 1, 1, 1), "replicate")),
            ("image", "upsample_bicubic2d", lambda h: F.interpolate(h, size=(7, 7), mode="bicubic")),
            ("image", "upsample_bilinear2d", lambda h: F.interpolate(h, size=(7, 7), mode="bilinear")),
            ("image", "upsample_nearest2d", lambda h: F.interpolate(h, size=(7, 7))),
            (
                "image",
                "_upsample_nearest_exact2d",
                lambda h: F.interpolate(h, size=(7, 7), mode="nearest-exact"),
            ),
            (
                "image",
                "_upsample_bilinear2d_aa",
                lambda h: F.interpolate(h, size=(4, 4), mode="bilinear", antialias=True),
            ),
            (
                "image",
                "_upsample_bicubic2d_aa",
                lambda h: F.interpolate(h, size=(4, 4), mode="bicubic", antialias=True),
            ),
            (
                "image",
                "im2col col2im",
                lambda h: F.fold(F.unfold(h, 3, padding=1).relu(), (6, 6), 3, padding=1),
            ),
            ("volume", "_adaptive_avg_pool3d", lambda h: F.adaptive_avg_pool3d(h, 2)),
            ("volume", "adaptive_max_pool3d", lambda h: F.adaptive_max_pool3d(h, 2)),
            ("volume", "avg_pool3d", lambda h: F.avg_pool3d(h, 2)),
            ("volume", "max_pool3d_with_indices", lambda h: F.max_pool3d(h, 2)),
            ("volume", "reflection_pad3d", lambda h: F.pad(h, (1,) * 6, "reflect")),
            ("volume", "replication_pad3d", lambda h: F.pad(h, (1,) * 6, "replicate")),
            ("volume", "upsample_nearest3d", lambda h: F.interpolate(h, scale_factor=2)),
            (
                "volume",
                "_upsample_nearest_exact3d",
                lambda h: F.interpolate(h, scale_factor=2, mode="nearest-exact"),
            ),
            ("volume", "upsample_trilinear3d", lambda h: F.interpolate(h, scale_factor=2, mode="trilinear")),
            (
                "volume",
                "grid_sampler_3d",
                lambda h: F.grid_sample(h, h[:, :3].permute(0, 2, 3, 4, 1).tanh(), align_corners=False),
            ),
        ]
    ),
    case(
        "image",
        "upsampled table",
        lambda m, h: F.interpolate(h.mean((2, 3), keepdim=True) * m.w, size=(6, 6)),
        w=(1, 8, 3, 3),
    ),
    case("image", "im2col", lambda m, h: F.linear(F.unfold(h, 3).mT, m.w), 0, w=(3, 72)),
    case(
        "image",
        "grid_sampler_2d",
        lambda m, h: F.grid_sample(h, m.where(h).permute(0, 2, 3, 1).tanh(), align_corners=False),
        where=nn.Conv2d(8, 2, 1),
    ),
]

CASES: list[Case] = [*_REDUCE, *_SPATIAL]
