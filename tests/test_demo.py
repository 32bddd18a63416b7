"""The demo: its data, its training, its table."""

import sys

import pytest
import torch
from test_cli import run

import fxzip
from fxzip import demo
from fxzip.errors import InputError


def test_digits_are_split_without_overlap():
    data = demo.digits(0)
    images = torch.cat([data.train[0], data.calibration, data.test[0]])
    assert [len(p) for p in (data.train[0], data.calibration, data.test[0])] == [800, 397, 600]
    assert abs(data.train[0].mean()) < 1e-5 and images.shape[1:] == (1, 8, 8)
    rows = {x.numpy().tobytes() for x in images}
    assert len(rows) == len(images)  # no image twice, so none in two parts
    assert not torch.equal(data.train[0], demo.digits(1).train[0])


def test_missing_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r'pip install "fxzip\[demo\]"'):
        demo.digits(0)


def test_training_learns_and_repeats():
    data, state = demo.digits(0), torch.get_rng_state()
    nets = [demo.train(data, demo.CLASSES[1], seed, 8, 12, False, "") for seed in (1, 1, 2)]
    assert torch.equal(state, torch.get_rng_state())
    own = demo._parent_row("b", 1, nets[0], data, 0.0).per_task
    assert own[0] is None and own[1] is not None and own[1] > 75  # chance is 20
    assert torch.equal(nets[0].head.weight, nets[1].head.weight)
    assert not torch.equal(nets[0].head.weight, nets[2].head.weight)


def test_demo_prints_every_network(capsys):
    code, out, _ = run(capsys, "demo", "-q", "--width", "4", "--epochs", "4")
    table, notes = out.split("\n\n")
    names = [line.split("  ")[0] for line in table.splitlines()[2:]]
    assert code == 0 and names[:4] == ["a (0-4)", "b (5-9)", "ensemble", "plain averaging"]
    assert set(fxzip.METHODS) - {"average"} <= set(names)
    assert all(f'{m}, until="{c}"' in names for m in ("permute", "zip") for c in demo.CUTS)
    assert "seed 0, width 4, 4 epochs" in notes and torch.__version__ in notes and "no label" in notes


def test_demo_rows_cost_what_they_should():
    rows = {row.name: row for row in demo.run(demo.digits(0), 0, 4, 2, False)}
    order = ("zip", 'zip, until="layer3"', 'zip, until="layer2"', "ensemble")
    flops = [rows[name].cost.flops for name in order]
    assert flops == sorted(flops) and len(set(flops)) == len(order)
    scores = [s for row in rows.values() for s in (*row.per_task, row.joint) if s is not None]
    assert all(0 <= s <= 100 for s in scores)
