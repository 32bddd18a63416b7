"""memory=: the same bytes with a cap as without, the cap holds, what cannot be held is refused beforehand."""

from __future__ import annotations

import hashlib
import logging
import os
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from toys import randomise

import fxzip
from fxzip import InputError, calibration, passes
from fxzip.measure.moments import Accumulator
from fxzip.memory import Store, _write, parsed, shown
from fxzip.passes import aside

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::fxzip.MergeWarning")
BATCHES = [torch.randn(48, 3, 16, 16, generator=torch.Generator().manual_seed(k)) for k in range(3)]


def net(*widths: int) -> nn.Module:
    a, b, c = widths or (24, 40, 16)
    return nn.Sequential(
        nn.Conv2d(3, a, 3, padding=1), nn.BatchNorm2d(a), nn.ReLU(), nn.Conv2d(a, b, 3, padding=1), nn.ReLU(),
        nn.Conv2d(b, c, 3, padding=1), nn.ReLU(), nn.AvgPool2d(16), nn.Flatten(), nn.Linear(c, 3),
    )  # fmt: skip


def nets(*widths: int) -> list[nn.Module]:
    return [randomise(net(), 0).eval(), randomise(net(*widths), 1).eval()]


def saved(folder: Path, **given) -> dict[str, str]:
    """SHA-256 of every file of the merge."""
    models = given.pop("models", None) or nets()
    fxzip.save(fxzip.merge(models, BATCHES, progress=False, verify=False, **given), folder)
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def least(method: str, models: list[nn.Module] | None = None) -> int:
    return fxzip.plan(models or nets(), BATCHES, method=method).least


@pytest.fixture
def runs(monkeypatch) -> list:
    """The spaces of every pass over the batches."""
    seen, measure = [], calibration.collect_moments

    def noted(*args, **given):
        seen.append(given["only"])
        return measure(*args, **given)

    monkeypatch.setattr(calibration, "collect_moments", noted)
    return seen


@pytest.mark.parametrize("method", ["zip", "solve", "unmerge"])
def test_the_same_bytes_with_a_cap_as_without(tmp_path, runs, method):
    plain = saved(tmp_path / "plain", method=method)
    assert runs == [None]
    cap = least("zip" if method != "unmerge" else method)
    cap = max(cap, least(method)) if method == "solve" else cap
    assert saved(tmp_path / "capped", method=method, memory=cap) == plain
    if method != "solve":  # whose fits take more than measuring all at once
        assert len(runs) > 2 and sorted(n for names in runs[1:] for n in names) == ["s0", "s1", "s2"]


def test_models_of_other_widths_and_weights(tmp_path):
    models = nets(32, 40, 24)
    given = {"models": models, "method": "zip", "model_weights": [0.7, 0.3]}
    assert saved(tmp_path / "a", **given) == saved(tmp_path / "b", memory=least("zip", models), **given)


def test_the_cap_holds(monkeypatch):
    live, most, add = weakref.WeakSet(), [0], Accumulator.add

    def counted(self, *args, **given):
        live.add(self)
        most[0] = max(most[0], sum(8 * a.gram.numel() for a in live))
        add(self, *args, **given)

    monkeypatch.setattr(Accumulator, "add", counted)
    cap = least("zip")
    graph = passes.start(nets(), BATCHES, progress=False)
    for stage in (passes.Infer(), passes.Cut(), passes.Read(), passes.Cap(cap), passes.Measure(), passes.Match()):
        graph = stage(graph).graph_module
    job = passes.job(graph)
    assert job.plan is not None and job.plan.spills and job.plan.measuring is not None
    by_name = {s.name: s.sums for s in job.plan.measuring.spaces}
    assert most[0] == max(sum(by_name[n] for n in names) for names in job.plan.passes) < job.plan.moments
    assert all(m.second.is_shared() for m in job.moments.values()), "in files"
    assert all(m.merge.is_shared() and m.unmerge.is_shared() for m in job.matchings.values())


def stages_until_solve() -> fx.GraphModule:
    graph = passes.start(nets(), BATCHES, progress=False)
    for stage in (passes.Infer(), passes.Cut(), passes.Read(), passes.Measure(), passes.Match(), passes.Average()):
        graph = stage(graph).graph_module
    return graph


def matrices(job: passes.Job) -> list[Tensor]:
    return [m.second for m in job.moments.values()] + [
        t for m in job.matchings.values() for t in (m.merge, m.unmerge)
    ]


def test_large_matrices_wait_in_files_while_layers_are_fitted(monkeypatch):
    """Moments and matchings of wide layers take as much as solve's activations, and nothing reads all of them then."""
    small, large = stages_until_solve(), stages_until_solve()
    small = passes.Solve()(small).graph_module
    assert not any(t.is_shared() for t in matrices(passes.job(small)))
    monkeypatch.setattr(aside, "LARGE", 0)
    large = passes.Solve()(large).graph_module
    pairs = zip(matrices(passes.job(small)), matrices(passes.job(large)), strict=True)
    assert all(b.is_shared() and torch.equal(a, b) for a, b in pairs)
    noted = [m for n in large.graph.nodes for m in n.meta["fxzip"]["matchings"].values()]
    assert noted and all(m.merge.is_shared() for m in noted)
    a, b = (passes.job(graph).shared for graph in (small, large))
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_matrices_stay_in_memory_where_there_is_no_room_for_files(monkeypatch, caplog):
    monkeypatch.setattr(aside, "LARGE", 0)
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    graph = stages_until_solve()
    with caplog.at_level(logging.INFO, logger="fxzip"):
        found = aside.set_aside(graph, passes.job(graph))
    assert not any(t.is_shared() for t in matrices(found))
    assert "solve keeps moments and matchings in memory: " in caplog.text and "/nowhere" in caplog.text


def test_with_room_for_all_nothing_goes_to_files(runs):
    found = fxzip.plan(nets(), BATCHES, method="zip", memory="1GB")
    assert (found.spills, len(found.passes), found.files) == (False, 1, 0)
    moments = fxzip.collect(nets(), BATCHES, progress=False, memory="1GB")
    assert runs == [None] and not any(m.second.is_shared() for m in moments.values())


def test_collect_and_frontier_take_it(runs):
    cap = least("zip")
    plain, capped = (fxzip.collect(nets(), BATCHES, progress=False, memory=m) for m in (None, cap))
    assert len(runs) > 2 and list(plain) == list(capped)
    assert all(torch.equal(plain[n].second, capped[n].second) for n in plain)
    before = len(runs)
    fxzip.frontier(nets(), BATCHES, [1.0], progress=False, method="zip", memory=cap, holdout=8,
                   verify=False)  # fmt: skip
    assert len(runs) > before + 1


def test_too_small_a_cap_is_refused_before_measuring(runs):
    for call in (partial(fxzip.merge, method="zip"), partial(fxzip.collect)):
        with pytest.raises(InputError) as error:
            call(nets(), BATCHES, progress=False, memory="2MB")
        size = shown(least("zip"))
        assert str(error.value) == (
            f"fxzip.{call.func.__name__}: memory=2MB is too little: measuring s1 (80 features of 2 models, of which the"
            f" activations of a batch {shown(2 * 48 * 40 * 256 * 4)}) takes {size}, and the least that would do is"
            f" memory={size!r}; smaller batches need less"
        )
    assert not runs


def test_a_fit_that_is_too_large_is_named():
    with pytest.raises(InputError, match=r"is too little: solving \(%\w+ has \d+ columns, .*does not solve$"):
        fxzip.plan(nets(), BATCHES, memory="6MB")


@pytest.mark.parametrize("stop", [1, 4])
def test_resume_goes_on_in_the_pass_where_it_was(tmp_path, monkeypatch, stop):
    from fxzip.measure.resume import Checkpoint

    cap = fxzip.plan(nets(), BATCHES, method="zip", resume=True).least
    given = {"method": "zip", "memory": cap, "resume": tmp_path / "kept"}
    plain, check, count = saved(tmp_path / "plain", method="zip"), Checkpoint.check, [0]

    def stopped(self, *args):
        count[0] += 1
        self.stopped = "SIGTERM" if count[0] == stop else ""
        check(self, *args)

    monkeypatch.setattr(Checkpoint, "check", stopped)
    with pytest.raises(fxzip.Interrupted, match=f"after {(stop - 1) % 3 + 1} of 3 batches"):
        saved(tmp_path / "no", **given)
    assert len(list((tmp_path / "kept").iterdir())) == (stop + 2) // 3, "a folder for each pass"
    assert saved(tmp_path / "again", **given) == plain
    assert count[0] == 3 * len(list((tmp_path / "kept").iterdir())), "no batch twice"


def test_the_plan_is_told(caplog):
    models = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, k)).eval() for k in (2, 3)]
    loader = [torch.randn(64, 4, generator=torch.Generator().manual_seed(0))]
    said = """zip of 2 models, no cap
  there in any case  models 500B, calibration inputs 1.03KB, result about 340B
  measure            1 space in 1 pass: moments 2.05KB, of s0 2.05KB (16 features); rows of a batch 5.12KB, activations 4.1KB
  match              matrices 2.05KB, at work 7.38KB
  memory=            56.4KB at least, 56.4KB without files"""  # noqa: E501
    with caplog.at_level(logging.INFO, "fxzip"):
        fxzip.merge(models, loader, method="zip", progress=False)
    assert [str(r.getMessage()) for r in caplog.records if "models" in r.getMessage()] == [said]
    assert str(fxzip.plan(models, loader, method="zip")) == said


@pytest.mark.parametrize(
    ("given", "value"),
    [("4GB", 4 * 10**9), ("512mb", 512 * 10**6), (" 1.5 GiB ", 3 * 2**29), ("100", 100), (7e9, 7 * 10**9)],
)
def test_sizes(given, value):
    assert parsed(given) == value


@pytest.mark.parametrize("given", ["4 gigs", "", "-1GB", "0", 0, -5, True, float("nan"), float("inf"), [1], "1e9"])
def test_what_is_no_size_is_refused_with_all_else_that_is_wrong(given):
    text = f"memory must be a number of bytes or a text such as '4GB' or '512MB', got {given!r}"
    with pytest.raises(InputError) as error:
        fxzip.merge(nets(), BATCHES, method="zipp", memory=given)
    assert text in str(error.value) and "unknown method 'zipp'" in str(error.value)


@pytest.mark.parametrize(
    "value",
    [torch.zeros(70, 90), torch.eye(1100, dtype=torch.float64), torch.randn(5, 7).T, torch.tensor(3.0),
     torch.randn(9).bfloat16(), torch.tensor([True, False]), torch.randn(4, dtype=torch.complex64)],
    ids=lambda t: f"{tuple(t.shape)}-{t.dtype}",
)  # fmt: skip
@pytest.mark.parametrize("sparse", [False, True])
def test_the_store_gives_back_what_it_got(value: Tensor, sparse: bool):
    store = Store(0, sparse)
    kept = store.keep((value, 1))[0]
    assert torch.equal(kept, value) and kept.dtype == value.dtype and kept.is_shared()
    assert store.mapped == value.numel() * value.element_size() and Store(1e9).keep(value) is value


@pytest.mark.skipif(os.name != "posix", reason="a limit of the size of files")
def test_what_goes_to_a_file_lies_there_as_it_did_in_memory():
    """Kernels choose their way, and so their rounding, by strides: a cap may not change them."""
    value = torch.randn(2, 3, 4, 5)
    for laid in (value, value.permute(0, 2, 3, 1), value.mT, value.to(memory_format=torch.channels_last), value[:, 1:]):
        kept = Store(0).keep(laid)
        assert torch.equal(kept, laid) and kept.is_shared()
        dense = laid.is_contiguous() or laid.numel() == value.numel()
        assert kept.stride() == (laid.stride() if dense else laid.contiguous().stride())


def test_a_value_takes_the_place_of_one_that_nobody_will_read():
    """Of a file of its own only, of the same size, and not where it lies itself."""
    store, x = Store(0), torch.arange(24.0).reshape(2, 3, 4)
    first = store.keep(x)
    place = first.data_ptr()
    second = store.keep((x + 1).mT, [None, 3, first])
    assert second.data_ptr() == place and torch.equal(second, (x + 1).mT) and second.stride() == x.mT.stride()
    assert store.keep(x.double(), [second]).data_ptr() != place, "of another size"
    assert store.keep(second.mT, [second]).data_ptr() != place, "the same bytes"
    shared = x.clone().share_memory_()  # as workers of a DataLoader give batches
    assert store.keep(x + 2, [shared]).data_ptr() != shared.data_ptr() and torch.equal(shared, x)
    roomy = Store(1e9)
    assert roomy.keep(x, [second]) is x
    assert torch.equal(second, (x + 1).mT)


def test_a_full_disk_is_an_error_and_not_a_crash():
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(InputError, match=r"^40KB for which memory has no room cannot be written below .*TMPDIR"):
            Store(0).keep(torch.ones(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_zeros_take_no_room_on_disk(tmp_path):
    path, sparse = tmp_path / "values", torch.eye(1100, dtype=torch.float64)
    _write(str(path), sparse.flatten().view(torch.uint8).numpy(), sparse=True)
    assert path.read_bytes() == sparse.numpy().tobytes()
    with open(tmp_path / "holes", "wb") as file:
        file.truncate(1 << 20)
    if (tmp_path / "holes").stat().st_blocks == 0:
        assert 512 * path.stat().st_blocks < 0.6 * path.stat().st_size
