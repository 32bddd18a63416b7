"""What coverage.py found, as documents: docs/COVERAGE.md and docs/coverage.json."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from coverage_model import CAP, RECOVERED, SAMPLES

Row = dict[str, Any]
SUITES = ("torchvision", "timm", "transformers", "others", "toys")  # in the order of the table
TITLE = "Which models fxzip traces, proves and merges."


def latest(cache: Path) -> dict[str, Row]:
    """The last row of every model; one that was only analysed is no news where the same code has merged the model."""
    found: dict[str, Row] = {}
    for line in cache.read_text(encoding="utf-8").splitlines() if cache.is_file() else ():
        row = json.loads(line)
        key = f"{row['suite']}:{row['name']}"
        old = found.get(key, {})
        if not ("recovered" in old and "recovered" not in row and old.get("code") == row.get("code")):
            found[key] = row
    return found


def outcome(row: Row) -> str:
    if str(row.get("error")).startswith("more than") and "sound" not in row:
        return "unfinished"
    if row.get("sound") is False:
        return "no proof" if row.get("inconclusive") else "UNSOUND"
    if "recovered" in row:
        return "recovered" if row["recovered"] else "not exact"
    return "sound" if row.get("sound") else "refused"


def family(row: Row, kinds: dict[str, str]) -> str:
    """The suite; torchvision's by task, its detectors by part."""
    kind = kinds.get(row["name"]) if row["suite"] == "torchvision" else None
    return f"{row['suite']}, {kind}" if kind else row["suite"]


def write(rows: dict[str, Row], folder: Path) -> None:
    """The table, with a count per family, and all numbers as JSON."""
    from zoo import torchvision_kinds
    from zoo_others import SUITES as MODELS

    kinds = torchvision_kinds() if any(r["suite"] == "torchvision" for r in rows.values()) else {}
    order = sorted(rows.values(), key=lambda r: (SUITES.index(r["suite"]), family(r, kinds), r["name"]))
    families: dict[str, list[Row]] = {}
    for row in order:
        families.setdefault(family(row, kinds), []).append(row)
    there = Counter(family({"suite": s, "name": n}, kinds) for s in {r["suite"] for r in order} for n in MODELS[s]())
    lines = ["# Coverage", "", TITLE, "", _HOW, "", *_origin(order), "", _COUNTS, "|---|" + "--:|" * 10]
    lines += [_counts(name, own, there[name]) for name, own in families.items()]
    lines += [_counts("all", order, there.total()), "", *_seconds(families), *_other_classes(order)]
    lines += _peers(folder / "coverage_peers.json")
    for name, own in families.items():
        lines += ["", f"## {name}", "", _HEADER, "|" + "---|" * _HEADER.count(" | ") + "---|"]
        lines += [_line(r) for r in own]
    folder.mkdir(exist_ok=True)
    (folder / "COVERAGE.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "coverage.json").write_text(json.dumps(order, indent=1) + "\n", encoding="utf-8")


_HOW = f"""Made by `python benchmarks/coverage.py`; random weights, small inputs, one thread. *sound*: a random
element of the inferred group leaves the output unchanged (float64), leaving a use out does not. *recovered*: merging
the model with its scrambled copy (`method="permute"`, with `memory=` where moments and matrices would need more than
{CAP >> 30} GiB; in rows of earlier code "rebasin" above 5 GiB; {SAMPLES} random inputs) gives the model back to
{RECOVERED}. *spaces*: with parameters + blocks without (heads). *free*: share of the parameters with an axis on a
space. *shared*: share of the merged network's parameters that both models use. *compiles*: torch.compile with
aot_eager and fullgraph; *exports*: torch.export; of the merged network, not tried where it says -. Seconds are of one
core's processor time: for `fxzip.inspect`, with the proof, with the merge and all else; in brackets wall-clock
seconds of a busy machine. MB: peak of the process, with the temporary files of `memory=`, which are mapped. *no
proof*: nothing was wrong, but the output hardly moves, so nothing is proven and fxzip refuses. *sound* as an outcome:
analysed and proven, not merged here. *unfinished*: processor time was up. *models*: of the family, also those not
tried yet. A detector is here three times: its backbone with the neck; that with the heads which every pixel has
(dense); and whole, with boxes chosen from data, which no front end can trace."""
_COUNTS = (
    "| family | models | tried | traced | sound | unsound | recovered | of those merged | compile | export"
    " | of those run |"
)
_HEADER = (
    "| model | outcome | rung | nodes | spaces | free | proof error | sensitivity | recovery error | shared | compiles"
    " | exports | s (inspect) | s (proof, too) | s (all) | MB | code | why not all |"
)


def _origin(rows: list[Row]) -> list[str]:
    """Dates, machines, versions; and how many rows each state of the code has made."""

    def distinct(key: str) -> list[str]:
        return sorted({part for r in rows for part in r.get(key, "").split(", ") if part})

    codes = Counter(r.get("code", "") for r in rows)
    named = [f"{count} with {code}" for code, count in codes.most_common() if code]
    if not named:
        return [f"{len(rows)} models."]
    days, rest = distinct("date"), codes[""]
    text = f"{len(rows)} models, by state of the code (a hash of fxzip/): {', '.join(named)}"
    text += f", {rest} with earlier ones." if rest else "."
    text += f" {' to '.join(dict.fromkeys((days[0], days[-1])))}, {', '.join(distinct('machine'))},"
    return [f"{text} {', '.join(distinct('versions'))}."]


def _counts(name: str, own: list[Row], there: int) -> str:
    counts = [there, len(own), sum("rung" in r for r in own), sum(r.get("sound") is True for r in own)]
    counts += [sum(outcome(r) == "UNSOUND" for r in own), sum(r.get("recovered") is True for r in own)]
    counts += [sum("recovered" in r for r in own)]
    counts += [sum(r.get(way) is True for r in own) for way in ("compiles", "exports")]
    counts += [sum("compiles" in r for r in own)]
    return f"| {name} | {' | '.join(map(str, counts))} |"


def _seconds(families: dict[str, list[Row]]) -> Iterable[str]:
    """Median and worst analysis of torchvision's and timm's models."""
    for key, what in (("inspect_seconds", "`fxzip.inspect`"), ("analysis_seconds", "`fxzip.inspect` and the proof")):
        found = [r for n, own in families.items() for r in own if key in r and "inspect_seconds" in r
                 and n.startswith(("torchvision", "timm"))]  # fmt: skip
        if found:
            worst = max(found, key=lambda r: r[key])
            middle = median(r[key] for r in found)
            yield (
                f"{what}, {len(found)} models of torchvision and timm: median {middle:.1f} s, worst {worst[key]:.1f} s"
                f" ({worst['name']}).\n"
            )


def _other_classes(rows: list[Row]) -> Iterable[str]:
    tried = [r for r in rows if "other_classes" in r]
    if tried:
        found = ", ".join(f"{r['name']} {'yes' if r['other_classes'] else 'no'}" for r in tried)
        worst = max(r["other_classes_error"] for r in tried)
        yield (
            f"Merged with a scrambled model for other classes, each head as its model (error at most {worst:.1e}):"
            f" {found}.\n"
        )


def _peers(path: Path) -> Iterable[str]:
    """The same question to other tools, as coverage_peers.py found it."""
    if not path.is_file():
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    yield "## The same models in other tools\n"
    yield found["how"] + "\n"
    yield "| tool | suite | tried | analysed | out of time | pass the permutation test |\n|---|---|--:|--:|--:|--:|"
    for tool, suites in found["counts"].items():
        for suite, c in suites.items():
            yield (
                f"| {tool} {found['versions'][tool]} | {suite} | {c['tried']} | {c['analysed']} | {c['late']} |"
                f" {c['passed']} |"
            )


def _line(row: Row) -> str:
    def number(key: str) -> str:
        return f"{row[key]:.1e}" if isinstance(row.get(key), float) else "-"

    spaces = f"{row['spaces']} + {row['block_spaces']}" if "spaces" in row else "-"
    free = f"{100 * row['free']:.1f} %" if "free" in row else "-"
    why = "; ".join([*row.get("frozen", [])[:3], row.get("error", "")]).strip("; ").splitlines()
    cells = [row["name"], outcome(row), row.get("rung", "-"), row.get("nodes", "-"), spaces, free]
    cells += [number("proof_error"), number("sensitivity"), number("recovery_error")]
    cells += [f"{100 * row['shared']:.1f} %" if "shared" in row else "-"]
    cells += [{True: "yes", False: "no"}.get(row.get(way), "-") for way in ("compiles", "exports")]
    seconds = [row.get(k, "-") for k in ("inspect_seconds", "analysis_seconds", "seconds")]
    cells += seconds if "inspect_seconds" in row else [f"({s})" if s != "-" else s for s in seconds]
    cells += [row.get("megabytes", "-"), row.get("code", "earlier")]
    return f"| {' | '.join(map(str, cells))} | {(why or [''])[0].replace('|', '/')[:160]} |"
