"""What is not kept: views, parts of tuples and batch norms are made at each reading, and change no byte."""

from __future__ import annotations

import copy
import hashlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from toys import randomise

import fxzip
from fxzip import solve
from fxzip.memory import Store
from fxzip.solve.lanes import dynamic_nodes
from fxzip.solve.passing import passing_nodes, readers
from fxzip.trace import lower

X = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore::fxzip.MergeWarning")


class Passes(nn.Module):
    """A batch norm with one reader and one with two, views, and a split whose parts are read apart."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.conv, self.two = nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.norm, self.wide, self.back = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(12, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(self.stem(x)))
        y = self.two(self.conv(x))
        x = (x + y * torch.sigmoid(y)).permute(0, 2, 3, 1)
        a, b = self.wide(self.norm(x)).chunk(2, -1)
        return self.head((x + self.back(a * torch.sigmoid(b))).mean((1, 2)))


def graph() -> tuple[dict[str, fx.Node], dict[str, str]]:
    dynamic = dynamic_nodes(lower(fx.symbolic_trace(randomise(Passes()).eval()), (X[:2],)))
    return dynamic, passing_nodes(dynamic)


def test_what_passes_is_cheap_and_reads_one_value():
    dynamic, passing = graph()
    assert {n.rsplit("_", 1)[0] if n[-1].isdigit() else n for n in passing} == {
        "native_batch_norm_default", "getitem", "permute_default", "split_tensor",
    }  # fmt: skip
    assert all([i.name for i in dynamic[n].all_input_nodes if i.name in dynamic] == [o] for n, o in passing.items())


def test_readers_are_found_through_what_passes():
    dynamic, passing = graph()
    convolutions = [n for n in dynamic if n.startswith("convolution")]
    found = [{r.split("_")[0] for r in readers(n, dynamic, passing)} for n in convolutions]
    assert found == [{"relu"}, {"mul", "sigmoid"}]


@pytest.mark.parametrize("room", [0, 100_000])
def test_files_change_no_byte(monkeypatch, room):
    models = [randomise(Passes(), k).eval() for k in (0, 1)]

    def merged() -> str:
        zipped = fxzip.merge(models, [X], progress=False, calibration=48)
        whole = b"".join(t.contiguous().numpy().tobytes() for t in zipped.state_dict().values())
        return hashlib.sha256(whole).hexdigest()

    plain = merged()
    stores: list[Store] = []
    monkeypatch.setattr(solve, "Store", lambda _: stores.append(Store(room)) or stores[-1])
    assert merged() == plain and stores[0].mapped


def test_nothing_that_passes_is_kept(monkeypatch):
    """Two values of a convolution, its norm and the ReLU behind it, where there were four."""
    kept: list[int] = []

    class Counted(Store):
        def keep(self, value, over=()):
            kept.append(1)
            return super().keep(value, over)

    monkeypatch.setattr(solve, "Store", Counted)
    layers = (nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2))
    models = [randomise(copy.deepcopy(nn.Sequential(*layers)), k).eval() for k in (0, 1)]
    method = fxzip.Solve(fxzip.Permute(), fxzip.solve.Settings(sweeps=0))
    fxzip.merge(models, [X], method=method, progress=False, calibration=48, verify=False)
    parents_and_merged, parents_and_heads = 3, 4
    assert len(kept) == 2 * parents_and_merged + parents_and_heads, "convolution and ReLU; the linear layer"
