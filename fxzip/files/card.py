"""README.md of a saved network: the model card."""

from __future__ import annotations

from ..report import Report, number
from .plan import PLAN, TENSORS, Plan

CARD_TEXT = """\
---
library_name: fxzip
tags:
- model-merging
- pytorch
---

# {count} networks in one

{what}

{facts}
Tensors are in `{tensors}`, everything else in `{plan}`; there is no pickle. Written by fxzip {fxzip} with
torch {torch}.

## Load it

`model_fn` builds the architecture of one of the merged networks, with any weights. Write it with no argument,
or with the task's name as its argument if the networks differ, say in their number of classes.

```python
import fxzip

zipped = fxzip.load("path/to/this/folder", model_fn)
outputs = zipped(inputs)    # {outputs}
print(fxzip.report(zipped))
{first} = fxzip.extract(zipped, {task!r})
```

## Report

```
{summary}
```
"""


def card(plan: Plan) -> str:
    """The text of README.md."""
    tasks = ", ".join(f"`{t}`" for t in plan.tasks)
    mean, beside = "the mean of the models' outputs", "the outputs of all tasks side by side, in this order"
    each = (
        "a dict of outputs by task" if plan.as_dict else f"a tuple of {len(plan.tasks)} outputs, one per task"
    )
    first = plan.tasks[0] if plan.tasks[0].isidentifier() else "network"
    return CARD_TEXT.format(
        count=len(plan.tasks), what=_what(plan, tasks), facts=_facts(plan.report) if plan.report else "",
        tensors=TENSORS, plan=PLAN, fxzip=plan.fxzip, torch=plan.torch, first=first, task=plan.tasks[0],
        outputs={"separate": each, "concat": beside, "joint": beside + ", made comparable"}.get(plan.heads, mean),
        summary=plan.summary or "none: not made by fxzip.merge",
    )  # fmt: skip


def _what(plan: Plan, tasks: str) -> str:
    how = f" by the method `{plan.report.method}`" if plan.report else ""
    return (
        f"One network merged from {len(plan.tasks)} trained ones of the same architecture{how}, without"
        f" training and without labels. Tasks: {tasks}."
    )


def _facts(report: Report) -> str:
    """A table with a row per network, and the share."""
    rows = ["| network | parameters | FLOPs |", "|---|---:|---:|"]
    rows += [
        f"| {s.name} | {number(s.parameters)} | {number(s.flops)} |" for s in (*report.inputs, report.result)
    ]
    return "\n".join([*rows, "", f"{report.shared:.1%} of the parameters are shared by all tasks.", "", ""])
