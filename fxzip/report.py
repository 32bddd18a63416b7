"""What a merge did, as a value that prints as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from . import markup
from .errors import InputError
from .heatmap import HeatMap

_SPACE_HEADER = ("space", "structure", "width", "quality", "averaged")


@dataclass(frozen=True)
class SpaceRow:
    """One merged space. width_in: n_i per model; width: m.

    quality: mean correlation between merged features of different models; baseline: the same under plain
    averaging. None or NaN where it was not measured. parents: spaces whose features are blocks of this one's.
    tied: what lies on it, `conv1.weight[0] produce`. own, matched: correlations between the first two models'
    features, in their own order and as merged; None where activations were not measured.
    """

    name: str
    structure: str
    width_in: tuple[int, ...]
    width: int
    quality: float | None = None
    baseline: float | None = None
    parents: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    own: HeatMap | None = None
    matched: HeatMap | None = None


@dataclass(frozen=True)
class NodeRow:
    """One tensor-valued node of the merged graph. call: what it does, `Conv2d`, `relu`; module: path of the module
    that it stands in; inputs: names of rows; type: `[1, s0:64, 8, 8]`; spaces: on its axes; state: "merged", "per
    model" or "frozen: why"; task: the model it belongs to, "" for all; line: of the user's code.
    """

    name: str
    call: str
    module: str = ""
    inputs: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    type: str = ""
    spaces: tuple[str, ...] = ()
    state: str = ""
    task: str = ""
    line: str = ""


@dataclass(frozen=True)
class LayerRow:
    """One fit of solve: squared error against its target, relative to the target's square, on the merged network's
    own inputs, with matched and with fitted weights. node: as in the models' graph; task: "" for a shared layer.
    """

    node: str
    kind: str
    before: float | None
    after: float | None
    task: str = ""


@dataclass(frozen=True)
class Size:
    """Parameters and FLOPs (of one example) of a network."""

    name: str
    parameters: int
    flops: int | None = None


@dataclass(frozen=True)
class Report:
    """The result of one `fxzip.merge`; `str()` is the summary table.

    method: the matcher's short name. tasks: one name per model. inputs, result: sizes. shared: fraction of
    the result's parameters that all tasks use. spaces: one row per merged space. frozen: what could not be
    merged and why. notices: what the user should know. verification: one line, "" when it was not run.
    seconds: per stage. nodes: the merged graph; layers: fits of solve, in order; settings: of the call;
    versions: of what ran it.

    >>> print(Report("zip", ("a",), (Size("a", 10),), Size("merged", 10), 1.0))  # doctest: +ELLIPSIS
    fxzip: 1 model merged by zip (a)
    ...
    """

    method: str
    tasks: tuple[str, ...]
    inputs: tuple[Size, ...]
    result: Size
    shared: float
    spaces: tuple[SpaceRow, ...] = ()
    frozen: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    verification: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    nodes: tuple[NodeRow, ...] = ()
    layers: tuple[LayerRow, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        models = f"{len(self.tasks)} model{'s' if len(self.tasks) != 1 else ''}"
        lines = [f"fxzip: {models} merged by {self.method} ({', '.join(self.tasks)})", ""]
        lines += table(
            ("network", "parameters", "FLOPs"), [_size_row(s) for s in (*self.inputs, self.result)]
        )
        lines += ["", f"{self.shared:.1%} of the merged parameters are shared by all tasks"]
        if self.spaces:
            lines += [
                "",
                *table(_SPACE_HEADER, map(_space_row, self.spaces)),
            ]
        for title, entries in (("not merged", self.frozen), ("notices", self.notices)):
            lines += ["", f"{title}:", *(f"  {e}" for e in entries)] if entries else []
        if self.verification:
            lines += ["", f"verification: {self.verification}"]
        if self.seconds:
            lines += ["", "seconds: " + ", ".join(f"{k} {v:.1f}" for k, v in self.seconds.items())]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The same as tables, for notebooks."""
        parts = [
            f"<p>{markup.cell(str(self).splitlines()[0])}</p>",
            markup.table(("network", "parameters", "FLOPs"), map(_size_row, (*self.inputs, self.result))),
            markup.table(_SPACE_HEADER, map(_space_row, self.spaces)) if self.spaces else "",
        ]
        for title, entries in (("not merged", self.frozen), ("notices", self.notices)):
            parts += [f"<p>{title}</p>{markup.items(entries)}"] if entries else []
        return "".join([*parts, f"<p>verification: {markup.cell(self.verification or 'not run')}</p>"])

    def with_(self, **changes: Any) -> Report:
        """A copy with some fields replaced."""
        return replace(self, **changes)


def report(zipped: fx.GraphModule) -> Report:
    """The Report of a merged module. Raises InputError for any other module."""
    notes = getattr(zipped, "meta", {}).get("fxzip")
    found = notes.get("report") if isinstance(notes, dict) else None
    if not isinstance(found, Report):
        raise InputError(
            f"report: expected the result of fxzip.merge, got a {type(zipped).__name__} without its report"
        )
    return found


def table(header: Sequence[str], rows: Any) -> list[str]:
    """Lines of a table: first column left, the others right."""
    cells = [tuple(header), *(tuple(str(c) for c in row) for row in rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(header))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in cells
    ]
    return [lines[0], "  ".join("-" * w for w in widths), *lines[1:]]


def number(value: int | None) -> str:
    """`11.7M`, `1.8G`; `-` for None."""
    if value is None:
        return "-"
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.2f}{unit}"
    return str(value)


def _size_row(size: Size) -> tuple[str, ...]:
    return size.name, number(size.parameters), number(size.flops)


def _space_row(row: SpaceRow) -> tuple[str, ...]:
    same = set(row.width_in) == {row.width}
    width = str(row.width) if same else f"{'+'.join(map(str, row.width_in))} -> {row.width}"
    scores = ["-" if v is None or v != v else f"{v:.3f}" for v in (row.quality, row.baseline)]
    return row.name, row.structure, width, *scores
