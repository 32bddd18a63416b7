"""Recipes: all problems at once, with lines and suggestions; nothing is read that should not be."""

import os

import numpy as np
import pytest
import torch
import yaml

from fxzip import Distill, Solve, Zip
from fxzip.cli import data, job, recipe
from fxzip.errors import InputError
from fxzip.repair import Repair
from fxzip.solve import Settings


def refused(path, text):
    (path / "r.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        recipe.read(path / "r.yaml")
    return str(caught.value)


def test_every_problem_is_reported_at_once_with_its_line(place):
    said = refused(
        place,
        "modles: []\nmodels:\n  - {weights: a.pt, nmae: x}\n  - weights: 3\nbudget: much\nheads: both\n"
        "data: {source: x.npz, image_sise: 3}\nseed: true\n",
    )
    for text in (
        "7 problems",
        "line 1: unknown key modles: did you mean 'models'?",
        "line 3: unknown key models[0].nmae: did you mean 'name'?",
        "line 4: models[1].weights: input should be a valid string, not 3",
        "line 5: budget must be a positive number (FLOPs of the result, times one model), got 'much'\n",
        "line 6: heads: input should be 'separate', 'concat', 'joint' or 'average', not 'both'",
        "line 7: unknown key data.image_sise: did you mean 'image_size'?",
        "line 8: seed: input should be a valid integer, not True",
    ):
        assert text in said


MODELS = "model: net.py:net\nmodels: [a.pt, b.pt]\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n- b\n", "must hold keys such as models, method, data; it holds list"),
        ("", "it holds NoneType"),
        ("models: [a.pt\n", "cannot be read as YAML"),
        ("models: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
        ("models: &m [a.pt, b.pt]\ndata: *m\n", "line 2: anchors and aliases are not supported"),
        (MODELS + "seed: 1\nseed: 2\n", "line 4: seed comes twice"),
        ("[" * 5000, "line 1: nested too deep"),
        (" " * (1 << 18) + "a: 1", "a recipe has at most"),
        ("models: [a.pt]\nmodel: net.py:net\n", "models: list should have at least 2 items"),
        ("models: [a.pt, c.pt]\n", "models[0]: no model; write torchvision:NAME"),
        ("models: [a.pt, c.pt]\n", "models[1].weights: no file"),
        (MODELS + "method: zpi\n", "unknown method 'zpi'; did you mean 'zip'?"),
        (MODELS + "method: slove\n", "unknown method 'slove'; did you mean 'solve'?"),
        (MODELS + "method: zip\nparameters: {alhpa: 1}\n", "has no parameter 'alhpa': did you mean 'alpha'?"),
        (MODELS + "method: zip\nparameters: {alpha: x}\n", "parameter alpha must be a float, not 'x'"),
        (MODELS + "method: zip\nparameters: {alpha: 2}\n", "Zip: alpha must be in (0, 1], not 2"),
        (MODELS + "method: permute\nparameters: {alpha: 2}\n", "has no parameter 'alpha': it has none"),
        (MODELS + "method: zip+repiar\n", "unknown modifier 'repiar'"),
        ("models:\n- {weights: a.pt, name: x}\n- {weights: b.pt, name: x}\n", "two models are called 'x'"),
        ("model: m.py:f\nmodels:\n- {weights: a.pt, name: x}\n- {weights: b.pt}\n", "give every model a name, or none"),
        ("model: m.py:f\nmodels:\n- {weights: a.pt, data: x.npz}\n- {weights: b.pt}\n", "give every model its own"),
        ("model: m.py:f\nmodels:\n- {weights: a.pt, name: ../x}\n- {weights: b.pt, name: y}\n", "models[0].name"),
    ],
)
def test_what_is_no_recipe(place, text, said):
    assert said in refused(place, text)


def test_parameters_become_methods(place):
    def method(text):
        (place / "r.yaml").write_text(MODELS + text)
        return recipe.method_of(recipe.read(place / "r.yaml").recipe)

    assert method("") == "solve" and method("method: zip+repair\n") == "zip+repair"
    assert method("method: zip\nparameters: {alpha: 1, beta: 0.5}\n") == Zip(1, 0.5)
    assert method("method: zip+rescale\nparameters: {beta: 0.5}\n") == Repair(Zip(beta=0.5), False)
    assert method("parameters: {matcher: zip, lam: 0.01}\n") == Solve(Zip(), Settings(lam=0.01))
    assert method("method: solve+distill\n") == "solve+distill"
    assert method("method: solve+distill\nparameters: {precision: bfloat16}\n").precision == torch.bfloat16
    steps = "{lam: 0.01, epochs: 2, solve_samples: 64, rate: 0.1, damping: 0.01}"
    given = method(f"method: solve+distill\nparameters: {steps}\n")
    assert given == Distill(Solve(settings=Settings(lam=0.01)), epochs=2, solve_samples=64, rate=0.1, damping=0.01)


def test_problems_of_models_and_data_are_listed_together(place):
    torch.save({"0.weight": torch.zeros(1)}, place / "b.pt")
    (place / "r.yaml").write_text(MODELS + "data: images\n")
    with pytest.raises(InputError) as caught:
        job.prepared(recipe.read(place / "r.yaml"), trust_code=True)
    said = str(caught.value)
    assert "recipe: 2 problems" in said and "models[1]: weights" in said and "b.pt' does not fit the model: it" in said
    assert "data: data 'images': no such folder or file" in said


def test_the_loader_has_samples_beyond_those_of_calibration_where_they_are_wanted(place):
    read = recipe.read(place / "recipe.yaml")
    fitted, all_ = (torch.cat([b[0] for b in job.prepared(read, True, more=n).loader]) for n in (0, 4))
    assert len(fitted) == 24 and len(all_) == 28 and torch.equal(all_[:24], fitted)


def test_paths_are_those_of_the_recipe_and_weights_are_remembered(place, monkeypatch):
    (place / "sub").mkdir()
    monkeypatch.chdir(place / "sub")
    job.run(recipe.read(place / "recipe.yaml"), place / "sub" / "out", trust_code=True, progress=False)
    written = yaml.safe_load((place / "sub" / "out" / "recipe.yaml").read_text())
    assert written["model"] == "../../net.py:net" and written["data"]["source"] == "../../x.npz"
    assert [m["weights"] for m in written["models"]] == ["../../a.pt", "../../b.pt"]
    torch.save({k: v + 1 for k, v in torch.load(place / "a.pt").items()}, place / "a.pt")
    with pytest.raises(InputError, match="are not those of the recipe: sha256"):
        job.prepared(recipe.read(place / "sub" / "out" / "recipe.yaml"), trust_code=True)


def test_data_per_model_is_read_in_turn(place):
    text = "model: net.py:net\nmodels:\n- {name: a, weights: a.pt, data: x.npz}\n"
    (place / "r.yaml").write_text(text + "- {name: b, weights: b.pt, data: 'random:3x8x8?count=4'}\ncalibration: 6\n")
    loader = job.prepared(recipe.read(place / "r.yaml"), trust_code=True).loader
    assert list(loader) == ["a", "b"] and [len(loader[t].dataset) for t in "ab"] == [6, 4]


# ------------------------------------------------------------------------------------------------------ data


def test_calibration_samples_are_drawn_by_seed(place):
    found = data.samples("x.npz")
    first, again, other = (next(iter(data.loader(found, 8, 8, seed)))[1].tolist() for seed in (0, 0, 1))
    assert first == again != other and len(set(first)) > 2  # of several classes, though the file may be sorted
    assert next(iter(data.loader(found, 8)))[1].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]


def test_images_with_and_without_a_folder_per_class(tmp_path):
    from PIL import Image

    for name in ("cat/1.png", "dog/1.png", "dog/2.jpg", "flat/1.png"):
        (tmp_path / "all" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (255, 0, 0)).save(tmp_path / "all" / name)
    found = data.samples("all", data.Images(16, (0.5,) * 3, (0.5,) * 3), tmp_path)
    x, y = next(iter(data.loader(found, 4)))
    assert x.shape == (4, 3, 16, 16) and y.tolist() == [0, 1, 1, 2] and found.classes == ("cat", "dog", "flat")
    assert torch.allclose(x[0, :, 8, 8], torch.tensor([1.0, -1.0, -1.0]))
    flat = data.samples("all/flat", data.Images(16), tmp_path)
    assert not flat.labelled and next(iter(data.loader(flat, 4))).shape == (1, 3, 16, 16)


def test_data_sets_of_torchvision(tmp_path):
    found = data.samples("torchvision:FakeData?size=5&image_size=[3, 8, 8]&num_classes=4", None, tmp_path)
    x, y = next(iter(data.loader(found, 8)))
    assert x.shape == (5, 3, 8, 8) and y.dtype == torch.int64


@pytest.mark.parametrize(
    ("text", "moved"),
    [
        ("torchvision:CIFAR10?root=d&train=false", "torchvision:CIFAR10?root=../d&train=false"),
        ("torchvision:CIFAR10?train=false&root=my%20data", "torchvision:CIFAR10?root=../my%20data&train=false"),
        ("torchvision:CIFAR10", "torchvision:CIFAR10?root=.."),  # without one it is the recipe's own folder
        ("torchvision:FakeData?size=5", "torchvision:FakeData?size=5"),
    ],
)
def test_data_sets_are_found_from_the_folder_of_the_result(text, moved, tmp_path):
    change = lambda p: os.path.relpath(p, (tmp_path / "out").resolve())  # noqa: E731
    assert data.relative(text, change, tmp_path.resolve()) == moved


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("torchvision:CIFAR11", "did you mean CIFAR10"),
        ("torchvision:LSUN?root=.", "torchvision unpickles a file in that folder, which may run code"),
        ("torchvision:CIFAR10?root=nothing", "RuntimeError: Dataset not found"),
        ("random:3xx8", "write random:3x224x224"),
        ("random:3x8?cuont=3", "write random:3x224x224"),
        ("empty", "no images in it, nor a folder per class"),
        ("bytes.npz", "x is uint8: save floats"),
        ("ragged.npz", "needs inputs of one length"),
        ("object.npz", "allow_pickle=False"),
        ("names.npz", "y is <U3, not numbers"),
        ("net.npz", "not an .npz file"),
        ("a.pt", "no such folder or file; data is a folder of images"),
    ],
)
def test_what_is_no_data(place, text, said):
    (place / "empty").mkdir()
    np.savez(place / "bytes.npz", x=np.zeros((2, 3), np.uint8))
    np.savez(place / "ragged.npz", x=np.zeros((2, 3)), y=np.zeros(3))
    np.savez(place / "names.npz", x=np.zeros((2, 3)), y=np.array(["cat", "dog"]))
    np.savez(place / "object.npz", x=np.array([{}, {}]))
    (place / "net.npz").write_text("x")
    with pytest.raises(InputError, match="data ") as caught:
        data.samples(text, None, place)
    assert said in str(caught.value)


def test_an_archive_beyond_the_limit_is_not_opened(place, monkeypatch):
    monkeypatch.setattr(data, "LIMIT", 100)
    with pytest.raises(InputError, match="more than the"):
        data.samples("x.npz", None, place)


def test_several_arrays_are_inputs_by_name(place):
    np.savez(place / "t.npz", input_ids=np.ones((4, 3), np.int32), attention_mask=np.ones((4, 3), bool), y=np.arange(4))
    x, y = next(iter(data.loader(data.samples("t.npz", None, place), 2)))
    assert {k: v.dtype for k, v in x.items()} == {"input_ids": torch.int64, "attention_mask": torch.bool}
    assert y.tolist() == [0, 1]
