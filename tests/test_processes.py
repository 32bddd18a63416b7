"""Several gloo processes make the network that one makes; what goes wrong in one is said in all."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import nn
from toys import randomise

import fxzip
from fxzip import InputError, cli
from fxzip.processes import SMALL, Processes, _joined
from fxzip.solve import Settings, Solve

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)
pytestmark = [
    pytest.mark.filterwarnings("ignore::fxzip.MergeWarning"),
    pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed"),
]
SHAPE = (3, 18, 18)  # more pixels than are sampled: the draws have to agree
DATA = [torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(n)) for n in (99, 100, 60)]
SOLVE = Solve(settings=Settings(least=256, rows=1))
MERGES = {"zip": {"method": "zip"}, "solve": {"method": SOLVE}, "stems": {"method": SOLVE, "since": "3"}}


def nets(seed: int = 0) -> list[nn.Module]:
    def net() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.GELU(),
            nn.GroupNorm(2, 8), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.AvgPool2d(14), nn.Flatten(), nn.Linear(6, 3),
        )  # fmt: skip

    return [randomise(net(), seed + k).eval() for k in range(2)]


def results(distributed: bool, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for name, options in MERGES.items():
        zipped = fxzip.merge(nets(), DATA, verify=False, progress=False, distributed=distributed, **options)
        found[name] = dict(zipped.state_dict())
    moments = fxzip.collect(nets(), DATA, progress=False, distributed=distributed, resume=folder)
    cap = fxzip.plan(nets(), DATA, method="zip").least
    capped = fxzip.collect(nets(), DATA, progress=False, distributed=distributed, memory=cap)
    both = {"moments": moments, "capped": capped}
    return found | {k: {n: m.second.clone() for n, m in each.items()} for k, each in both.items()}


def refusals(rank: int) -> list[str]:
    """What an overflow in one rank's batch, and batches of its own, come to in this rank."""
    said = []
    bad = [x.clone() for x in DATA[:2]]
    bad[1][0, 0, 0, 0] = 3e38
    for batches in (bad, [x + rank for x in DATA]):
        try:
            fxzip.merge(nets(), batches, method="zip", verify=False, progress=False, distributed=True)
        except InputError as error:
            said.append(str(error))
    return said


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    kept = Path(folder) / "kept"
    torch.save((results(True, kept), refusals(rank)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_make_what_one_makes(tmp_path):
    mp.spawn(work, (2, str(tmp_path)), nprocs=2)  # type: ignore[attr-defined]
    one = results(False, tmp_path / "one")
    (first, said), (second, heard) = (torch.load(tmp_path / f"{r}.pt") for r in (0, 1))
    for name, tensors in one.items():
        for key, value in tensors.items():
            torch.testing.assert_close(first[name][key], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
            assert torch.equal(first[name][key], second[name][key]), "all ranks have the same bytes"
    assert all(torch.equal(one["capped"][n], second) for n, second in one["moments"].items())
    assert {p.name for p in (tmp_path / "kept").iterdir()} == {"rank0of2", "rank1of2"}
    assert said[0] == "rank 1: " + heard[0] and "model 0 yields NaN or Inf at %" in heard[0]
    assert said[1] == heard[1] and said[1].startswith("rank 1 has other batches than rank 0: give every rank the same")


def test_torchrun(place):
    """The command line under torchrun: rank 0 writes what one process writes."""
    merge = ["merge", "recipe.yaml", "--trust-code"]
    launch = ["torch.distributed.run", "--nproc-per-node=2", f"--rdzv-endpoint=localhost:{_free_port()}", "-m", "fxzip"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", *launch, *merge, "two"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote two:") == 1
    assert cli.main([*merge, "one"]) == 0
    one, two = (load_file(place / d / "model.safetensors") for d in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-5)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def test_without_a_group_it_is_refused():
    for wrong, text in ((True, "needs torch.distributed.init_process_group"), ("gloo", "must be True, False or a")):
        for call in (fxzip.merge, fxzip.collect):
            with pytest.raises(InputError, match=text):
                call(nets(), DATA, distributed=wrong)
        with pytest.raises(InputError, match=text):
            Processes.of(wrong)


@pytest.mark.parametrize("total", [0, 1, 7])
def test_every_item_is_dealt_once(total):
    ranks = [Processes(r, 3) for r in range(3)]
    assert [sum(p.mine(k) for p in ranks) for k in range(total)] == [1] * total
    assert [p.count(total) for p in ranks] == [sum(p.mine(k) for k in range(total)) for p in ranks]


def test_small_tensors_of_a_kind_are_summed_in_one_message():
    small, other, large = torch.zeros(2, 3), torch.zeros(()), torch.zeros(SMALL + 1)
    whole = torch.zeros(1, dtype=torch.int64)
    found = _joined((small, large, whole, other))
    assert [[id(t) for t in alike] for alike in found] == [[id(small), id(other)], [id(large)], [id(whole)]]
