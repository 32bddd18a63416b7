"""The command line. Typer, pydantic and YAML come with the extra `cli`; `import fxzip` needs none of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

NEEDS = {"typer", "pydantic", "pydantic_core", "yaml"}
MANY = ("--weights", "--name", "--data")  # options of merge that take several values: --weights a.pt b.pt


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; -> its exit code: 0 done, 1 refused or failed, 2 the call is wrong."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if error.name not in NEEDS:
            raise
        print(f'fxzip: the command line needs {error.name}: pip install "fxzip[cli]"', file=sys.stderr)
        return 1
    try:
        app(args=spread(sys.argv[1:] if argv is None else list(argv)), prog_name="fxzip")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def spread(argv: Sequence[str]) -> list[str]:
    """Of `merge`: `--weights a b` as `--weights a --weights b`, up to the next option.

    >>> spread(["merge", "--weights", "a", "b", "--out", "c"])
    ['merge', '--weights', 'a', '--weights', 'b', '--out', 'c']
    """
    if argv[:1] != ["merge"]:  # elsewhere, what follows may be an argument
        return list(argv)
    found: list[str] = []
    current = ""
    for word in argv:
        if word.startswith("-") and len(word) > 1:
            current = word if word in MANY else ""
            found.append(word)
        else:
            found += [current, word] if current and found[-1] != current else [word]
    return found
