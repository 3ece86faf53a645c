"""Questions about named values, for `domains`, whatever the values are read from: bars of a chart, rows of a table.

| question | level | written of a chart | of a document |
| --- | --- | --- | --- |
| value | 1 | `value of red?` | `look up b` |
| plus, minus | 2 | `red + blue`, `red - blue` | `b + d`, `b - d` |
| key | 2 | | `key of 7` |
| tallest, shortest | 3 | `which is tallest?` | |
| above, equal | 3 | `how many above 4?` | `how many rows with 3?` |
| follow | 3 | | `follow b`: what `b` names, if it names a letter |
| spread | 4 | `tallest - shortest` | |
| total | 4 | `sum of all` | `sum of all` |
| chain | 4 | | `follow b + follow d` |

A solution reads what it needs first, in the order of the picture. In style "steps" a line is one reading, or one
operation and its result; in style "states" it is all that has to be kept in mind: the tallest so far, the count so far,
the sum so far, what is left to be added.
"""

from collections.abc import Sequence
from typing import NamedTuple

from opd_jax.worlds.domains_kinds import Style

Item = tuple[str, str]  # a name and its value


class Question(NamedTuple):
    """What is asked, and of which names or number."""

    what: str
    arguments: tuple[str, ...] = ()


LEVEL = {
    "value": 1,
    **dict.fromkeys(("plus", "minus", "key"), 2),
    **dict.fromkeys(("tallest", "shortest", "above", "equal", "follow"), 3),
    **dict.fromkeys(("spread", "total", "chain"), 4),
}
CHART = {
    "value": "value of {}?",
    "plus": "{} + {}",
    "minus": "{} - {}",
    "tallest": "which is tallest?",
    "shortest": "which is shortest?",
    "above": "how many above {}?",
    "spread": "tallest - shortest",
    "total": "sum of all",
}
DOCUMENT = {
    "value": "look up {}",
    "plus": "{} + {}",
    "minus": "{} - {}",
    "key": "key of {}",
    "equal": "how many rows with {}?",
    "follow": "follow {}",
    "total": "sum of all",
    "chain": "follow {} + follow {}",
}


def solve(items: tuple[Item, ...], question: Question, style: Style) -> tuple[list[str], str]:
    """The lines of a solution, and the answer."""
    what, arguments = question
    match what:
        case "value" | "plus" | "minus" | "follow" | "chain":
            return _look_up(dict(items), what, arguments, style)
        case "key":
            return _find(items, arguments[0], style)
        case "tallest" | "shortest":
            return _extreme(items, what, style)
        case "above" | "equal":
            return _count(items, what, arguments[0], style)
        case "spread":
            return _spread(items, style)
        case "total":
            return _total(items, style)
    raise ValueError(f"unknown question {what!r}")


def _read(items: Sequence[Item]) -> list[str]:
    return [f"{name}={value}" for name, value in items]


def _look_up(values: dict[str, str], what: str, names: tuple[str, ...], style: Style) -> tuple[list[str], str]:
    """One or two names looked up, again where a value is a name and is followed; then their sum or difference."""
    sign = "-" if what == "minus" else "+"
    steps, states, left = [], [], list(names)
    for i in range(len(left)):
        while left[i] in values:
            steps.append(f"{left[i]}={values[left[i]]}")
            left[i] = values[left[i]]
            states.append(sign.join(left[: i + 1] if what in ("plus", "minus") else left))
            if what not in ("follow", "chain"):
                break
    if len(left) == 2:
        result = int(left[0]) - int(left[1]) if sign == "-" else int(left[0]) + int(left[1])
        steps.append(f"{sign.join(left)}={result}")
        states.append(str(result))
    else:
        result = left[0]
    return steps if style == "steps" else states, str(result)


def _find(items: tuple[Item, ...], wanted: str, style: Style) -> tuple[list[str], str]:
    """The first name with a value: row after row in "steps", at once in "states"."""
    at = [value for _, value in items].index(wanted)
    name = items[at][0]
    return _read(items[: at + 1]) if style == "steps" else [name], name


def _extreme(items: tuple[Item, ...], what: str, style: Style) -> tuple[list[str], str]:
    best = max if what == "tallest" else min
    so_far = [best(items[: i + 1], key=lambda item: int(item[1])) for i in range(len(items))]
    if style == "states":
        return _read(so_far), so_far[-1][0]
    return [*_read(items), f"{what}={so_far[-1][1]}"], so_far[-1][0]


def _count(items: tuple[Item, ...], what: str, number: str, style: Style) -> tuple[list[str], str]:
    counts = [value > number if what == "above" else value == number for _, value in items]  # single digits
    if style == "states":
        return [str(sum(counts[: i + 1])) for i in range(len(items))], str(sum(counts))
    found = ", ".join(name for (name, _), counted in zip(items, counts) if counted) or "none"
    phrase = f"above {number}" if what == "above" else f"rows with {number}"
    return [*_read(items), f"{phrase}: {found}"], str(sum(counts))


def _spread(items: tuple[Item, ...], style: Style) -> tuple[list[str], str]:
    values = [int(value) for _, value in items]
    so_far = [f"{max(values[: i + 1])}-{min(values[: i + 1])}" for i in range(len(values))]
    answer = str(max(values) - min(values))
    if style == "states":
        return [*so_far, answer], answer
    ends = [f"tallest={max(values)}", f"shortest={min(values)}"]
    return [*_read(items), *ends, f"{so_far[-1]}={answer}"], answer


def _total(items: tuple[Item, ...], style: Style) -> tuple[list[str], str]:
    values = [int(value) for _, value in items]
    so_far = [sum(values[: i + 1]) for i in range(len(values))]
    if style == "states":
        return [str(total) for total in so_far], str(so_far[-1])
    sums = [f"{before}+{value}={total}" for before, value, total in zip(so_far, values[1:], so_far[1:])]
    return [*_read(items), *sums], str(so_far[-1])
