"""Models by name: torchvision's, timm's, transformers', and what of them weights decide."""

import pytest
import torch
from test_cli import run

from fxzip.cli.models import architecture, build
from fxzip.errors import InputError


def test_random_weights_are_reproducible_and_leave_the_random_state():
    state = torch.get_rng_state()
    made = architecture("torchvision:squeezenet1_1")
    weights = [next(build(made, seed=s).parameters()) for s in (3, 3, 4)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.equal(state, torch.get_rng_state())


def test_classes_are_read_off_the_weights_and_nothing_else_is_guessed():
    made = architecture("torchvision:squeezenet1_1")
    state = architecture("torchvision:squeezenet1_1?num_classes=7").make().state_dict()
    assert torch.equal(build(made, state).classifier[1].weight, state["classifier.1.weight"])
    state["features.0.weight"] = state["features.0.weight"][:3]
    with pytest.raises(InputError, match=r"features.0.weight is \[3, 3, 3, 3\], in the model \[64, 3, 3, 3\]"):
        build(made, state)


def test_timm_and_transformers(tmp_path, capsys):
    pytest.importorskip("timm", reason="not installed")
    transformers = pytest.importorskip("transformers", reason="not installed")
    timm = architecture("timm:resnet10t?in_chans=1")
    assert build(timm).conv1[0].weight.shape[1] == 1
    with pytest.raises(InputError, match="did you mean resnet10t"):
        architecture("timm:resnet10")
    small = "hidden_size=8&num_hidden_layers=1&num_attention_heads=2&intermediate_size=16&vocab_size=20"
    made = architecture(f"hf:bert?{small}&head=SequenceClassification")
    model = build(made)
    assert type(model).__name__ == "BertForSequenceClassification" and "input_ids" in made.example(model)
    model.save_pretrained(tmp_path / "bert")
    again = build(architecture("hf:bert", tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    for text, message in (("hf:brt", "did you mean bert"), ("hf:bert?head=Sequence", "has no head 'Sequence'")):
        with pytest.raises(InputError, match=message):
            architecture(text)
    assert transformers.__version__
    tokens = ("--data", "random:6?high=20&name=input_ids")
    assert run(capsys, "verify", f"hf:{tmp_path}/bert", *tokens, "-q")[:2] == (0, "")
