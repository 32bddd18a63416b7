"""Analysis of a model that has shapes and no values: a Llama of 7 billion parameters on the meta device.

    OMP_NUM_THREADS=1 python benchmarks/shapes.py

Needs transformers, whose default Llama that is. Nothing is downloaded. --layers 2 is quick.
"""

from __future__ import annotations

import argparse
import resource
import time
import warnings

import torch
from common import machine

import fxzip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=args.layers, use_cache=False)).eval()
    tokens = torch.zeros(1, args.tokens, dtype=torch.int64)
    clock, cpu = time.perf_counter(), time.process_time()
    spaces = fxzip.inspect(model, {"input_ids": tokens})
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion parameters, {args.layers} layers:"
          f" {len(list(spaces))} spaces in {clock:.1f} s (asked for: 120), {cpu:.1f} of CPU;"
          f" peak of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB (4)")  # fmt: skip
    print(machine(argparse.Namespace(seed=0)))


if __name__ == "__main__":
    main()
