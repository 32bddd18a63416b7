"""What comes out of a merge goes into the user's world: compilers, exporters, quantisers, wrappers, training.

Every test runs the merged network both ways and compares numbers. Those that wait for a compiler are slow.
"""

from __future__ import annotations

import copy
import importlib
import io
import os
import pickle
import shutil
from typing import Any

import pytest
import torch
from file_nets import IMAGES, by_task
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from toy_attention import VisionTransformer
from toys import randomise

import fxzip

torch.set_num_threads(1)
PIXELS = torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(1))
BATCH = torch.export.Dim("batch", min=2)


def made(net: Any, batch: Tensor, **options: Any) -> fx.GraphModule:
    """Two networks of a kind, merged."""
    models = [randomise(net(task), seed) for seed, task in enumerate(("cats", "big-dogs"), 1)]
    named = dict(zip(("cats", "big-dogs"), models, strict=True))
    return fxzip.merge(named if options.pop("keyed", False) else models, [batch], progress=False, **options)


NETWORKS = {
    "conv": (lambda: made(by_task, IMAGES, keyed=True), IMAGES),  # heads of different widths, a dict comes out
    "cut": (lambda: made(by_task, IMAGES, method="zip", until="norm2"), IMAGES),  # unmerges are modules
    "vit": (lambda: made(lambda _: VisionTransformer(), PIXELS), PIXELS[:8]),
}
SKIPPED = "not installed"


@pytest.fixture(scope="module", params=NETWORKS)
def case(request: Any) -> tuple[fx.GraphModule, Tensor]:
    merge, x = NETWORKS[request.param]
    return merge(), x


def outputs(network: Any, *x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return tree_leaves(network(*x))


def agree(found: Any, wanted: list[Tensor], tolerance: float = 1e-5) -> None:
    """Equal within `tolerance` of the largest value, and not because nothing is there."""
    found = tree_leaves(found)
    assert len(found) == len(wanted) == 2
    for a, b in zip(found, wanted, strict=True):
        a, b = torch.as_tensor(a).detach(), b.detach()
        assert a.shape == b.shape and float(b.std()) > 1e-3
        assert float((a.float() - b.float()).abs().max()) <= tolerance * float(b.float().abs().max())


# ------------------------------------------------------------------------------------------- copies, wrappers


def test_deepcopy_and_pickle_compute_the_same(case):
    zipped, x = case
    buffer = io.BytesIO()
    torch.save(zipped, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(zipped), pickle.loads(pickle.dumps(zipped)), torch.load(buffer, weights_only=False)):
        agree(twin(x), outputs(zipped, x), 0)
        assert str(fxzip.report(twin)) == str(fxzip.report(zipped))
        with torch.no_grad():
            next(twin.parameters()).add_(1)
        assert not torch.equal(next(twin.parameters()), next(zipped.parameters()))


def test_state_dict_round_trip(case):
    zipped, x = case
    twin = copy.deepcopy(zipped)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(zipped.state_dict(), strict=True)
    agree(twin(x), outputs(zipped, x), 0)


def test_other_dtypes(case):
    zipped, x = case
    agree(copy.deepcopy(zipped).double()(x.double()), outputs(zipped, x), 1e-5)
    agree(copy.deepcopy(zipped).to(torch.bfloat16)(x.bfloat16()), outputs(zipped, x), 0.05)


@pytest.mark.parametrize("size", [1, 3, 19])
def test_other_batch_sizes(case, size):
    zipped, x = case
    more = x.repeat(3, 1, 1, 1)[:size]
    agree(zipped(more), [y[torch.arange(size) % len(x)] for y in outputs(zipped, x)], 1e-5)


def test_other_image_sizes():
    zipped, x = NETWORKS["cut"][0](), IMAGES
    tall = torch.cat([x, x.flip(2)], 2)
    first = fxzip.extract(zipped, 0)
    assert torch.allclose(zipped(tall)[0], first(tall), atol=1e-6) and zipped(tall)[0].shape == zipped(x)[0].shape


def test_fx_retracing(case):
    zipped, x = case
    again = fx.symbolic_trace(zipped)
    again.graph.eliminate_dead_code()
    again.recompile()
    agree(again(x), outputs(zipped, x), 0)
    again.graph.lint()


def test_functional_call_and_vmap_over_weights(case):
    zipped, x = case
    state = {n: t.detach() for n, t in {**dict(zipped.named_parameters()), **dict(zipped.named_buffers())}.items()}
    agree(torch.func.functional_call(zipped, state, (x,)), outputs(zipped, x), 0)
    doubled = {n: 2 * t if n.split(".")[-1] == "bias" else t for n, t in state.items()}
    moved = tree_leaves(torch.func.functional_call(zipped, doubled, (x,)))
    assert not torch.allclose(moved[0], outputs(zipped, x)[0], atol=1e-4)
    both = {n: torch.stack([t, doubled[n]]) for n, t in state.items()}
    stacked = tree_leaves(torch.func.vmap(lambda s: torch.func.functional_call(zipped, s, (x,)))(both))
    agree([y[0] for y in stacked], outputs(zipped, x))
    agree([y[1] for y in stacked], moved)


def test_fine_tuning_steps_lower_the_loss(case):
    zipped, x = copy.deepcopy(case[0]), case[1]
    labels = [torch.arange(len(x)) % y.shape[1] for y in outputs(zipped, x)]
    optimiser = torch.optim.AdamW(zipped.parameters(), 1e-3)
    losses = []
    for _ in range(4):
        pairs = zip(tree_leaves(zipped.train()(x)), labels, strict=True)
        loss = sum((nn.functional.cross_entropy(y, t) for y, t in pairs), torch.zeros(()))
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in zipped.parameters() if p.requires_grad)
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_distributed_data_parallel(case, tmp_path):
    zipped, x = copy.deepcopy(case[0]), case[1]
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(zipped)
        agree(wrapped(x), outputs(case[0], x), 1e-6)
        sum((y.square().mean() for y in tree_leaves(wrapped(x))), torch.zeros(())).backward()
        assert all(p.grad is not None for p in zipped.parameters() if p.requires_grad)
    finally:
        torch.distributed.destroy_process_group()


# --------------------------------------------------------------------------------------- compilers, exporters


def test_compiled_graphs_without_a_compiler(case):
    zipped, x = case
    torch.compiler.reset()
    agree(torch.compile(zipped, backend="aot_eager", fullgraph=True)(x), outputs(zipped, x), 1e-5)


@pytest.mark.slow
def test_inductor(case):
    zipped, x = case
    if not (shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")):
        pytest.skip("no C++ compiler")
    torch.compiler.reset()
    compiled = torch.compile(zipped, fullgraph=True, dynamic=True)
    agree(compiled(x), outputs(zipped, x), 1e-4)
    agree(compiled(x[:3]), outputs(zipped, x[:3]), 1e-4)


def test_export_to_pt2_and_back(case, tmp_path):
    zipped, x = case
    program = torch.export.export(zipped, (x,), dynamic_shapes=({0: BATCH},), strict=False)
    torch.export.save(program, tmp_path / "a.pt2")
    again = torch.export.load(tmp_path / "a.pt2").module()
    agree(again(x), outputs(zipped, x), 1e-5)
    agree(again(x[:3]), outputs(zipped, x[:3]), 1e-5)


def test_saved_pt2_runs_alone(case, tmp_path):
    zipped, x = case
    fxzip.save(zipped, tmp_path, pt2=True)
    again = torch.export.load(tmp_path / "model.pt2").module()
    agree(again(x), outputs(zipped, x), 1e-4)
    agree(again(x[:3]), outputs(zipped, x[:3]), 1e-4)
    first = (tmp_path / "model.pt2").stat().st_size
    fxzip.save(zipped, tmp_path, pt2=True)
    assert (tmp_path / "model.pt2").stat().st_size == first


@pytest.mark.slow
def test_ahead_of_time_inductor(case, tmp_path):
    zipped, x = case
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler")
    program = torch.export.export(zipped, (x,), dynamic_shapes=({0: BATCH},), strict=False)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "a.pt2"))
    loaded = torch._inductor.aoti_load_package(path)
    agree(loaded(x), outputs(zipped, x), 1e-4)
    agree(loaded(x[:3]), outputs(zipped, x[:3]), 1e-4)


@pytest.mark.slow
def test_onnx_runtime(case, tmp_path):
    zipped, x = case
    pytest.importorskip("onnxscript", reason=SKIPPED)
    runtime = pytest.importorskip("onnxruntime", reason=SKIPPED)
    path = str(tmp_path / "a.onnx")
    torch.onnx.export(zipped, (x,), path, dynamic_shapes=({0: BATCH},), dynamo=True, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for batch in (x, x[:3]):
        agree(session.run(None, {name: batch.numpy()}), outputs(zipped, batch), 1e-4)


@pytest.mark.slow
def test_int8_by_pt2e_loses_no_more_than_one_network_does(case):
    pytest.importorskip("torchao", reason=SKIPPED)
    zipped, x = case
    alone = [fxzip.extract(zipped, task) for task in range(2)]
    lost = [apart(int8(network, x), outputs(network, x))[0] for network in alone]
    for merged, single in zip(apart(int8(zipped, x), outputs(zipped, x)), lost, strict=True):
        assert 0 < merged < 1.5 * single + 0.01 and single < 0.3


def int8(network: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs after static quantisation, as Inductor's x86 kernels would compute them."""
    steps = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    x86 = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    quantiser = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    program = torch.export.export(network, (x,), strict=True).module()  # partitions of others torchao refuses
    observed = steps.prepare_pt2e(program, quantiser)
    observed(x)
    converted = steps.convert_pt2e(observed)
    assert any("quantize" in str(n.target) for n in converted.graph.nodes)
    return outputs(converted, x)


def apart(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True)]
