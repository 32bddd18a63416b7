"""Accuracy against hand-counted cases, costs against formulas."""

import pytest
import torch
from torch import nn

from fxzip.errors import InputError
from fxzip.evaluate import Accuracy, Cost, Ensemble, accuracy, cost

# Six images are their own logits; the classes are 4, 1 (task a) and 7 (task b).
IMAGES = torch.tensor([[2.0, 0, 1], [0, 2, 3], [2, 0, 3], [0, 0, 5], [9, 0, 1], [0, 1, 2]])
LABELS = torch.tensor([4, 1, 1, 7, 7, 3])
CLASSES = [[4, 1], [7]]


def heads(x):
    return x[:, :2], x[:, 2:]


def test_accuracy_counts_own_images_and_all_classes():
    # a: images 0, 1 right, 2 wrong; b has one class. joint over the five known images: 0 and 3 right.
    # The image of class 3 belongs to no head and counts nowhere.
    scores = accuracy(heads, CLASSES, IMAGES, LABELS)
    assert scores.per_task == pytest.approx((200 / 3, 100))
    assert scores.mean == pytest.approx(500 / 6)
    assert scores.joint == pytest.approx(40)


@pytest.mark.parametrize("batch", [1, 4, 6])
def test_batches_do_not_matter(batch):
    assert accuracy(heads, CLASSES, IMAGES, LABELS, batch) == accuracy(heads, CLASSES, IMAGES, LABELS)


def test_dict_goes_by_name_not_by_order():
    by_name = accuracy(
        lambda x: {"b": x[:, 2:], "a": x[:, :2]}, {"a": [4, 1], "b": [7]}, IMAGES, LABELS
    )
    assert by_name == accuracy(heads, CLASSES, IMAGES, LABELS)


def test_dict_of_logits_with_a_list_of_classes_goes_by_order():
    by_order = accuracy(lambda x: {"a": x[:, :2], "b": x[:, 2:]}, CLASSES, IMAGES, LABELS)
    assert by_order == accuracy(heads, CLASSES, IMAGES, LABELS)


def test_joint_uses_raw_logits():
    scores = accuracy(lambda x: (x[:, :2], x[:, 2:] - 10), CLASSES, IMAGES, LABELS)
    assert scores.per_task == pytest.approx((200 / 3, 100))
    assert scores.joint == pytest.approx(40)  # now 0 and 1 are right, class 7 never wins


@pytest.mark.parametrize(
    ("forward", "classes", "message"),
    [
        (lambda x: x, CLASSES, "one tensor"),
        (lambda x: (x,), CLASSES, "1 outputs for 2 class lists"),
        (heads, [[4], [7]], r"task 0 has logits \(6, 2\) but 1 classes"),
        (heads, [[4, 1], [8]], r"no image of task 1, whose classes are \[8\]"),
        (lambda x: {"a": x[:, :2], "c": x[:, 2:]}, {"a": [4, 1], "b": [7]}, "tasks differ.*'c'.*'b'"),
        (heads, [], "class_lists is empty"),
    ],
)
def test_accuracy_refuses(forward, classes, message):
    with pytest.raises(InputError, match=message):
        accuracy(forward, classes, IMAGES, LABELS)


def test_accuracy_refuses_missing_labels():
    with pytest.raises(InputError, match="6 images and 5 labels"):
        accuracy(heads, CLASSES, IMAGES, LABELS[:5])


def test_accuracy_is_a_value():
    with pytest.raises(AttributeError):
        Accuracy((1.0,), 1.0, 1.0).mean = 2.0  # pyright: ignore[reportAttributeAccessIssue]


def test_cost_of_convolution_and_traced_module():
    conv = nn.Conv2d(3, 8, 3, padding=1)
    expected = Cost(8 * 27 + 8, 2 * 27 * 8 * 5 * 5 * 2)
    assert cost(conv, torch.zeros(2, 3, 5, 5)) == expected
    assert cost(torch.fx.symbolic_trace(conv), (torch.zeros(2, 3, 5, 5),)) == expected


def test_shared_parameters_count_once():
    shared = nn.Linear(4, 4, bias=False)
    assert cost(nn.Sequential(shared, shared), torch.zeros(1, 4)) == Cost(16, 2 * 2 * 16)


def test_ensemble_costs_the_sum():
    models = [nn.Linear(4, 2), nn.Linear(4, 3)]
    each = [cost(m, torch.zeros(1, 4)) for m in models]
    both = cost(Ensemble(models), torch.zeros(1, 4))
    assert both == Cost(sum(c.parameters for c in each), sum(c.flops for c in each))


def test_fused_attention_and_recurrence_are_counted():
    b, n, d = 2, 5, 8
    attention = nn.MultiheadAttention(d, 2, batch_first=True)
    x = torch.zeros(b, n, d)
    products = 4 * b * n * d * d + 2 * b * n * n * d  # four projections; q k and p v
    inputs = {"query": x, "key": x, "value": x, "need_weights": False}
    assert cost(attention, inputs).flops == 2 * products
    assert cost(nn.LSTM(d, 3, batch_first=True), x).flops == 2 * b * n * 4 * 3 * (d + 3)


def test_cost_leaves_no_trace():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout()).train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    switches = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    rng = torch.get_rng_state()
    cost(model, torch.randn(1, 1, 5, 5, generator=torch.Generator().manual_seed(0)))
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert switches == (torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled)
    assert torch.equal(rng, torch.get_rng_state())
