"""What the rows say, in plain sentences: what is saved, where a trivial baseline wins, where time did not fall.

Winnow's own.
"""

from __future__ import annotations

from collections.abc import Sequence

from winnow.measure.record import Row
from winnow.view.rows import Group, absent, at, family, gmac, name, percent, speed, things, top1, verdict


def sentences(group: Group) -> list[str]:
    """Plain-language findings of one group, most important first; method spellings stand between backticks."""
    parts = [_agreement(group), _plain(group), _best(group), _baselines(group), _absent(group), _frontier(group)]
    parts += _clock(group)
    return [part for part in parts if part]


def _plain(group: Group) -> str:
    plain = group.plain
    right = top1(plain) if plain is not None else None
    if plain is None or right is None:
        return ""
    cost = gmac(plain)
    words = f"The plain model is right on {percent(right.value)} %"
    words += f" of {plain.data.n} {things(group.rows)}" if plain.data else ""
    words += f" (95 % interval {percent(right.low)}–{percent(right.high)})"
    return words + (f" at {cost:.3g} GMAC per {things(group.rows)[:-1]}." if cost is not None else ".")


def _best(group: Group) -> str:
    right = top1(group.plain) if group.plain is not None else None
    rows = _methods(group)
    if right is None or not rows:
        return ""
    near = [row for row in rows if _value(row) >= right.value - 0.01 - 1e-9 and (group.saving(row) or 1) < 1]
    if not near:
        return "No method stays within 1 point of the plain model while saving MACs."
    best = min(near, key=lambda row: group.saving(row) or 1)
    gap = _value(best) - right.value
    words = f"The cheapest method within 1 point of plain is `{name(best)}`: {percent(_value(best))} % "
    words += f"({_signed(100 * gap)} points) with {percent(1 - (group.saving(best) or 1), 0)} % fewer MACs"
    words += "".join(f"; {_pace(best, batch)}" for batch in _batches([best])) + "."
    wide = (right.high - right.low) / 2
    if wide > 0.01:
        words += (
            f" One point is less than these {things(group.rows)} resolve (±{percent(wide)}): rely on the paired tests."
        )
    return words


def _pace(row: Row, batch: int) -> str:
    one = at(row, batch)
    assert one is not None
    span = f"{one.low:.2f}–{one.high:.2f}"
    if speed(one) == "same":
        return f"at batch {batch} no measurable speed-up (interval {span})"
    share = percent(1 / one.ratio, 0)
    return f"at batch {batch} it takes {share} % of the plain model's time (speed {one.ratio:.2f}, {span})"


def _baselines(group: Group) -> str:
    tested = [row for row in _methods(group) if _against(row) is not None]
    if not tested:
        return ""
    how: dict[str, list[Row]] = {"wins": [], "even": [], "loses": []}
    for row in tested:
        how[verdict(_against(row))].append(row)
    better = f"better (paired p < 0.05{': ' if how['wins'] else ''}{_list(how['wins'])})"
    words = (
        f"Against the best trivial baseline of equal cost, {len(how['wins'])} of {len(tested)} settings are {better}, "
    )
    words += f"{len(how['even'])} cannot be told apart, {len(how['loses'])} are worse."
    for other in dict.fromkeys(_rival(row) for row in how["loses"]):
        words += f" {other} wins against {_list([row for row in how['loses'] if _rival(row) == other])}."
    if how["even"]:
        words += f" Not shown to beat {_or(dict.fromkeys(_rival(row) for row in how['even']))}: {_list(how['even'])}."
    return words


def _absent(group: Group) -> str:
    missing = absent(group)
    if not missing:
        return ""
    return f"Not among the baselines, because this family of models does not take it: {', '.join(missing)}."


def _frontier(group: Group) -> str:
    """How many settings of each family no other row beats on both accuracy and MACs."""
    scored = [row for row in group.rows if top1(row) is not None and row.macs is not None and row.role != "plain"]
    if len(scored) < 3:
        return ""
    best, front = -1.0, []
    for row in sorted(scored, key=lambda row: (gmac(row) or 0, -_value(row))):
        if _value(row) > best:
            best = _value(row)
            front.append(row)
    kinds = dict.fromkeys(family(row) for row in scored)
    counts = [(kind, _count(front, kind), _count(scored, kind)) for kind in kinds]
    on = ", ".join(f"{kind} {mine} of {all_}" for kind, mine, all_ in counts if mine)
    off = ", ".join(kind for kind, mine, _ in counts if not mine)
    words = f"On the frontier, where nothing else measured is both cheaper and as accurate: {on} settings."
    return words + (f" Never on it: {off}." if off else "")


def _count(rows: Sequence[Row], kind: str) -> int:
    return sum(family(row) == kind for row in rows)


def _clock(group: Group) -> list[str]:
    rows = [row for row in group.rows if row.role != "plain"]
    found = [_times(group, rows, batch) for batch in _batches(rows)]
    return [words for words in found if words]


def _times(group: Group, rows: Sequence[Row], batch: int) -> str:
    timed = [(row, one) for row in rows if (one := at(row, batch)) is not None]
    same = [row for row, one in timed if speed(one) == "same"]
    slow = [row for row, one in timed if speed(one) == "slower"]
    held = sorted(one.ratio * share for row, one in timed if (share := group.saving(row)))
    noisy = [row for row, one in timed if not one.null_low <= 1 <= one.null_high]
    parts = []
    if held:
        middle = held[len(held) // 2]
        parts.append(
            f"measured speed is {held[0]:.2f} to {held[-1]:.2f} of what the MACs promise (median {middle:.2f})"
        )
    if same:
        parts.append(f"no measurable speed-up (the interval covers 1.0) from {_list(same)}")
    if slow:
        parts.append(f"slower than plain: {_list(slow)}")
    if noisy:
        parts.append(f"the A/A null run misses 1.0 in {len(noisy)} of {len(timed)} rows, so read these times with care")
    return f"At batch {batch}: " + "; ".join(parts) + "." if parts else ""


def _agreement(group: Group) -> str:
    rows = [row for row in group.rows if row.role != "plain" and row.accuracy and top1(row) is None]
    agree = [row.accuracy.agreement for row in rows if row.accuracy and row.accuracy.agreement is not None]
    if not agree:
        return ""
    why = "The weights are random" if group.rows[0].weights is None else "No labels were given"
    return (
        f"{why}, so accuracy means nothing here: only agreement with the plain model is shown, "
        f"{percent(min(agree))} to {percent(max(agree))} % of {things(group.rows)}."
    )


def _methods(group: Group) -> list[Row]:
    return [row for row in group.rows if row.role == "method" and top1(row) is not None]


def _value(row: Row) -> float:
    right = top1(row)
    assert right is not None
    return right.value


def _against(row: Row):
    right = top1(row)
    return right.vs_baseline if right is not None else None


def _rival(row: Row) -> str:
    paired = _against(row)
    assert paired is not None
    return paired.against.split("(", 1)[0]


def _batches(rows: Sequence[Row]) -> list[int]:
    return sorted({one.batch for row in rows for one in row.latency})


def _list(rows: Sequence[Row]) -> str:
    """Spellings; where they would fill the page, families with how many of their settings."""
    if len(rows) <= 4:
        return ", ".join(f"`{name(row)}`" for row in rows)
    kinds = dict.fromkeys(family(row) for row in rows)
    return ", ".join(f"{kind} ×{_count(rows, kind)}" for kind in kinds)


def _signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", "−")


def _or(words) -> str:
    return " or ".join(words)
