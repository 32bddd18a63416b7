"""Screenshots of the HTML report for docs/: ResNet-18, a small ViT, EfficientNet-B3 (537 nodes). Needs timm,
playwright and a Chromium (--chromium). Weights are random, inputs are noise: what is shown is the page, no result.

    python benchmarks/screenshots.py --out docs
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from playwright.sync_api import sync_playwright
from torch import nn

import fxzip

SECTION = "byId('graph-section').scrollIntoView();"
# name -> (model, image size, images, method, colour scheme, what is opened and selected)
SHOTS: dict[str, tuple[Callable[[], nn.Module], int, int, str, str, str]] = {
    "resnet18": (
        lambda: timm.create_model("resnet18", num_classes=5), 32, 64, "solve", "light",
        "graph.toggle('layer2' + SEP + '0'); select({space: 's4'}); graph.move(null, false);",
    ),
    "vit": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=5),
        32, 64, "solve", "light",
        "graph.toggle('blocks'); graph.toggle('blocks' + SEP + '1'); select({space: 's6'}); graph.move(null, false);"
        "graph.cy.center(graph.cy.$id('g:blocks' + SEP + '1'));",
    ),
    "efficientnet-b3": (
        lambda: timm.create_model("efficientnet_b3", num_classes=5), 64, 32, "permute", "dark",
        "graph.openAll(true); select({space: 's14'}); graph.move(null, false); graph.cy.zoom(0.6);"
        "graph.cy.center(graph.cy.$id('n:blocks_2_1_conv_dw'));",
    ),
}  # fmt: skip


def merged(make: Callable[[], nn.Module], size: int, count: int, method: str):
    models = {}
    for seed, name in enumerate(("cats", "dogs")):
        torch.manual_seed(seed)
        models[name] = make().eval()
    images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    return fxzip.merge(models, images.split(16), method=method, calibration=count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--only", choices=list(SHOTS), nargs="*", default=list(SHOTS))
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    with sync_playwright() as play, tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            make, size, count, method, scheme, script = SHOTS[name]
            file = fxzip.html.write(merged(make, size, count, method), Path(folder) / f"{name}.html")
            browser = play.chromium.launch(executable_path=args.chromium, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": 1280, "height": 880}, color_scheme=scheme)  # type: ignore[arg-type]
            page.goto(f"file://{file}")
            page.wait_for_function("document.documentElement.dataset.ready")
            page.evaluate(f"{{ {SECTION} {script} }}")
            page.wait_for_timeout(800)
            page.screenshot(path=args.out / f"report-{name}.png")
            browser.close()


if __name__ == "__main__":
    main()
