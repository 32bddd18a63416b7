"""The figures of docs/concepts.md, by fxzip.plot: python benchmarks/figures.py (about half a minute, one thread)."""

from pathlib import Path

import torch
from common import draw
from torchvision.models import resnet18

import fxzip
from fxzip.demo import CLASSES, digits, train

OUT = Path(__file__).parent.parent / "docs" / "figures"


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    OUT.mkdir(exist_ok=True)
    spaces = fxzip.inspect(resnet18(num_classes=10).eval(), torch.randn(2, 3, 64, 64))
    data = digits(0)
    models = [train(data, c, k, 8, 10, False, str(k)) for k, c in enumerate(CLASSES)]
    zipped = fxzip.merge(dict(zip(("low", "high"), models, strict=True)), data.calibration.split(64), progress=False)
    pairs = fxzip.merge(models, data.calibration.split(64), method="permute", progress=False)  # across models only
    last = fxzip.report(pairs).spaces[-1].name
    for name, figure in {
        "spaces": fxzip.plot.spaces(spaces), "graph": fxzip.plot.graph(spaces),
        "correlations": fxzip.plot.correlations(zipped), "similarity": fxzip.plot.similarity(pairs, last),
        "layers": fxzip.plot.layers(zipped),
    }.items():  # fmt: skip
        draw(figure, OUT / f"{name}.svg")


if __name__ == "__main__":
    main()
