"""Match: Moments -> Matching (M, U) per space. Matchers see numbers, never graphs."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from ..errors import InputError
from .average import Average
from .c2m3 import C2M3
from .cca import CCA
from .matching import (
    Affinity,
    Matcher,
    Matching,
    Matchings,
    from_slots,
    lossless,
    needs,
    optimal_unmerge,
    similarity,
    widens,
)
from .mudsc import MuDSC
from .pair import Pair
from .permute import Permute
from .readers import Read, reading
from .rebasin import Rebasin
from .select import Select
from .suited import Suited
from .sweeps import match
from .transport import Transport
from .unmerge import Unmerge
from .weights import Weights
from .zip import Zip

MATCHERS: tuple[type[Matcher], ...] = (
    Average, Rebasin, C2M3, Permute, Zip, Pair, Transport, CCA, MuDSC, Select, Unmerge,
)  # fmt: skip

__all__ = [
    "C2M3",
    "CCA",
    "MATCHERS",
    "Affinity",
    "Average",
    "Matcher",
    "Matching",
    "Matchings",
    "MuDSC",
    "Pair",
    "Permute",
    "Read",
    "Rebasin",
    "Select",
    "Suited",
    "Transport",
    "Unmerge",
    "Weights",
    "Zip",
    "from_slots",
    "lossless",
    "match",
    "needs",
    "optimal_unmerge",
    "reading",
    "resolve",
    "similarity",
    "widens",
]


def resolve(method: str | Matcher, others: Sequence[str] = ()) -> Matcher:
    """A matcher, from itself or from its short name (with default settings).

    Raises InputError for an unknown name, or for something that is no matcher; others: names that stand for something
    else where the name came from, for its message.

    >>> resolve("zip")
    Zip(alpha=0.3, beta=0.125)
    """
    names = {matcher.name: matcher for matcher in MATCHERS}
    known = [*names, *others]
    methods = ", ".join(known)
    if isinstance(method, str):
        if method in names:
            return names[method]()
        close = difflib.get_close_matches(method.lower(), known, 1, 0.5)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise InputError(f"unknown method {method!r}{hint} Methods: {methods}.")
    if isinstance(method, type) and method in MATCHERS:
        raise InputError(f"method is the class {method.__name__}; pass an object: {method.__name__}()")
    if not isinstance(method, Matcher):
        raise InputError(f"method must be a name or a matcher, not {method!r}. Methods: {methods}.")
    return method
