"""The first batch of a loader is looked at, and none is lost."""

import itertools

import torch
from torch.utils.data import DataLoader, TensorDataset

from fxzip.loaders import peek

torch.set_num_threads(1)


def test_peek_loses_nothing():
    drawn = []

    def generator():
        for k in range(4):
            drawn.append(k)
            yield k

    first, again = peek(generator())
    assert first == 0 and drawn == [0]
    assert list(itertools.islice(again, 2)) == [0, 1] and drawn == [0, 1]
    assert list(again) == [0, 1, 2, 3] == list(again) and drawn == [0, 1, 2, 3]


def test_peek_does_not_disturb_random_loaders():
    data = TensorDataset(torch.arange(50))
    loader = DataLoader(data, batch_size=10, shuffle=True)
    torch.manual_seed(3)
    want = torch.cat([b for (b,) in loader])
    torch.manual_seed(3)
    first, again = peek(loader)
    assert torch.equal(torch.cat([b for (b,) in again]), want) and torch.equal(first[0], want[:10])

    torch.manual_seed(3)
    direct = [x.item() for x in (torch.rand(()) for _ in range(3))]
    torch.manual_seed(3)
    _, again = peek(torch.rand(()) for _ in range(3))
    assert [x.item() for x in again] == direct


def test_peek_keeps_batches_that_are_written_in_one_place():
    place = torch.empty(2)
    first, again = peek({"x": place.fill_(k)} for k in range(3))
    assert first["x"].tolist() == [0, 0] and [b["x"].tolist() for b in again] == [[0, 0], [1, 1], [2, 2]]
