"""save: a merged network to a folder."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, fx

from ..errors import InputError
from ..report import Report
from ..rewrite import difference, signature
from ..rewrite.zipped import notes
from ..trace import state_by_all_names
from ..version import installed
from .card import card
from .example import example_to_json
from .plan import (
    CARD,
    FORMAT,
    PLAN,
    PROGRAM,
    TENSORS,
    VERSION,
    Plan,
    Stored,
    UnmergeSpec,
    dtype_name,
    encode,
    is_merge,
    strangers,
)
from .program import export_program, write_program


def save(
    zipped: fx.GraphModule,
    dir: str | os.PathLike[str],
    *,
    pt2: bool = False,
    texts: Mapping[str, str] | None = None,
    force: bool = False,
) -> None:
    """Write a merged network to the folder `dir` (made if missing): no pickle.

    model.safetensors: every parameter and buffer, tied ones once, and what `extract` gives back. plan.json:
    how to build the graph again. README.md: a model card. All are written aside, flushed to the disk and
    renamed, plan.json last: a reader sees whole files, and `load` refuses files of two saves; if anything fails,
    the files that were there are still there. Values, dtypes and requires_grad are kept; the device, the mode and
    the report's timings are not: the same merge gives the same bytes. `zipped` is not changed.
    pt2: also model.pt2, by torch.export, which runs without fxzip; otherwise that of an earlier save is removed.
    texts: further files by name. force: replace files of these names that fxzip did not write.
    Raises InputError when there are such files, when `zipped` is not the result of fxzip.merge, or its graph or shapes
    were changed since, or torch.export refuses it; OSError when the disk does.

    >>> from tempfile import mkdtemp
    >>> from fxzip import load, merge
    >>> a, b = (torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)) for _ in "ab")
    >>> folder, x = mkdtemp(), torch.ones(1, 4)
    >>> zipped = merge([a, b], example_inputs=x, method="average", progress=False)
    >>> save(zipped, folder)
    >>> again = load(folder, lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)))
    >>> torch.equal(again(x)[0], zipped(x)[0])
    True
    """
    info = _checked(zipped)
    tensors, tied, trainable = _own_tensors(zipped)
    untouched: dict[str, dict[str, str]] = {}
    for task, entries in info["untouched"].items():
        untouched[task] = {name: f"untouched:{task}:{name}" for name in entries}
        tensors.update((untouched[task][name], tensor.detach()) for name, tensor in entries.items())
    stored = {name: _facts(name, t, name in trainable) for name, t in tensors.items()}
    for name in texts or {}:
        if name in (TENSORS, PLAN, PROGRAM) or Path(name).name != name or name[:1] in ("", "."):
            raise InputError(f"save: {name!r} cannot be the name of a further file")
    folder = Path(dir)
    names = (TENSORS, CARD, PLAN, *([PROGRAM] if pt2 else []), *(texts or {}))
    if not force and (found := strangers(folder, names)):
        raise InputError(f"save: {found[0]}")
    program = export_program(zipped, example_to_json(info["example"])) if pt2 else None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"save: {str(folder)!r} cannot be a folder: {error}") from error

    ours = is_merge(folder)
    with Files(folder) as files:
        sha256 = files.write(TENSORS, lambda path: _write_tensors(tensors, path))
        plan = _plan(zipped, info, stored, tied, untouched, sha256)
        for name, content in {CARD: card(plan), **(texts or {})}.items():
            files.write(name, lambda path, content=content: _write_text(content, path))
        if program is not None:
            files.write(PROGRAM, lambda path: write_program(program, path))
        elif ours:
            files.drop(PROGRAM)  # of the network that was there
        text = json.dumps(encode(plan), indent=1, allow_nan=False) + "\n"
        files.write(PLAN, lambda path: _write_text(text, path))
        files.publish()


def _checked(zipped: fx.GraphModule) -> Mapping[str, Any]:
    """The notes of a merged module that is still as it was built."""
    info = notes(zipped)
    if "signature" not in info:
        raise InputError(
            "save: this network was merged by an older fxzip, without what save needs; merge again"
        )
    changed = difference(info["signature"], signature(zipped), "as merged", "now", ordered=False)
    if changed:
        raise InputError(
            f"save: the network was changed after the merge: {changed}. fxzip.save keeps new values, not a"
            " new structure; torch.export.save or a state_dict can keep that"
        )
    return info


def _own_tensors(zipped: fx.GraphModule) -> tuple[dict[str, Tensor], dict[str, str], set[str]]:
    """Tensors by first name, other name -> first name, and the names of trainable ones."""
    tensors, tied, first = {}, {}, {}
    state = state_by_all_names(zipped)
    for name, tensor in state.items():
        if first.setdefault(id(tensor), name) == name:
            tensors[name] = tensor.detach()
        else:
            tied[name] = first[id(tensor)]
    return tensors, tied, {name for name in tensors if state[name].requires_grad}


def _facts(name: str, tensor: Tensor, requires_grad: bool) -> Stored:
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized:
        kind = "meta" if tensor.is_meta else "quantized" if tensor.is_quantized else str(tensor.layout)
        raise InputError(
            f"save: {name} is a {kind} tensor; only plain dense tensors with values can be saved"
        )
    strides = torch.empty_like(
        tensor, device="meta"
    ).stride()  # those of `tensor`, without holes and overlaps
    return Stored(tuple(tensor.shape), dtype_name(tensor.dtype), strides, requires_grad)


def _plan(
    zipped: fx.GraphModule,
    info: Mapping[str, Any],
    stored: Mapping[str, Stored],
    tied: Mapping[str, str],
    untouched: Mapping[str, Mapping[str, str]],
    sha256: str,
) -> Plan:
    axes: dict[str, Any] = {target: zipped.get_submodule(target) for target in info["unmerges"]}
    report = info.get("report")
    report = report.with_(seconds={}) if isinstance(report, Report) else None
    return Plan(
        FORMAT, VERSION, installed(), torch.__version__, info["tasks"], info["as_dict"], info["heads"], sha256,
        summary=str(report) if report else "",
        report=report,
        cut=info["cut"],
        cloned=info["cloned"],
        unmerges={t: UnmergeSpec(node, task, axes[t].axes) for t, (node, task) in info["unmerges"].items()},
        targets=info["targets"],
        nodes=info["nodes"],
        example=example_to_json(info["example"]),
        originals=tuple({n: (s, dtype_name(d)) for n, (s, d) in o.items()} for o in info["originals"]),
        signature=info["signature"],
        tensors=stored,
        tied=tied,
        untouched=untouched,
        aliases=info["aliases"],
        state_names=info["state_names"],
        shares=info["shares"],
        since=info.get("since"),
    )  # fmt: skip


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Contiguous copies: safetensors has no strides, no shared storage and not every complex dtype."""
    plain = {n: torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for n, t in tensors.items()}
    copies = {n: t.cpu().clone(memory_format=torch.contiguous_format) for n, t in plain.items()}
    try:
        save_file(copies, str(path), {"format": "pt"})
    except (SafetensorError, KeyError, ValueError) as error:
        dtypes = sorted({dtype_name(t.dtype) for t in tensors.values()})
        raise InputError(
            f"save: safetensors cannot write these tensors (dtypes {', '.join(dtypes)}): {error}"
        ) from error


class Files:
    """Files written under temporary names beside their final ones, removed again unless published; and files that go
    when these come."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex[:8]
        self.written: dict[Path, Path] = {}  # temporary -> final
        self.dropped: list[Path] = []

    def __enter__(self) -> Files:
        return self

    def write(self, name: str, writer: Callable[[Path], None]) -> str:
        """Let `writer` make the file; flush it to the disk; -> its sha256."""
        path = self.folder / f".{name}.{self.mark}.tmp"
        self.written[path] = self.folder / name
        writer(path)
        if os.name == "posix":  # safetensors makes files that only their owner reads
            os.chmod(path, 0o666 & ~_umask())
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        return sha256_of(path)

    def drop(self, name: str) -> None:
        """Have `publish` remove this file, if there is one."""
        self.dropped.append(self.folder / name)

    def publish(self) -> None:
        """Remove what is dropped and rename the rest, in the order written. If one cannot be, all is put back."""
        moves = [*((None, final) for final in self.dropped), *self.written.items()]
        kept = {final: self.folder / f".{final.name}.{self.mark}.old" for _, final in moves}
        done: list[Path] = []
        try:
            for path, final in moves:
                if final.is_file():
                    _second_name(final, kept[final])
                done.append(final)
                final.unlink(missing_ok=True) if path is None else os.replace(path, final)
        except BaseException:
            for final in done:
                if kept[final].exists():
                    os.replace(kept[final], final)
                elif final.is_file():
                    final.unlink()
            raise
        finally:
            for old in kept.values():
                old.unlink(missing_ok=True)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            descriptor = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def __exit__(self, *_: object) -> None:
        for path in self.written:
            path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _second_name(path: Path, name: Path) -> None:
    """The file under `name`, too; or instead, where the file system has no links."""
    try:
        os.link(path, name)
    except OSError:
        os.replace(path, name)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
