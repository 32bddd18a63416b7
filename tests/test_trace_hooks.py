"""Wrappers and hooks: what only looks on is left out with a notice, all else is refused."""

import pytest
import torch
from helpers import unchanged
from test_trace import IMAGES, Net
from torch import nn
from torch.nn.utils import prune

from fxzip.errors import TraceError
from fxzip.trace import trace

torch.set_num_threads(1)


def test_wrappers_are_unwrapped_with_a_notice():
    for wrapped, kind in [
        (nn.DataParallel(Net()), "DataParallel"),
        (torch.compile(Net()), "OptimizedModule"),
        (nn.DataParallel(torch.compile(Net())), "DataParallel"),
    ]:
        traced = trace(wrapped, IMAGES)
        assert traced.notices[0].startswith(f"unwrapped {kind}: the merge sees the ")
        assert "conv.weight" in traced.graph_module.state_dict()


def hook(*args):
    return None


def doubles(module, args, output):
    return 2 * output


def writes(module, args, output):
    output.mul_(2)


def hides(module, args, output):
    output.data.mul_(2)  # no version counter moves


def replaces(module, args, kwargs, output):
    module.weight = nn.Parameter(2 * module.weight)


REFUSED = {
    "conv has a forward hook that returns a value: remove it before merging (handle.remove(), or model.conv._forward_h":
        lambda m: m.conv.register_forward_hook(doubles),
    "head has a forward hook that writes to what is passed to it: remove it": lambda m: (
        m.head.register_forward_hook(writes)
    ),
    "the output depends on what a forward hook of head writes down: remove it": lambda m: (
        m.head.register_forward_hook(hides)
    ),
    "head has a forward hook that sets head.weight: remove it": lambda m: (
        m.head.register_forward_hook(replaces, with_kwargs=True)
    ),
    "the model has a forward pre-hook that returns a value: remove it": lambda m: (
        m.register_forward_pre_hook(lambda m, args: args)
    ),
    "bn has a backward hook: remove it": lambda m: m.bn.register_full_backward_hook(hook),
    "the model has a backward pre-hook: remove it": lambda m: m.register_full_backward_pre_hook(hook),
    "head.bias is pruned by a mask: make it plain before merging": lambda m: prune.random_unstructured(
        m.head, "bias", 1
    ),
    "(torch.nn.utils.prune.remove(head, 'bias'))": lambda m: prune.random_unstructured(m.head, "bias", 1),
    "head has uninitialised parameters: run one forward pass first": lambda m: setattr(
        m, "head", nn.LazyLinear(2)
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_trace_would_drop_is_refused(message):
    model = Net()
    REFUSED[message](model)
    with pytest.raises(TraceError) as error:
        trace(model, IMAGES)
    assert message in str(error.value)


def test_every_hook_is_listed():
    model = Net()
    model.conv.register_forward_hook(doubles)
    model.head.register_forward_hook(doubles)
    with pytest.raises(TraceError, match="conv has a forward hook.*; head has a forward hook"):
        trace(model, IMAGES)


def test_hooks_that_only_look_on_are_left_out():
    seen, model = [], Net()
    model.conv.register_forward_hook(lambda m, args, output: seen.append(output.mean()))
    model.head.register_forward_pre_hook(lambda m, args: None)
    with unchanged(model):
        traced = trace(model, IMAGES)
    notice = "left out 2 hooks that only look on: a forward hook of conv, a forward pre-hook of head"
    assert traced.notices == (notice,)
    calls = len(seen)
    assert torch.equal(traced.graph_module(IMAGES), model.eval()(IMAGES)) and len(seen) == calls + 1


def test_compiled_in_place_traces():
    model = Net()
    model.compile()
    assert trace(model, IMAGES).rung == "symbolic"
