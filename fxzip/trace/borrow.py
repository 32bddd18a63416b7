"""One tensor for a model and its traced copy, so that a model is in memory once; and copies again, where one writes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from .state import state_by_all_names


def borrow(graph_module: fx.GraphModule, model: nn.Module) -> None:
    """The parameters of `graph_module` become views of `model`'s own wherever these are equal, bit for bit; whoever
    writes to one of them from then on writes to the model. Buffers stay copies: forward may write to one.

    >>> model = nn.Linear(2, 1); traced = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 1)))
    >>> traced.get_submodule("0").load_state_dict(model.state_dict()); borrow(traced, nn.Sequential(model))
    <All keys matched successfully>
    >>> traced.get_parameter("0.weight").data_ptr() == model.weight.data_ptr()
    True
    """
    lenders = state_by_all_names(model)
    _replace(graph_module, lambda name, tensor: _equal(lenders.get(name), tensor))


def own(graph_module: fx.GraphModule) -> None:
    """Every parameter of `graph_module` becomes a copy."""
    _replace(graph_module, lambda _, tensor: tensor.detach().clone())


def _equal(lender: Tensor | None, tensor: Tensor) -> Tensor:
    """The lender's values, if nothing tells them from the tensor's; else the tensor."""
    if type(lender) is not nn.Parameter or lender.is_meta or lender.is_inference():
        return tensor
    alike = (lender.shape, lender.dtype, lender.device) == (tensor.shape, tensor.dtype, tensor.device)
    alike = alike and lender.layout == tensor.layout == torch.strided
    return lender.detach() if alike and torch.equal(lender, tensor) else tensor


def _replace(graph_module: fx.GraphModule, new: Callable[[str, nn.Parameter], Tensor]) -> None:
    """What `new` makes of (name, parameter) in the place of each; a tied one stays tied."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for path, module in graph_module.named_modules():
        for key, parameter in module._parameters.items():
            if type(parameter) is not nn.Parameter:
                continue
            if parameter not in made:
                fresh = new(f"{path}.{key}".removeprefix("."), parameter)
                kept = fresh is parameter
                made[parameter] = parameter if kept else nn.Parameter(fresh, parameter.requires_grad)
            module._parameters[key] = made[parameter]
