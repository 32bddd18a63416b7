"""What fxzip raises. Every message says what, where (node and the user's line) and the way out."""

from __future__ import annotations


class FxzipError(Exception):
    """Base class of everything fxzip raises on purpose."""


class InputError(FxzipError, ValueError):
    """The call itself is wrong; raised before any expensive work, with every problem listed."""

    @classmethod
    def listing(cls, call: str, problems: list[str]) -> InputError:
        """One error for all `problems` of one call."""
        if len(problems) == 1:
            return cls(f"{call}: {problems[0]}")
        lines = "\n".join(f"  {i}. {p}" for i, p in enumerate(problems, 1))
        return cls(f"{call}: {len(problems)} problems\n{lines}")


class TraceError(FxzipError):
    """The model could not be turned into a graph that computes the same."""


class SpaceError(FxzipError):
    """Feature spaces do not allow what was asked."""


class VerificationError(FxzipError):
    """A proof on the user's own model failed: nothing is merged."""


class Interrupted(FxzipError, KeyboardInterrupt):
    """A signal stopped the work at a point from which it can be resumed."""


class MergeWarning(UserWarning):
    """The merge was made, but something about it is likely to disappoint."""
