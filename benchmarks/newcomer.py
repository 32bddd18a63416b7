"""A newcomer's path, timed: an empty environment and the demo; then two checkpoints and a folder of images, merged and
reported by two commands, by ten lines of Python, and once more from what was written, which must give the same bytes.

    python benchmarks/newcomer.py                       # needs nothing but Python and a package index

The checkpoints are ResNet-18 with random weights and the images noise: what is timed is the path.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ("fxzip", "docs", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
FILES = ("README.md", "model.safetensors", "plan.json", "recipe.yaml")
OWN = """
import torch
from pathlib import Path
from torchvision.models import resnet18
from torchvision.utils import save_image

for seed, (name, classes) in enumerate({"cats": 12, "dogs": 25}.items()):
    torch.manual_seed(seed)
    torch.save(resnet18(num_classes=classes).state_dict(), f"{name}.pt")
    Path("images", name).mkdir(parents=True)
    for k in range(32):
        save_image(torch.rand(3, 64, 64), f"images/{name}/{k}.png")
"""
TEN_LINES = """
import torch, fxzip
from torchvision import datasets, models, transforms
cats, dogs = models.resnet18(num_classes=12).eval(), models.resnet18(num_classes=25).eval()
cats.load_state_dict(torch.load("cats.pt", weights_only=True))
dogs.load_state_dict(torch.load("dogs.pt", weights_only=True))
images = datasets.ImageFolder("images", transforms.ToTensor())
loader = torch.utils.data.DataLoader(images, 32, shuffle=True)
zipped = fxzip.merge({"cats": cats, "dogs": dogs}, loader)
fxzip.save(zipped, "python")
fxzip.html.write(zipped, "python/report.html")
"""


def timed(step: str, *command: str | Path, folder: Path, show: bool = False) -> None:
    """Run a command; a row of the table."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([str(c) for c in command], cwd=folder, capture_output=True, text=True)
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{step}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"| {step} | {seconds:.0f} | {cpu:.0f} |", flush=True)
    if show:
        print(done.stdout, file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="makes the environment")
    parser.add_argument("--environment", type=Path, help="use this one, with fxzip installed, instead of a new one")
    parser.add_argument("--no-demo", action="store_true")
    args = parser.parse_args()
    print("| step | seconds | CPU seconds |\n| :-- | --: | --: |")
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch)
        bin = (args.environment or here / "venv").absolute() / "bin"
        if args.environment is None:
            (here / "checkout").mkdir()
            for name in SOURCE:  # a copy: pip builds in place
                path, to = ROOT / name, here / "checkout" / name
                shutil.copytree(path, to) if path.is_dir() else shutil.copy(path, to)
            timed("`python -m venv`", args.python, "-m", "venv", "venv", folder=here)
            timed("`pip install .[demo]`", bin / "pip", "install", "-q", "./checkout[demo]", folder=here)
        if not args.no_demo:
            timed("`fxzip demo`", bin / "fxzip", "demo", folder=here, show=True)
        subprocess.run([bin / "python", "-c", OWN], cwd=here, check=True)
        timed("`fxzip merge --model torchvision:resnet18 ...`", bin / "fxzip", "merge", "--model",
              "torchvision:resnet18", "--weights", "cats.pt", "dogs.pt", "--data", "images", "--image-size", "64",
              "--out", "out", folder=here)  # fmt: skip
        timed("`fxzip report out`", bin / "fxzip", "report", "out", folder=here)
        timed("the same by ten lines of Python", bin / "python", "-c", TEN_LINES, folder=here)
        timed("`fxzip merge out/recipe.yaml again`", bin / "fxzip", "merge", "out/recipe.yaml", "again", folder=here)
        for name in FILES:
            assert (here / "out" / name).read_bytes() == (here / "again" / name).read_bytes(), f"{name} differs"
        for folder in ("out", "python"):
            assert {*FILES[:3], "report.html"} <= set(os.listdir(here / folder)), folder
        versions = "import torch, fxzip; print(f'torch {torch.__version__}, fxzip {fxzip.__version__}')"
        found = subprocess.run([bin / "python", "-c", versions], capture_output=True, text=True, check=True).stdout
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    print(f"\nThe last command gave the same bytes again. {platform.machine()}, {os.cpu_count()} cores, "
          f"OMP_NUM_THREADS {threads}, Python {platform.python_version()}, {found.strip()}, "
          f"{datetime.date.today()}")  # fmt: skip


if __name__ == "__main__":
    main()
