"""What a numerical proof of the spaces found: the figures, and whether they prove anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .errors import VerificationError

TOLERANCE = 1e-6  # relative, float64; wrong rules give 1e-3 and more, rounding 1e-12


@dataclass(frozen=True)
class Verification:
    """Figures are relative to the largest output, in float64.

    error: output change under random group elements. controls: output change with one use left out, by use.
    roles: output change when weight moves between copies (nan: no unit can be copied); roles_control: when
    it is taken from one. sensitivity: output change between two inputs (0: the output tells nothing). rounding:
    output change when parameters move by 1e-15 of themselves, as they are or with copies, the larger; measured when
    `error` or `roles` is not small.
    redrawn: the parameters were random, because the model's own showed nothing (silent units, zeros). What group
    elements do to the output is then the proof by itself: if no control fires there either, which feature is which
    makes no difference to the output (a branch that nobody reads, a mean), and no merge of them can either.
    """

    error: float
    controls: Mapping[str, float]
    roles: float
    roles_control: float
    sensitivity: float
    spaces: int
    rounding: float = 0.0
    redrawn: bool = False

    @property
    def problems(self) -> tuple[str, ...]:
        """Why this is no proof; empty when it is one."""
        found = []
        noise = max(self.error, 1e-13)
        if self.blind:
            return (
                "the outputs hold no numbers to compare, but indices or truth values alone, or NaN: nothing is proven;"
                " let forward_fn= return the scores that they are chosen by",
            )
        if self.chaotic:
            return (
                f"rounding alone changes the output by {self.rounding:.1e} (tolerance {TOLERANCE:.0e}):"
                " nothing is proven on this input; give another example, such as a larger image",
            )
        if not self.error < TOLERANCE:
            found.append(f"a random group element changes the output by {self.error:.1e} (tolerance {TOLERANCE:.0e})")
        if not self.sensitivity > 1e3 * noise:
            found.append(f"the output hardly depends on the input ({self.sensitivity:.1e}): nothing is proven")
        fired = [fires(c, self.error) for c in self.controls.values()]
        if fired and not any(fired) and not self.redrawn:
            found.append("no negative control fired: leaving a use out changes nothing, so nothing is proven")
        if not np.isnan(self.roles) and not self.roles < TOLERANCE:
            found.append(
                f"moving weight between copies of a unit changes the output by {self.roles:.1e}: a role is wrong"
            )
        if not self.redrawn and not np.isnan(self.roles) and not fires(self.roles_control, self.roles):
            found.append("the negative control for roles did not fire")
        return tuple(found)

    @property
    def blind(self) -> bool:
        """No output is a number, or one is NaN: nothing tells two inputs apart."""
        return bool(np.isnan(self.sensitivity))

    @property
    def chaotic(self) -> bool:
        """Rounding alone comes near the tolerance (in a network that does not amplify it, 1e-14)."""
        return self.rounding >= TOLERANCE / 100

    @property
    def inconclusive(self) -> bool:
        """Nothing is known to be wrong, and nothing proven: a control did not fire, or rounding drowns it all."""
        right = self.error < TOLERANCE and not self.roles >= TOLERANCE
        return (right or self.chaotic) and bool(self.problems)

    @property
    def ok(self) -> bool:
        return not self.problems

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        fired = sum(fires(c, self.error) for c in self.controls.values())
        head = "sound" if self.ok else "NOT PROVEN" if self.blind or self.inconclusive else "NOT SOUND"
        text = (
            f"{head}: {self.spaces} spaces, error {self.error:.1e}, controls {fired}/{len(self.controls)} fired,"
            f" roles {self.roles:.1e} (control {self.roles_control:.1e}), sensitivity {self.sensitivity:.1e}"
            + ", on random parameters: the model's own show nothing" * self.redrawn
        )
        return "\n  - ".join([text, *self.problems])

    def check(self) -> None:
        """Raises VerificationError unless ok."""
        if not self.ok:
            raise VerificationError(
                f"{self}\nNothing was merged. Run fxzip.inspect(model, example_inputs) and report "
                "the graph, or keep the part from the failing node on per model with until=."
            )


def fires(control: float, error: float) -> bool:
    """Whether a negative control stands out from the error."""
    return control > 100 * max(error, 1e-13)
