"""What int8 costs the CIFAR-10 pair: its models side by side, and merged, before and after PT2E quantisation.

    pip install -e ".[bench]" torchao && python benchmarks/int8.py --data DIR --checkpoints a.pt b.pt

Static quantisation of weights and activations, for Inductor's x86 backend (torchao); the observers see calibration
images without labels. What is scored is the quantised graph, whose values are rounded as the int8 kernels round them;
`--compile` has Inductor lower it to these kernels (needs a C++ compiler).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from cifar_pair import SOLVE_IMAGES, bench_of
from common import METHODS, Row, announce, machine, options, parse, save, show
from torch import Tensor, fx, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

import fxzip
from fxzip.evaluate import Ensemble

OBSERVED = 512


class Pair(Ensemble):
    """With an input of one name, as dynamic shapes are given by."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().forward(x)


def quantised(network: nn.Module, images: Tensor) -> fx.GraphModule:
    """`network` in int8, its ranges those that `images` (float32 [n, c, h, w]) give."""
    quantiser = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(network, (images[:4],), dynamic_shapes=shapes, strict=True).module()
        observed = prepare_pt2e(program, quantiser)  # type: ignore[arg-type]
        for batch in images.split(128):
            observed(batch)
        return convert_pt2e(observed)


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__, methods=True)
    parser.add_argument("--checkpoints", nargs=2, metavar="FILE", help="the two networks; trained here without them")
    parser.add_argument("--compile", action="store_true", help="score Inductor's int8 kernels")
    args = parse(parser, argv)
    count = args.calibration or SOLVE_IMAGES
    bench, source, _ = bench_of(args, count)
    networks: dict[str, nn.Module] = {"ensemble": Pair(bench.parents).eval()}
    for method in args.methods or ["solve"]:
        networks[method] = fxzip.merge(bench.parents, bench.calibration.split(256), calibration=count, seed=args.seed,
                                       progress=False, **METHODS[method])  # fmt: skip
    rows: list[Row] = []
    for name, network in networks.items():
        rows.append(announce(bench.row(name, network)))
        small = quantised(network, bench.calibration[:OBSERVED])
        run = torch.compile(small) if args.compile else small
        score = fxzip.accuracy(run, bench.class_lists, bench.images, bench.labels)
        rows.append(announce(replace(rows[-1], name=f"{name}, int8", per_task=score.per_task, mean=score.mean,
                                     joint=score.joint)))  # fmt: skip
    title = "CIFAR-10, 5 + 5 classes, two ResNet-20: int8 by PT2E"
    notes = machine(args, **{"test images": len(bench.images), "calibration": count, "observed": OBSERVED,
                             "int8 kernels": args.compile, "data": source})  # fmt: skip
    show(title, rows, [" ".join(map(str, own)) for own in bench.class_lists], notes)
    save(args.out, [(title, rows)], notes)


if __name__ == "__main__":
    main()
