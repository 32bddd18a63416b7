"""What bad_inputs.py does to a good network before it gives it to `merge`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def hooked(model: nn.Module) -> None:
    model.fc1.register_forward_hook(lambda module, args, output: 2 * output)


def buffer_hook(model: nn.Module) -> None:
    model.register_forward_pre_hook(lambda module, args: tuple(a + 1 for a in args))


def recording_hook(model: nn.Module) -> None:
    model.fc1.register_forward_hook(lambda *_: None)


def fill(name: str, value: float) -> Callable[[nn.Module], None]:
    def spoil(model: nn.Module) -> None:
        model.get_parameter(name).view(-1)[0] = value

    return spoil


def variance(model: nn.Module, value: float) -> None:
    model.norm.running_var.fill_(value)


def zeroed(model: nn.Module) -> None:
    for p in model.parameters():
        p.zero_()


def quantised(model: nn.Module) -> nn.Module:
    from torch.ao.quantization import quantize_dynamic

    return quantize_dynamic(model, {nn.Linear})


def complex_weights(model: nn.Module) -> nn.Module:
    return model.to(torch.complex64)


def frozen(model: nn.Module) -> None:
    for p in model.parameters():
        p.requires_grad_(False)


def grown(model: nn.Module) -> None:
    model.fc1, model.head = nn.Linear(6, 10), nn.Linear(10, 3)


def half_meta(model: nn.Module) -> None:
    model.head.to("meta")


def on_meta(model: nn.Module) -> nn.Module:
    return model.to("meta")


def to(dtype: torch.dtype) -> Callable[[nn.Module], nn.Module]:
    return lambda model: model.to(dtype)


def weight_normed(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model.fc1)


def old_weight_norm(model: nn.Module) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model.fc1)


class Noise(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.randn_like(weight)


class Fails(nn.Module):
    """Works while it is registered, no more once the model is in eval mode."""

    def forward(self, weight: Tensor) -> Tensor:
        if not self.training:
            raise ValueError("no such weight")
        return weight


def noisy_weight(model: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(model.fc1, "weight", Noise())


def failing_weight(model: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(model.fc1, "weight", Fails())


def pruned(model: nn.Module) -> None:
    from torch.nn.utils import prune

    prune.l1_unstructured(model.fc1, "weight", 0.5)


def other_order(model: nn.Module) -> nn.Module:
    return nn.Sequential(model.fc1, nn.Tanh(), model.head)


def sharded(model: nn.Module) -> nn.Module:
    """A DTensor in place of a weight: what FSDP2 leaves."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model.fc1.weight = nn.Parameter(distribute_tensor(model.fc1.weight.detach(), mesh, [Shard(0)]))
    return model
