"""Code of `domains`: functions of a list of whole numbers, described as a pipeline or from its end.

    write f: sort, take 3, sum          write f: sum of take 3 of sort          (the same task)

    steps                               states
    def f(x):                           def f(x):
        x = sorted(x)                       return sum(sorted(x)[:3])
        x = x[:3]
        x = sum(x)
        return x

Statements follow a pipeline's order and calls nest in the other, so neither style copies both prompts word by word.
The level is the number of operations, of which none can be left out. A program is right if it returns what the
reference does for all INPUTS for which that returns something: there is no `max` of an empty list.
"""

import copy
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from opd_jax.worlds.domains_kinds import Kind, Style

INPUTS = (  # every digit occurs, some twice, so that other programs give themselves away
    (3, 8, 1, 4, 9, 2, 6, 5),
    (7, 0, 7, 5, 2, 3, 9, 4, 1),
    (6, 2, 8, 8, 0, 1, 7),
    (-4, 9, 5, -1, 3, 3, 8, 6),
    (10, 4, 6, 1, 2, 5),
    (5, 12),
    (2,),
    (),
)
MOST_STEPS = 4


class Operation(NamedTuple):
    """What is done to a list; `n` is the digit in the prompt, 0 where there is none."""

    python: str  # of the expression {x} and the digit {n}
    digits: str
    apply: Callable[[list[int], int], list[int] | int]


MAPS = {
    "sort": Operation("sorted({x})", "", lambda x, n: sorted(x)),
    "reverse": Operation("{x}[::-1]", "", lambda x, n: x[::-1]),
    "take": Operation("{x}[:{n}]", "12345", lambda x, n: x[:n]),
    "drop": Operation("{x}[{n}:]", "1234", lambda x, n: x[n:]),
    "add": Operation("[a+{n} for a in {x}]", "123456789", lambda x, n: [a + n for a in x]),
    "times": Operation("[a*{n} for a in {x}]", "23456789", lambda x, n: [a * n for a in x]),
    "above": Operation("[a for a in {x} if a>{n}]", "12345678", lambda x, n: [a for a in x if a > n]),
    "below": Operation("[a for a in {x} if a<{n}]", "23456789", lambda x, n: [a for a in x if a < n]),
}
FOLDS = {
    "sum": Operation("sum({x})", "", lambda x, n: sum(x)),
    "max": Operation("max({x})", "", lambda x, n: max(x)),
    "min": Operation("min({x})", "", lambda x, n: min(x)),
    "length": Operation("len({x})", "", lambda x, n: len(x)),
    "first": Operation("{x}[0]", "", lambda x, n: x[0]),
    "last": Operation("{x}[-1]", "", lambda x, n: x[-1]),
    "count": Operation("{x}.count({n})", "123456789", lambda x, n: x.count(n)),
}
OPERATIONS = MAPS | FOLDS
NAMES = {"map": tuple(MAPS), "fold": tuple(FOLDS)}
ORDERS = (", ", " of ")
Program = tuple[tuple[str, int], ...]  # names and digits, in the order of work
Content = tuple[str, Program]  # one of ORDERS


@functools.lru_cache(4096)
def results(program: Program) -> tuple[list[int] | int | None, ...]:
    """What the reference returns for each of INPUTS, not to be changed; None where it raises."""
    if not program:
        return tuple(map(list, INPUTS))
    *before, (name, n) = program
    return tuple(_apply(name, n, x) for x in results(tuple(before)))


def _apply(name: str, n: int, x: list[int] | None) -> list[int] | int | None:
    try:
        return None if x is None else OPERATIONS[name].apply(x, n)
    except (IndexError, ValueError):  # of nothing
        return None


def cases(content: Content) -> tuple[tuple[list[int], list[int] | int], ...]:
    """The inputs that have a result, and their results."""
    return tuple((list(x), copy.copy(y)) for x, y in zip(INPUTS, results(content[1])) if y is not None)


def is_testable(program: Program) -> bool:
    """Whether four or more inputs have a result, and not all have the same."""
    known = [str(y) for y in results(program) if y is not None]
    return len(known) >= 4 and len(set(known)) > 1


def is_tight(program: Program) -> bool:
    """Whether the tests find out when any operation is left out."""
    wanted = results(program)
    shorter = (results(program[:i] + program[i + 1 :]) for i in range(len(program)))
    return all(any(a != b for a, b in zip(wanted, found) if a is not None) for found in shorter)


def draw_code(rng: np.random.Generator, level: int) -> Content:
    """Operations of which none stands twice in a row and every other time the last gives a number; any of ORDERS from
    level 2 on. Not all draws are testable and tight: `Kind.accepts` is for that."""

    def pick(options, chance):
        return options[int(len(options) * chance)]

    while True:
        order, fold, *chance = rng.random(2 + 2 * level).tolist()
        names = [pick(NAMES["map"], u) for u in chance[:level]]
        if fold < 0.5:
            names[-1] = pick(NAMES["fold"], chance[level - 1])
        if not any(a == b for a, b in itertools.pairwise(names)):
            digits = [OPERATIONS[name].digits for name in names]
            program = tuple((name, int(pick(d, u)) if d else 0) for name, d, u in zip(names, digits, chance[level:]))
            return ORDERS[level > 1 and order < 0.5], program


def _phrase(name: str, n: int) -> str:
    return f"{name} {n}" if OPERATIONS[name].digits else name


def write_code(content: Content) -> str:
    order, program = content
    phrases = [_phrase(*operation) for operation in program]
    return "write f: " + order.join(phrases if order == ", " else reversed(phrases))


def read_code(_: str, value: str) -> Content:
    order = " of " if " of " in value else ", "
    phrases = value.split(order)
    if len(phrases) > MOST_STEPS:
        raise ValueError(f"{len(phrases)} operations; write at most {MOST_STEPS}")
    program = []
    for phrase in phrases if order == ", " else reversed(phrases):
        name, _, n = phrase.partition(" ")
        known = OPERATIONS.get(name)
        if known is None or n not in (tuple(known.digits) or ("",)):
            can = ", ".join(f"{name} [{made.digits}]" if made.digits else name for name, made in OPERATIONS.items())
            raise ValueError(f"{phrase!r} is no operation; known are {can}")
        if program and program[-1][0] in FOLDS:
            raise ValueError(f"after {_phrase(*program[-1])!r} there is no list any more; end there")
        program.append((name, int(n or 0)))
    if not is_testable(tuple(program)):
        raise ValueError("it returns the same for all inputs, or nothing; write other operations")
    return order, tuple(program)


def solve_code(content: Content, style: Style) -> tuple[list[str], str]:
    lines, nested = [], "x"
    for name, n in content[1]:
        python = OPERATIONS[name].python
        lines.append(f"    x = {python.format(x='x', n=n)}")
        nested = python.format(x=nested, n=n)
    body = [*lines, "    return x"] if style == "steps" else [f"    return {nested}"]
    return ["def f(x):", *body], ""


def _joins_held_out(content: Content) -> bool:
    return ("reverse", "take") in itertools.pairwise(name for name, _ in content[1])


KINDS = {
    "code": Kind(
        "code",
        draw_code,
        write_code,
        solve_code,
        level=lambda content: len(content[1]),
        identity=lambda content: write_code((", ", content[1])),  # the same task, however it is described
        is_held_out=_joins_held_out,
        read=read_code,
        heads=("write f",),
        example="write f: sort, take 3, sum",
        accepts=lambda content: is_testable(content[1]) and is_tight(content[1]),
        cases=cases,
    )
}
