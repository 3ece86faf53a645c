"""Logic of `domains`: the orders of `reasoning`, and circuits, what follows from comparisons.

    which hold: a=3<5, b=7<2, c=a and not b
    steps                       states
    a=3<5=true                  a
    b=7<2=false                 a
    c=true and not false=true   ac
    #### ac                     #### ac

Every letter is a comparison of two digits or joins earlier letters; the answer is the letters that hold, or `none`.
The level is the number of letters less two.
"""

import itertools
import re

import numpy as np

from opd_jax.worlds.domains_kinds import Kind, Style, of_reasoning
from opd_jax.worlds.reasoning_programs import DIGITS, LETTERS, QUERIES

COMPARISONS, GATES = ("<", ">"), ("not ", " and ", " or ", " and not ", " or not ")
MOST_LETTERS = 6
COMPARED = (2, 2, 3, 3)  # by level: letters that are comparisons, the first ones
Definition = tuple[str, ...]  # an operator, and the one or two it is applied to


def _written(operator: str, *arguments: str) -> str:
    return operator + arguments[0] if operator == "not " else operator.join(arguments)


def draw_circuit(rng: np.random.Generator, level: int) -> tuple[Definition, ...]:
    """`level` + 2 letters, each that joins others takes two different earlier ones."""
    definitions = []
    for i, (u, v, w) in enumerate(rng.random((level + 2, 3)).tolist()):
        compared = i < COMPARED[level - 1]
        symbols, operators = (DIGITS, COMPARISONS) if compared else (LETTERS[:i], GATES)
        operator, first = operators[int(len(operators) * u)], symbols[int(len(symbols) * v)]
        others = symbols.replace(first, "")
        second = () if operator == "not " else (others[int(len(others) * w)],)
        definitions.append((operator, first, *second))
    return tuple(definitions)


def write_circuit(content: tuple[Definition, ...]) -> str:
    return "which hold: " + ", ".join(f"{letter}={_written(*made)}" for letter, made in zip(LETTERS, content))


_COMPARISON = re.compile(r"(\d)([<>])(\d)", re.ASCII)
_GATE = re.compile(rf"(?:([{LETTERS}])( and not | or not | and | or ))?(not )?([{LETTERS}])")


def read_circuit(_: str, value: str) -> tuple[Definition, ...]:
    definitions = []
    for i, text in enumerate(value.split(", ")):
        letter, _, made = text.partition("=")
        if letter != LETTERS[i : i + 1] or i == MOST_LETTERS:
            raise ValueError(f"{text!r} cannot be number {i + 1}; define {LETTERS[:MOST_LETTERS]} in this order")
        if found := _COMPARISON.fullmatch(made):
            first, operator, second = found.groups()
            definition = (operator, first, second)
        elif found := _GATE.fullmatch(made):
            first, operator, alone, second = found.groups()
            definition = (operator, first, second) if operator else ("not ", second)
            if (operator and alone) or not (operator or alone):
                raise ValueError(f"{made!r} joins nothing; write not a, a and b, a or b, a and not b, or a or not b")
            if not set(definition[1:]) <= set(LETTERS[:i]):
                raise ValueError(f"{text!r} needs letters that are not defined before it; write them first")
        else:
            raise ValueError(f"{text!r} defines nothing; write for instance {letter}=3<5 or {letter}=a and not b")
        if len(set(definition[1:])) < len(definition) - 1:
            raise ValueError(f"{text!r} names the same thing twice; write two different ones")
        definitions.append(definition)
    if len(definitions) < 3:
        raise ValueError("that is little to think about; define three letters or more")
    return tuple(definitions)


def _holds(operator: str, first: bool | str, second: bool | str = False) -> bool:
    match operator:
        case "<":
            return first < second
        case ">":
            return first > second
        case "not ":
            return not first
        case " and ":
            return first and second
        case " or ":
            return first or second
        case " and not ":
            return first and not second
        case " or not ":
            return first or not second
    raise ValueError(f"unknown operator {operator!r}")


def solve_circuit(content: tuple[Definition, ...], style: Style) -> tuple[list[str], str]:
    truth, lines = {}, []
    for letter, (operator, *names) in zip(LETTERS, content):
        values = names if operator in COMPARISONS else [truth[name] for name in names]
        truth[letter] = _holds(operator, *values)
        answer = "".join(name for name, holds in truth.items() if holds) or "none"
        shown = _written(operator, *(str(value).lower() for value in values))
        lines.append(f"{letter}={shown}={str(truth[letter]).lower()}" if style == "steps" else answer)
    return lines, answer


def _joins_held_out(content: tuple[Definition, ...]) -> bool:
    return (">", " or not ") in itertools.pairwise(definition[0] for definition in content)


KINDS = {
    "order": of_reasoning("logic", "logic", QUERIES),
    "circuit": Kind(
        "logic",
        draw_circuit,
        write_circuit,
        solve_circuit,
        level=lambda content: len(content) - 2,
        identity=write_circuit,
        is_held_out=_joins_held_out,
        read=read_circuit,
        heads=("which hold",),
        example="which hold: a=3<5, b=7<2, c=a and not b",
    ),
}
