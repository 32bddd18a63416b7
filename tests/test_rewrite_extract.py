"""What is read off a merged network: one task's own, and its report."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from rewrite_nets import Residual, X, close, permuted_pair, zipped_of
from torch import fx, nn

from fxzip.errors import InputError
from fxzip.report import Report, Size, SpaceRow, report
from fxzip.rewrite import extract
from fxzip.trace import state_by_all_names

torch.set_num_threads(1)
pair = pytest.fixture(scope="module")(permuted_pair)


def test_extract_loads_strictly_into_the_users_class(pair):
    model, twin, spaces, matchings = pair
    twin = copy.deepcopy(twin)
    nn.init.normal_(twin.aux.weight)
    zipped, _ = zipped_of((model, twin), spaces, matchings, X)
    for i, (task, source) in enumerate((("a", model), ("b", twin))):
        single = extract(zipped, task)
        fresh = Residual()
        fresh.load_state_dict(single.state_dict(), strict=True)
        close(fresh.eval()(X), zipped(X)[i])
        close(single(X), zipped(X)[i], 0)
        assert torch.equal(fresh.aux.weight, source.aux.weight)
        assert "fc" in [n.name for n in single.graph.nodes] and not single.training
        shared = {t.data_ptr() for t in state_by_all_names(single).values()} & {
            t.data_ptr() for t in state_by_all_names(zipped).values()
        }
        assert not shared


def test_what_only_one_model_has_beside_its_graph_is_its_own(pair):
    model, twin, spaces, matchings = pair
    model, twin = copy.deepcopy(model), copy.deepcopy(twin)
    del model.aux
    twin.register_buffer("seen", torch.tensor(5))
    zipped, _ = zipped_of((model, twin), spaces, matchings, X)
    kept = [extract(zipped, task).state_dict() for task in "ab"]
    assert [k.keys() for k in kept] == [m.state_dict().keys() for m in (model, twin)]
    assert torch.equal(kept[1]["aux.weight"], twin.aux.weight) and kept[1]["seen"] == 5


def test_extract_drops_the_other_task(pair):
    model, twin, spaces, matchings = pair
    zipped, _ = zipped_of((model, twin), spaces, matchings, X, "block2")
    single = extract(zipped, 1)
    close(single(X), zipped(X)[1], 0)
    assert not [n for n in single.graph.nodes if n.name.endswith("_a")]
    assert "block2.conv1.weight" in single.state_dict() and "block2.conv1_a.weight" not in single.state_dict()
    with pytest.raises(InputError, match="no task 'c'.*Tasks: 'a', 'b'"):
        extract(zipped, "c")
    with pytest.raises(InputError, match="expected the result of fxzip.merge"):
        extract(fx.symbolic_trace(model), "a")


def test_report_prints_every_part(pair):
    model, twin, spaces, matchings = pair
    zipped, _ = zipped_of((model, twin), spaces, matchings, X)
    with pytest.raises(InputError, match="without its report"):
        report(zipped)
    made = Report(
        "zip", ("a", "b"), (Size("a", 1000, 2_500_000), Size("b", 1000, None)), Size("zipped", 1500), 0.5
    )
    made = replace(
        made, spaces=(SpaceRow("s0", "6", (6, 6), 6, 0.91, 0.1), SpaceRow("s1", "2 x 4", (8, 8), 12))
    )
    made = made.with_(
        frozen=("frozen: %fft",), notices=("unwrapped",), verification="sound", seconds={"trace": 0.25}
    )
    zipped.meta["fxzip"]["report"] = made
    text = str(report(pickle.loads(pickle.dumps(zipped))))
    for part in (
        "2 models merged by zip (a, b)",
        "2.50M",
        "50.0% of",
        "0.910",
        "8+8 -> 12",
        "frozen: %fft",
        "unwrapped",
        "trace 0.2",
    ):
        assert part in text, part
