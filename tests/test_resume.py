"""Long runs: what was measured survives signals, kills and full disks, and goes on to the same bytes."""

from __future__ import annotations

import os
import signal
import warnings

import pytest
import torch
from killing import BATCHES, damaged, digest, job, killed_after, nets, refused

import fxzip
from fxzip import InputError
from fxzip.measure import resume
from fxzip.measure.resume import FILE, Checkpoint

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::fxzip.MergeWarning")
posix = pytest.mark.skipif(os.name != "posix", reason="needs fork and kill")


@pytest.fixture(scope="module")
def whole() -> str:
    """The bytes of a merge that nothing disturbed, and that keeps nothing."""
    return job(None)


@pytest.fixture
def stop(monkeypatch):
    """stop(number, batch): that signal comes while that batch is measured."""
    check = Checkpoint.check

    def at(number: int, batch: int) -> None:
        def interrupted(self, done, of, sums, generator):
            if done == batch:
                os.kill(os.getpid(), number)
            check(self, done, of, sums, generator)

        monkeypatch.setattr(Checkpoint, "check", interrupted)

    yield at
    monkeypatch.setattr(Checkpoint, "check", check)


@posix
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_leaves_what_can_be_resumed(tmp_path, whole, stop, name):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    stop(getattr(signal, name), 23)
    with pytest.raises(fxzip.Interrupted) as error:
        job(tmp_path)
    assert str(error.value) == (
        f"stopped by {name} after 23 of 40 batches; what was measured is kept:"
        f" the same call with resume={str(tmp_path)!r} goes on from there"
    )
    assert isinstance(error.value, KeyboardInterrupt)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    assert [p.name for p in tmp_path.iterdir()] == [FILE]
    stop(0, 10**9)
    assert job(tmp_path) == whole
    assert job(tmp_path) == whole, "and once more, with nothing left to measure"


@posix
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_kill_9_at_any_moment(tmp_path, whole, share):
    import time

    start = time.monotonic()
    assert job(tmp_path / "timed") == whole
    seconds, tries = share * (time.monotonic() - start), 0
    while not killed_after(seconds, tmp_path / str(tries)):  # the machine has less to do than before
        seconds, tries = seconds / 2, tries + 1
    assert job(tmp_path / str(tries)) == whole


def test_without_signals_nothing_changes(tmp_path, whole):
    assert job(tmp_path) == whole


def test_other_statistics_are_refused(tmp_path, monkeypatch):
    job(tmp_path)
    other = nets()
    with torch.no_grad():
        other[0][0].weight[0, 0, 0, 0] += 1e-3
    changed = nets()  # of the same weights
    for net in changed:
        net[1] = torch.nn.Tanh()
    calls = [(other, BATCHES, {}), (changed, BATCHES, {}), (nets(), BATCHES[1:], {}), (nets(), BATCHES, {"seed": 1})]
    for models, batches, options in calls:
        with pytest.raises(InputError, match="was measured with other models, batches, seed, calibration or versions"):
            fxzip.merge(models, batches, method="zip", progress=False, resume=tmp_path, **options)
    monkeypatch.setattr("fxzip.calibration.installed", lambda: "0.0.1")
    with pytest.raises(InputError, match="versions of fxzip and torch"):
        job(tmp_path)


def test_a_damaged_file_is_refused(tmp_path):
    job(tmp_path)
    for data in damaged((tmp_path / FILE).read_bytes(), 60):
        (tmp_path / FILE).write_bytes(data)
        assert refused(tmp_path)
    with pytest.raises(InputError, match="resume: .* is damaged"):
        job(tmp_path)


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file: give a folder"):
        job(tmp_path / "file")
    with pytest.raises(InputError, match="cannot be written"):
        job(tmp_path / "file" / "inside")
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / FILE).write_bytes(b"something of mine")
    with pytest.raises(InputError, match="damaged"):
        job(tmp_path)
    assert (tmp_path / FILE).read_bytes() == b"something of mine"


def test_a_full_disk_costs_nothing_but_a_warning(tmp_path, whole, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    job(tmp_path)
    kept = (tmp_path / FILE).read_bytes()
    monkeypatch.setattr(resume, "save_file", full)
    with pytest.warns(RuntimeWarning, match="nothing was written to .* No space left on device"):
        assert job(tmp_path / "new") == whole
    assert not list((tmp_path / "new").iterdir()) and (tmp_path / FILE).read_bytes() == kept


def test_collect_resumes_too(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = fxzip.collect(nets(), BATCHES, progress=False, resume=tmp_path)
        again = fxzip.collect(nets(), BATCHES, progress=False, resume=tmp_path)
    assert all(torch.equal(first[n].second, again[n].second) and first[n].count == again[n].count for n in first)
    assert digest(fxzip.merge(nets(), BATCHES, moments=first, method="zip", progress=False)) == job(None)
