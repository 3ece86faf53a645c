"""The four families of problems of `reasoning`: how each is drawn, written, read and worked out step by step.

| family | prompt | program | data |
| --- | --- | --- | --- |
| arithmetic | `compute: 3+4*2` | the operators | the numbers |
| lists | `sort, take 3, sum: [5284]` | what is done, in order | the digits |
| strings | `rotate 2, count a: badge` | what is done, in order | the letters |
| logic | `first: c<d, c>b` | what is asked of the order | the clues |

A family knows two ways of writing the same solution. In style "steps" a line is what was done and its result; in style
"states" a line is all that is left of the problem. Arithmetic also differs in order: all products first, or from the
left. Everything is text, and every function here is pure.
"""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np

DIGITS, LETTERS = "0123456789", "abcdefgh"
LARGEST = 999  # of all numbers: results stay in 0..LARGEST, numbers of a prompt have at most two digits
LONGEST = 7  # list or word
MOST_STEPS = 5
NUMBERS_UP_TO = (20, 20, 30, 50, 99)  # by level
ITEMS = (4, 4, 5, 6, LONGEST)  # by level: digits in a list, letters in a word

MAPS = {  # operations on a list that give a list, on a word that give a word
    "lists": ("sort", "reverse", "evens", "odds", "unique", "take", "drop", "rotate"),
    "strings": ("sort", "reverse", "swap", "take", "drop", "rotate", "replace", "remove"),
}
FOLDS = {"lists": ("sum", "max", "min", "length"), "strings": ("count", "length")}  # ... that give a number and end it
QUERIES = ("first", "last", "rising", "falling")

Style = Literal["steps", "states"]
Words = tuple[str, ...]


class Family(NamedTuple):
    """One kind of problem. `read` and `draw` give (program, data); `solve` gives the lines and the answer."""

    draw: Callable[[np.random.Generator, int], tuple[Words, Words]]
    write: Callable[[Words, Words], str]
    read: Callable[[str, str], tuple[Words, Words]]  # of what stands before and after the colon
    solve: Callable[[Words, Words, Style], tuple[list[str], str]]
    held_out: tuple[str, str]  # two operations that no training prompt has next to each other, in this order
    example: str


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def _reductions(operators: Words, numbers: Words, style: Style) -> Iterator[tuple[str, int, str]]:
    """One operation after another: the operation, its result, and the expression that remains. Products come before
    sums, and equals from left to right; "steps" takes all products first, "states" the leftmost that may be taken."""
    operators, values = list(operators), [int(number) for number in numbers]
    while operators:
        if style == "steps":
            i = operators.index("*") if "*" in operators else 0
        else:
            i = 1 if operators[0] != "*" and operators[1:2] == ["*"] else 0
        operator, (a, b) = operators.pop(i), values[i : i + 2]
        result = a + b if operator == "+" else a - b if operator == "-" else a * b
        values[i : i + 2] = [result]
        yield f"{a}{operator}{b}", result, _expression(operators, values)


def _expression(operators, numbers) -> str:
    return str(numbers[0]) + "".join(f"{operator}{number}" for operator, number in zip(operators, numbers[1:]))


def draw_arithmetic(rng: np.random.Generator, level: int) -> tuple[Words, Words]:
    """`level` operations on numbers that grow with it; a factor on the right has one digit. By rejection."""
    largest = NUMBERS_UP_TO[level - 1]
    while True:
        chance = rng.random(2 * level + 1).tolist()
        operators = tuple("+-*"[int(3 * u)] for u in chance[:level])
        bounds = [(1, largest), *((2, 9) if operator == "*" else (1, largest) for operator in operators)]
        numbers = tuple(str(low + int((high - low + 1) * u)) for (low, high), u in zip(bounds, chance[level:]))
        if all(0 <= result <= LARGEST for _, result, _ in _reductions(operators, numbers, "steps")):
            return operators, numbers


def write_arithmetic(program: Words, data: Words) -> str:
    return f"compute: {_expression(program, data)}"


def read_arithmetic(_: str, value: str) -> tuple[Words, Words]:
    if not re.fullmatch(rf"[1-9]\d?([-+*][1-9]\d?){{1,{MOST_STEPS}}}", value, re.ASCII):
        raise ValueError(f"write one to {MOST_STEPS} of + - * between numbers from 1 to 99")
    operators, numbers = tuple(re.findall(r"[-+*]", value)), tuple(re.findall(r"\d+", value))
    for equation, result, _ in _reductions(operators, numbers, "steps"):
        if not 0 <= result <= LARGEST:
            raise ValueError(f"{equation}={result} is outside 0..{LARGEST}; choose other numbers")
    return operators, numbers


def solve_arithmetic(program: Words, data: Words, style: Style) -> tuple[list[str], str]:
    worked = list(_reductions(program, data, style))
    lines = [f"{equation}={result}" if style == "steps" else rest for equation, result, rest in worked]
    return lines, worked[-1][2]


# ---- lists and strings -----------------------------------------------------------------------------------------------


def _apply(operation: str, items: str) -> str:
    """One operation on the digits of a list or the letters of a word; a fold gives a number, also as text."""
    name, *arguments = operation.replace(" by ", " ").split()
    match name, arguments:
        case "sort", []:
            return "".join(sorted(items))
        case "reverse", []:
            return items[::-1]
        case "evens", []:
            return "".join(d for d in items if d in "02468")
        case "odds", []:
            return "".join(d for d in items if d in "13579")
        case "unique", []:  # the first of each
            return "".join(dict.fromkeys(items))
        case "swap", []:  # first and last
            return items[-1] + items[1:-1] + items[0] if len(items) > 1 else items
        case "take", [n]:
            return items[: int(n)]
        case "drop", [n]:
            return items[int(n) :]
        case "rotate", [n]:  # to the left
            n = int(n) % len(items)
            return items[n:] + items[:n]
        case "replace", [old, new]:
            return items.replace(old, new)
        case "remove", [old]:
            return items.replace(old, "")
        case "sum", []:
            return str(sum(map(int, items)))
        case "max", []:
            return max(items)
        case "min", []:
            return min(items)
        case "length", []:
            return str(len(items))
        case "count", [letter]:
            return str(items.count(letter))
    raise ValueError(f"unknown operation {operation!r}")


def _pattern(family: str, name: str) -> str:
    """What an operation looks like in a prompt, as a regular expression."""
    letter = f"[{LETTERS}]"
    arguments = {"replace": f" {letter} by {letter}", "remove": f" {letter}", "count": f" {letter}"}
    arguments |= dict.fromkeys(("take", "drop", "rotate"), f" [1-{LONGEST - 1}]")
    return name + arguments.get(name, "")


OPERATION = {
    family: re.compile("|".join(_pattern(family, name) for name in MAPS[family] + FOLDS[family])) for family in MAPS
}


def _show(family: str, operation: str, items: str) -> str:
    return f"[{items}]" if family == "lists" and operation not in FOLDS["lists"] else items


def draw_program(family: Literal["lists", "strings"], rng: np.random.Generator, level: int) -> tuple[Words, Words]:
    """`level` operations, none twice in a row, all but the last on three items or more; the last is a fold every other
    time. Arguments are drawn so that they matter: letters that occur, counts below the length."""
    symbols = DIGITS if family == "lists" else LETTERS

    def pick(options):
        return options[int(len(options) * rng.random())]

    data = items = "".join(pick(symbols) for _ in range(ITEMS[level - 1]))
    program: list[str] = []
    while len(program) < level:
        last = len(program) == level - 1
        name = operation = pick(FOLDS[family] if last and rng.random() < 0.5 else MAPS[family])
        if program and program[-1].split()[0] == name:
            continue
        if name in ("take", "drop", "rotate"):
            operation = f"{name} {1 + int((len(items) - 1) * rng.random())}"
        elif name in ("remove", "count"):
            operation = f"{name} {pick(items)}"
        elif name == "replace":
            old = pick(items)
            operation = f"replace {old} by {pick(LETTERS.replace(old, ''))}"
        result = _apply(operation, items)
        if len(result) >= (1 if last else 3):
            program.append(operation)
            items = result
    return tuple(program), tuple(data)


def write_program(family: Literal["lists", "strings"], program: Words, data: Words) -> str:
    return f"{', '.join(program)}: {_show(family, '', ''.join(data))}"


def read_program(family: Literal["lists", "strings"], head: str, value: str) -> tuple[Words, Words]:
    program, known = tuple(head.split(", ")), OPERATION[family]
    shape = rf"\[[0-9]{{2,{LONGEST}}}\]" if family == "lists" else f"[{LETTERS}]{{2,{LONGEST}}}"
    if not re.fullmatch(shape, value):
        raise ValueError(f"{value!r} is neither two to {LONGEST} digits in brackets nor as many letters of {LETTERS}")
    if len(program) > MOST_STEPS:
        raise ValueError(f"{len(program)} operations; write at most {MOST_STEPS}")
    items = data = value.strip("[]")
    for i, operation in enumerate(program):
        if not known.fullmatch(operation):
            raise ValueError(f"{operation!r} is no operation on {family}; known are {known.pattern.replace('|', ', ')}")
        name = operation.split()[0]
        if i and program[i - 1].split()[0] == name:
            raise ValueError(f"{name!r} twice in a row; write it once")
        items = _apply(operation, items)
        if (i < len(program) - 1 and (name in FOLDS[family] or not items)) or not items:
            raise ValueError(f"after {operation!r} nothing is left to work on; end there or write another operation")
    return program, tuple(data)


def solve_program(family: Literal["lists", "strings"], program: Words, data: Words, style: Style):
    items, lines = "".join(data), []
    for i, operation in enumerate(program):
        items = _apply(operation, items)
        shown, rest = _show(family, operation, items), ", ".join(program[i + 1 :])
        lines.append(f"{operation}: {shown}" if style == "steps" else f"{rest}: {shown}" if rest else shown)
    return lines, shown


# ---- logic -----------------------------------------------------------------------------------------------------------


def _pair(clue: str) -> tuple[str, str]:
    """Smaller and larger letter of a clue."""
    return (clue[0], clue[2]) if clue[1] == "<" else (clue[2], clue[0])


def _chains(clues: Words) -> Iterator[tuple[str, str, Words]]:
    """Joins the clues: the first, then always the first of those left that touches an end of the chain. Gives the clue
    used, the letters in rising order so far, and the clues left."""
    left, chain = list(clues), ""

    def joined(clue):
        small, large = _pair(clue)
        if not chain:
            return small + large
        return chain + large if chain[-1] == small else small + chain if chain[0] == large else None

    while left:
        clue = next(filter(joined, left), None)
        if clue is None:
            raise ValueError(f"{left[0]!r} does not continue {chain!r}; write clues between neighbours of one order")
        left.remove(clue)
        chain = joined(clue)
        yield clue, chain, tuple(left)


def draw_logic(rng: np.random.Generator, level: int) -> tuple[Words, Words]:
    """An order of `level` + 1 letters as clues between neighbours, shuffled and written either way round."""
    order = "".join(LETTERS[i] for i in rng.permutation(len(LETTERS))[: level + 1])
    places, ways = rng.permutation(level).tolist(), rng.random(level + 1).tolist()
    clues = tuple(f"{order[i]}<{order[i + 1]}" if ways[i] < 0.5 else f"{order[i + 1]}>{order[i]}" for i in places)
    return (QUERIES[int(len(QUERIES) * ways[-1])],), clues


def write_logic(program: Words, data: Words) -> str:
    return f"{program[0]}: {', '.join(data)}"


def read_logic(head: str, value: str) -> tuple[Words, Words]:
    clues = tuple(value.split(", "))
    for clue in clues:
        if not re.fullmatch(f"[{LETTERS}][<>][{LETTERS}]", clue) or clue[0] == clue[2]:
            raise ValueError(f"{clue!r} is no clue; write two different letters of {LETTERS} with < or > between them")
    if len(clues) > MOST_STEPS:
        raise ValueError(f"{len(clues)} clues; write at most {MOST_STEPS}")
    chain = [chain for _, chain, _ in _chains(clues)][-1]
    if len(set(chain)) < len(chain):
        raise ValueError(f"the clues contradict each other: they make {'<'.join(chain)}")
    return (head,), clues


def solve_logic(program: Words, data: Words, style: Style) -> tuple[list[str], str]:
    (query,), lines = program, []
    for clue, chain, left in _chains(data):
        lines.append(f"{clue}: {chain}" if style == "steps" else f"{query}: {', '.join((chain, *left))}")
    answer = {"first": chain[0], "last": chain[-1], "rising": chain, "falling": chain[::-1]}[query]
    return [*lines, f"{query}: {answer}" if style == "steps" else answer], answer


# ---- the table -------------------------------------------------------------------------------------------------------


def _on(family: Literal["lists", "strings"], held_out: tuple[str, str], example: str) -> Family:
    functions = (draw_program, write_program, read_program, solve_program)
    return Family(*(functools.partial(function, family) for function in functions), held_out, example)


TABLE = {
    "arithmetic": Family(
        draw_arithmetic, write_arithmetic, read_arithmetic, solve_arithmetic, ("*", "*"), "compute: 3+4*2"
    ),
    "lists": _on("lists", ("reverse", "take"), "sort, take 3, sum: [5284]"),
    "strings": _on("strings", ("rotate", "replace"), "rotate 2, replace a by b, count b: badge"),
    "logic": Family(draw_logic, write_logic, read_logic, solve_logic, ("last", ">"), "first: c<d, c>b"),
}
