"""Everything that coverage.py asks about one model. It is traced and analysed once; the proof, the merge with its own
scrambled copy, and the checks of the result all start from that."""

from __future__ import annotations

import copy
import ctypes
import multiprocessing
import resource
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import fx, nn

BATCH, SAMPLES = 4, 8
MEMORY = 14  # GiB that a process may allocate
CAP = 3 << 30  # bytes of moments and matrices above which the merge gets `memory=`
LARGE = 1 << 28  # parameters, from which on freed memory goes back to the system
RECOVERED = 1e-3  # relative error of a model recovered from its scrambled copy
GRACE = 30  # seconds of processor time from the polite signal to the end of the process


class TimeUp(BaseException):
    """The processor time is used up. No Exception: the front ends try the next way after one."""


def measure(suite: str, name: str, nodes: int = 10**6, merge: bool = True) -> dict[str, Any]:
    """The row of one model, as far as it goes. nodes: merged networks with more are not compiled and exported.
    Seconds are of the processor, so that other work beside this one does not count."""
    from zoo_others import RELATIVES, SUITES

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    row: dict[str, Any] = {}
    start = time.process_time()
    try:
        model, batch = SUITES[suite]()[name]()
        start = time.process_time()
        _fill(row, model.eval(), batch, nodes, merge, RELATIVES.get(f"{suite}:{name}"))
    except TimeUp as up:
        row["error"] = str(up)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"
    row["seconds"] = round(time.process_time() - start, 2)
    row["megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return row


def _fill(row: dict[str, Any], model: nn.Module, batch: Any, nodes: int, merge: bool, relative: Any = None) -> None:
    from fxzip.trace import plain

    data = [batch(BATCH) for _ in range(SAMPLES // BATCH)]
    own = plain(model)[0]
    if sum(p.numel() for p in own.parameters()) > LARGE:
        give_back()
    jitter(own)
    settle(own, data)
    traced, spaces, args = analysis(row, model, batch(2))
    if merge:
        zipped = recovery(row, own, traced, spaces, args, data)
        del traced, spaces
        if relative is not None:
            related(row, own, relative(), data)
        if len(zipped.graph.nodes) <= nodes:
            runnable(row, zipped, data[0])


def limit(seconds: int, memory: int) -> None:
    """For this process, which is one model's: TimeUp after so much processor time, and GRACE later the end; GiB."""

    def up(*_: Any) -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds + GRACE, seconds + GRACE))  # or it comes again every second
        raise TimeUp(f"more than {seconds} s of processor time")

    signal.signal(signal.SIGXCPU, up)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + GRACE))
    resource.setrlimit(resource.RLIMIT_DATA, (memory << 30, memory << 30))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # No mmap, no trim below 2 GiB: large tensors come and go, and the first touch of a page costs more than most
    # operators.
    for parameter, value in ((-4, 0), (-1, 2**31 - 1)) if mallopt else ():
        mallopt(parameter, value)


def give_back() -> None:
    """What is freed goes back to the system from here on, as it counts towards the limit otherwise: page faults cost
    less than having no memory."""
    libc = ctypes.CDLL(None)
    for parameter, value in ((-4, 65536), (-3, 32 << 20), (-1, 64 << 20)) if hasattr(libc, "mallopt") else ():
        libc.mallopt(parameter, value)
    getattr(libc, "malloc_trim", lambda _: 0)(0)


def apart(seconds: int, work: Callable[[], dict[str, Any]], memory: int = MEMORY) -> dict[str, Any] | int | None:
    """work() in a process of its own, within the limits; the exit code where that ended without an answer."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)

    def limited() -> None:
        limit(seconds, memory)
        theirs.send(work())

    worker = context.Process(target=limited)
    worker.start()
    theirs.close()
    try:
        return mine.recv()
    except EOFError:
        worker.join()
        return worker.exitcode
    finally:
        worker.kill()
        worker.join()


# ----------------------------------------------------------------------------------------- analysis and proof


def analysis(row: dict[str, Any], model: nn.Module, example: Any) -> tuple[Any, Any, tuple]:
    """Rung, graph, spaces, proof; and what was traced, the spaces, the arguments."""
    from fxzip.infer import analyse
    from fxzip.infer.show import free_parameters
    from fxzip.trace import bind, trace
    from fxzip.verify import verify_spaces

    start = time.process_time()
    row["parameters"] = sum(p.numel() for p in model.parameters())
    traced = trace(model, example)
    row |= {"rung": traced.rung, "notices": list(traced.notices), "nodes": len(traced.graph_module.graph.nodes)}
    args = bind(example, signature(traced.graph_module.forward))
    spaces = analyse(traced.graph_module, args)
    free, total = free_parameters(spaces)
    row |= {
        "operators": len(spaces.lowered.graph.nodes),
        "spaces": sum(bool(s.segments) for s in spaces),
        "block_spaces": sum(not s.segments for s in spaces),
        "free": round(free / max(total, 1), 4),
        "untouched": len(spaces.untouched),
        "frozen": sorted({f"{f.op}: {f.reason}" for f in spaces.frozen}),
        "inspect_seconds": round(time.process_time() - start, 2),
    }
    proof = verify_spaces(traced, spaces, args)
    row |= {
        "sound": proof.ok,
        "inconclusive": proof.inconclusive,
        "proof_error": proof.error,
        "sensitivity": proof.sensitivity,
        "verification": str(proof),
        "analysis_seconds": round(time.process_time() - start, 2),
    }
    return traced, spaces, args


# -------------------------------------------------------------------------------------------------- merge


def recovery(
    row: dict[str, Any], model: nn.Module, traced: Any, spaces: Any, args: tuple, data: list
) -> fx.GraphModule:
    """Merge with a scrambled copy: the result, which is returned, must compute what the model computes."""
    import fxzip

    row["matched_by"], row["capped"] = "permute", sum(64 * s.size**2 for s in spaces) > CAP
    if row["capped"]:
        give_back()
    twin = scrambled(traced, spaces)
    pairs = zip(traced.graph_module.parameters(), twin.graph_module.parameters(), strict=True)
    moved = any(not torch.equal(a, b) for a, b in pairs)
    enough = max([1 << 30, *(144 * s.size**2 for s in spaces)])  # to measure and match the widest space alone
    zipped = merged(model, traced, twin, spaces, args, data, enough if row["capped"] else None)
    error = far(zipped, [model, model], data[0])
    shared = round(fxzip.report(zipped).shared, 4)
    row |= {"recovery_error": error, "recovered": error < RECOVERED, "scrambled": moved, "shared": shared}
    return zipped


def scrambled(traced: Any, spaces: Any) -> Any:
    """As fxzip.scramble, with a trace and spaces that are known already."""
    from fxzip.infer.group import axis_indices, permuted
    from fxzip.infer.sampling import sample
    from fxzip.trace import state_of

    other = copy.deepcopy(traced.graph_module)
    state = state_of(other)
    indices = axis_indices(spaces, sample(spaces, np.random.default_rng(0)), state)
    for name, value in permuted(state, indices).items():
        if value is not state[name]:
            state[name].copy_(value)
    return replace(traced, graph_module=other)


def merged(
    model: nn.Module, traced: Any, twin: Any, spaces: Any, args: tuple, data: list, memory: int | None
) -> fx.GraphModule:
    """The stages of fxzip.merge(method="permute"), from the second on: models are traced and analysed."""
    from fxzip import passes
    from fxzip.passes.job import Job, give, node_names
    from fxzip.prepared import Clock, Prepared

    graph = traced.graph_module
    prepared = Prepared(
        "coverage", ("0", "1"), False, (traced, twin), args, torch.device("cpu"), data, spaces, models=(model, model)
    )
    graph = give(graph, Job(prepared, prepared.models, Clock(), False, nodes=node_names(graph)))
    stages = [passes.Cut(), passes.Read(), passes.Cap(memory, "permute"), passes.Measure(), passes.Match("permute")]
    for stage in (*stages, passes.Average(), passes.Build(), passes.Calibrate(), passes.Describe()):
        graph = stage(graph).graph_module
    return graph


@torch.no_grad()
def jitter(model: nn.Module) -> None:
    """Freshly initialised biases, scales and statistics are all alike: make features tell themselves apart.

    Buffers that no checkpoint holds are constants of the code, and stay."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.numel() > 1 and tensor.dim() <= 1 and "running_var" not in name:
            tensor.add_(0.1 * torch.randn_like(tensor))


def settle(model: nn.Module, data: list) -> None:
    """Norm statistics of these inputs, as the merge recomputes them."""
    from fxzip.rewrite import batch_norms, recompute_statistics
    from fxzip.trace import bind

    if batch_norms(model):
        run = copy.deepcopy(model)  # a transformers model that has run carries hooks
        recompute_statistics(run, data, lambda b: bind(b, signature(model.forward)))
        model.load_state_dict(run.state_dict())


def related(row: dict[str, Any], model: nn.Module, other: nn.Module, data: list) -> None:
    """Merge with a scrambled model for other classes, which has `model`'s weights but its own heads: each head must
    compute what its model computes."""
    import fxzip

    own, theirs = model.state_dict(), other.state_dict()
    other.load_state_dict({k: own[k] if own[k].shape == x.shape else x for k, x in theirs.items()})
    other = fxzip.scramble(other.eval(), data[0][:2])
    zipped = fxzip.merge([model, other], data, method="permute", verify=False, progress=False)
    row["other_classes_error"] = far(zipped, [model, other], data[0])
    row["other_classes"] = row["other_classes_error"] < RECOVERED


@torch.no_grad()
def far(zipped: nn.Module, models: Sequence[nn.Module], example: Any) -> float:
    """Largest deviation of an output from its model's, relative to the largest there."""
    from fxzip.trace import bind, counted, tensors_of

    worst = 0.0
    for output, model in zip(zipped(*bind(example, signature(zipped.forward))), models, strict=True):
        wanted = tensors_of(counted(model(*bind(example, signature(model.forward)))))
        for a, b in zip(tensors_of(output), wanted, strict=True):
            if b.is_floating_point():
                worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)))
    return worst


@torch.no_grad()
def runnable(row: dict[str, Any], zipped: nn.Module, batch: Any) -> None:
    """Whether the result goes through torch.compile (aot_eager, one graph) and torch.export."""
    from fxzip.trace import bind

    args = bind(batch, signature(zipped.forward))
    ways = {
        "compiles": lambda: torch.compile(zipped, backend="aot_eager", fullgraph=True)(*args),
        "exports": lambda: torch.export.export(zipped, args, strict=False),
    }
    for name, way in ways.items():
        try:
            way()
            row[name] = True
        except Exception as error:
            row[name] = False
            row[f"{name}_error"] = f"{type(error).__name__}: {error}"[:300]
