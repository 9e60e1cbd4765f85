"""What a setting may be: all else is refused, in one line that says what works.

Winnow's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real


def check_number(
    owner: str, name: str, value: object, low: float = 0.0, high: float = math.inf, *,
    whole: bool = False, above: bool = False, below: bool = False,
) -> None:  # fmt: skip
    """ValueError unless it is a finite number from `low` (above: not `low` itself) to `high` (below: not itself).

    name: of the setting; "" where the owner has one alone and it is given by place.
    """
    good = isinstance(value, int if whole else Real) and not isinstance(value, bool)
    number = float(value) if good else math.nan  # type: ignore[arg-type]
    inside = (number > low if above else number >= low) and (number < high if below else number <= high)
    if not inside or not math.isfinite(number):
        given = f"{name}={value!r}" if name else repr(value)
        bounds = f"{'above' if above else 'from'} {low:g}"
        bounds += f" to {'below ' * below}{high:g}" if math.isfinite(high) else ""
        raise ValueError(f"{owner}({given}): a {'whole ' * whole}number {bounds} is needed")


def check_choice(owner: str, name: str, value: object, allowed: Sequence[object]) -> None:
    """ValueError unless it is one of these."""
    if value not in allowed:
        raise ValueError(f"{owner}({name}={value!r}): {name} is one of {', '.join(map(repr, allowed))}")
