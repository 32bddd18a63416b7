"""An empty matplotlib figure in fxzip's style."""

from __future__ import annotations

from functools import partial
from io import BytesIO
from typing import Any

from .errors import InputError


def drawing(call: str, width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """(Figure, its axes; an array of them for several columns). No window, no global state; notebooks show it.

    Raises InputError without matplotlib (the `report` extra).
    """
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(f'{call} draws with matplotlib: pip install "fxzip[report]"') from error
    figure: Any = Figure(figsize=(width, height), layout="constrained")
    figure._repr_png_ = partial(_png, figure)  # a Figure alone is shown only where pyplot was imported
    axes = figure.subplots(1, columns)
    for one in [axes] if columns == 1 else axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
