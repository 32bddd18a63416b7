"""The page: tables made here, drawings by assets/*.js from one block of JSON. Nothing is fetched."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import fx

from ..errors import InputError
from ..frontier import Frontier
from ..markup import Raw, cell, items, table
from ..report import Report, number, report

Measured = Mapping[str, Mapping[str, float]]
_SCRIPTS = ("vendor/cytoscape.min.js", "vendor/dagre.min.js", "vendor/chart.umd.min.js")
_OWN = ("layout.js", "graph.js", "panel.js", "charts.js", "main.js")


def write(
    zipped: fx.GraphModule | Report,
    path: str | os.PathLike[str],
    *,
    frontier: Frontier | None = None,
    measured: Measured | None = None,
    title: str | None = None,
) -> Path:
    """Write what is known of a merge as one HTML file that needs no network; returns its path.

    zipped: the result of `fxzip.merge` or `fxzip.load`, or its Report. frontier: from `fxzip.frontier`. measured:
    figures of your own by network ("merged", "ensemble", "average", a task's name, or any other): {"merged": {"cats":
    91.5, "dogs": 88.0}}. What is not known (no solve: no errors per layer) the page says.
    Raises InputError for another module, for figures that are no numbers, and where the file cannot be written.

    >>> from tempfile import mkdtemp
    >>> import torch, fxzip
    >>> a, b = (torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)) for _ in "ab")
    >>> zipped = fxzip.merge([a, b], [torch.randn(32, 4)], progress=False)
    >>> write(zipped, Path(mkdtemp()) / "report.html").stat().st_size > 10_000
    True
    """
    text = page(zipped, frontier=frontier, measured=measured, title=title)
    try:
        Path(path).write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise InputError(f"fxzip.html.write: {str(path)!r} cannot be written: {error}") from error
    return Path(path)


def page(
    zipped: fx.GraphModule | Report,
    *,
    frontier: Frontier | None = None,
    measured: Measured | None = None,
    title: str | None = None,
) -> str:
    """The text of the file; see `write`."""
    r = zipped if isinstance(zipped, Report) else report(zipped)
    given = _checked(measured)
    title = title or f"{' + '.join(map(str, r.tasks))} in one network"
    parts = {
        "title": escape(title),
        "lead": escape(_lead(r)),
        "style": _asset("report.css"),
        "summary": summary(r, given),
        "verification": escape(r.verification or "not run: merge(verify=False)"),
        "spaces": spaces(r),
        "frozen": items(r.frozen) if r.frozen else "<p>Every operator on the way has a rule.</p>",
        "notices": items(r.notices) if r.notices else "<p>None.</p>",
        "settings": _pairs(r.settings, "The settings of this merge were not kept."),
        "versions": _pairs(r.versions, "The versions of this merge were not kept."),
        "seconds": _pairs({k: f"{v:.2f} s" for k, v in r.seconds.items()}, "The times of this merge were not kept."),
        "data": as_json(data(r, frontier)),
        "vendor": "\n".join(f"<script>{_asset(name)}</script>" for name in _SCRIPTS),
        "script": "\n".join(_asset(name) for name in _OWN),
    }
    # One pass over the template: what is put in is not searched for further marks.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _asset("page.html"))


def summary(r: Report, measured: Measured) -> str:
    """The networks, what they cost, and what was measured of them."""
    flops, parameters = [s.flops or 0 for s in r.inputs], [s.parameters or 0 for s in r.inputs]
    costs = {s.name: (s.parameters, s.flops) for s in r.inputs}
    costs["ensemble"] = (sum(parameters), sum(flops))
    costs |= {name: (None, None) for name in measured if name not in costs and name != r.result.name}
    costs[r.result.name] = (r.result.parameters, r.result.flops)
    columns = list(dict.fromkeys(c for figures in measured.values() for c in figures))
    rows = []
    for name, (size, work) in costs.items():
        times = f"{work / max(*flops, 1):.2f}×" if work and any(flops) else "–"
        figures = [f"{measured[name][c]:.4g}" if c in measured.get(name, {}) else "–" for c in columns]
        rows.append([name, number(size).replace("-", "–"), number(work).replace("-", "–"), times, *figures])
    text = table(["network", "parameters", "FLOPs", "times one network", *columns], rows)
    return text if columns else text + "<p class=note>No figures were given: write(…, measured={…}) adds columns.</p>"


def spaces(r: Report) -> str:
    """A row per merged space; the names are links that light it up."""
    rows = []
    for s in r.spaces:
        widths = " + ".join(map(str, s.width_in)) + f" → {s.width}"
        link = Raw(f'<a href="#space={escape(s.name, quote=True)}" data-space="{escape(s.name, quote=True)}">'
                   f"{cell(s.name)}</a>")  # fmt: skip
        figures = ["–" if v is None or v != v else f"{v:.3f}" for v in (s.quality, s.baseline)]
        rows.append([link, s.structure, widths, *figures, len({t.split("[")[0] for t in s.tied}) or "–"])
    if not rows:
        return "<p>No space was merged.</p>"
    return table(["space", "structure", "widths", "correlation, matched", "averaged", "tied parameters"], rows)


def data(r: Report, frontier: Frontier | None) -> dict[str, Any]:
    """What the drawings read."""
    points = [] if frontier is None else [asdict(p) for p in frontier.points]
    for p in points:
        p["measured"] = p["measured"] if isinstance(p["measured"], (int, float)) else None
    return {
        "tasks": r.tasks,
        "nodes": [asdict(n) for n in r.nodes],
        "spaces": [asdict(s) for s in r.spaces],
        "layers": [asdict(row) for row in r.layers],
        "frontier": points,
    }


def as_json(value: Any) -> str:
    """JSON that may stand inside <script>: no character that HTML or JavaScript could read as its own."""

    def finite(x: Any) -> Any:
        if isinstance(x, Mapping):
            return {str(k): finite(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return [finite(v) for v in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    text = json.dumps(finite(value), separators=(",", ":"), allow_nan=False)  # ASCII, so no line separators
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _lead(r: Report) -> str:
    count = f"{len(r.tasks)} networks" if len(r.tasks) != 1 else "1 network"
    return f"{count} merged by {r.method}; {r.shared:.1%} of the parameters are shared by all tasks."


def _checked(measured: Any) -> Measured:
    found = {} if measured is None else measured
    fits = isinstance(found, Mapping) and all(
        isinstance(row, Mapping) and all(isinstance(v, (int, float)) for v in row.values()) for row in found.values()
    )
    if not fits:
        raise InputError(
            "fxzip.html: measured= is a dict of dicts of numbers by network, {'merged': {'accuracy': 91.5}},"
            f" not {measured!r:.80}"
        )
    return found


def _pairs(values: Mapping[str, str], missing: str) -> str:
    if not values:
        return f"<p>{cell(missing)}</p>"
    none = "–"
    return f"<dl>{''.join(f'<dt>{cell(k)}</dt><dd>{cell(v or none)}</dd>' for k, v in values.items())}</dl>"


def _asset(name: str) -> str:
    return files("fxzip.html").joinpath("assets").joinpath(*name.split("/")).read_text(encoding="utf-8")
