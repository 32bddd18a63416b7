"""What people and disks put into files: every reader takes it or says what is wrong, and nothing else is raised."""

from __future__ import annotations

import warnings

import killing
import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import fxzip
from fxzip.cli import data, recipe
from fxzip.errors import FxzipError, InputError
from fxzip.files.checkpoint import read_checkpoint
from fxzip.files.plan import read_plan
from fxzip.measure import resume
from fxzip.repair import MODIFIERS

torch.set_num_threads(1)
CI = settings(
    max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)

KEYS = sorted({k for kind in (recipe.Recipe, recipe.Model, recipe.Data) for k in kind.model_fields})
WORDS = ["net.py:net", "../net.py:net", "a.pt", "/dev/zero", "x.npz", "zip", "solve+repair", "cpu", "report", "float16"]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.sampled_from(WORDS)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), inner),
    max_leaves=12,
)
METHODS = st.tuples(st.sampled_from(fxzip.METHODS), st.sampled_from(["", *(f"+{m}" for m in MODIFIERS)])).map("".join)


@st.composite
def recipes(draw):
    """A recipe that works, with some keys replaced, added or taken away, at the top or inside."""
    made = {
        "model": "net.py:net",
        "models": [{"name": "cats", "weights": "a.pt"}, {"name": "dogs", "weights": "b.pt"}],
        "method": draw(METHODS),
        "data": {"source": "x.npz"},
    }
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.sampled_from([made, made["models"][0] if made.get("models") else made, made.get("data", made)]))
        if isinstance(place, dict):
            place[draw(st.sampled_from(KEYS))] = draw(VALUES)
    if draw(st.booleans()):
        made.pop(draw(st.sampled_from(sorted(made))))
    return made


def judged(path, content: str | bytes) -> recipe.Read | str:
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    try:
        return recipe.read(path)
    except InputError as error:
        return str(error)


def test_random_recipes_are_refused_or_understood(place):
    outcomes = []

    @CI
    @given(recipes() | VALUES)
    def fuzz(made):
        found = judged(place / "r.yaml", yaml.safe_dump(made, allow_unicode=True))
        outcomes.append(isinstance(found, recipe.Read))
        if isinstance(found, recipe.Read):
            recipe.method_of(found.recipe)
            again = judged(place / "again.yaml", found.text_for(place, {"a.pt": "0", "b.pt": "1"}))
            assert isinstance(again, recipe.Read) and again.recipe.tasks == found.recipe.tasks
        else:
            assert len(found) > len("recipe.yaml: ")

    fuzz()
    assert any(outcomes) and not all(outcomes)


def test_random_text_is_no_recipe(place):
    @CI
    @given(st.text(alphabet="ab:-[]{}&*!#'\"\n \t\x00é\ud800", max_size=60) | st.binary(max_size=60))
    def fuzz(content):
        assert isinstance(judged(place / "r.yaml", content), str)

    fuzz()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One good file of each kind, and what reads it."""
    folder = tmp_path_factory.mktemp("files")
    state = {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}
    torch.save(state, folder / "a.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state, folder / "a.safetensors")
    np.savez(folder / "x.npz", x=np.ones((4, 3)), y=np.arange(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        killing.job(folder)
        zipped = fxzip.merge(killing.nets(), killing.BATCHES[:2], method="average", progress=False)
        fxzip.save(zipped, folder / "saved")
        fxzip.collect(killing.nets(), killing.BATCHES[:2], progress=False).save(folder / "moments.safetensors")
    return folder


READERS = {
    "a.pt": lambda path: read_checkpoint(path),
    "old.pt": lambda path: read_checkpoint(path),
    "a.safetensors": lambda path: read_checkpoint(path),
    "x.npz": lambda path: data.samples(path.name, None, path.parent),
    "saved/plan.json": lambda path: read_plan(path),
    "saved/model.safetensors": lambda path: fxzip.load(path.parent, lambda: killing.nets()[0]),
    resume.FILE: lambda path: killing.refused(path.parent),
    "moments.safetensors": lambda path: fxzip.Moments.load(path),
}


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused_or_read(files, name):
    """Bytes replaced, cut out or put in anywhere in a good file, or nothing but other bytes."""
    path, whole = files / name, (files / name).read_bytes()
    refused = []

    @CI
    @given(st.data())
    def fuzz(draws):
        start = draws.draw(st.integers(0, len(whole)))
        stop = draws.draw(st.integers(start, min(start + 40, len(whole))) | st.just(len(whole)))
        put = draws.draw(st.binary(max_size=40))
        alone = draws.draw(st.integers(0, 9)) == 9
        path.write_bytes(put if alone else whole[:start] + put + whole[stop:])
        try:
            READERS[name](path)
        except FxzipError as error:
            refused.append(str(error))

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fuzz()
    finally:
        path.write_bytes(whole)
    assert (name == resume.FILE or refused) and all(path.name in r or path.parent.name in r for r in refused)
