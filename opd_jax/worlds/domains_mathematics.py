"""Mathematics of `domains`: the arithmetic of `reasoning`, and equations.

    solve: 3*(x+2)-4=17
    steps       states
    3*2=6       3*x+2=17
    6-4=2       3*x=15
    17-2=15     x=5
    15/3=5      #### 5
    #### 5

An equation is `c*(x+p)+q=d*x+r`, in which parts may be missing; its level counts those of `c`, `p`, `q` and `d` that
are there. The unknown is a positive whole number, and found in one order: brackets, unknowns to the left, numbers to
the right, division.
"""

import re
from typing import NamedTuple

import numpy as np

from opd_jax.worlds.domains_kinds import Kind, Style, of_reasoning


class Equation(NamedTuple):
    """`factor*(x+inside)+added=moved*x+right`. A factor of 1 is not written, and nothing that is 0."""

    factor: int
    inside: int
    added: int
    moved: int
    right: int

    def __str__(self) -> str:
        factor = f"{self.factor}*" if self.factor > 1 else ""
        unknown = f"(x+{self.inside})" if self.inside else "x"
        added = f"{self.added:+d}" if self.added else ""
        moved = {0: "", 1: "x+"}.get(self.moved, f"{self.moved}*x+")
        return f"{factor}{unknown}{added}={moved}{self.right}"


PARTS = (  # by level: the parts an equation may have
    (("factor",), ("added",)),
    (("factor", "added"), ("factor", "inside")),
    (("factor", "added", "inside"), ("factor", "added", "moved")),
    (("factor", "added", "inside", "moved"),),
)
MOST_X, MOST_ADDED = (20, 20, 9, 9), 20  # the first by level


def draw_equation(rng: np.random.Generator, level: int) -> Equation:
    """An equation of a level whose unknown is at least 1, by rejection of a right side below 1."""
    while True:
        which, x, factor, inside, added, sign, moved = rng.random(7).tolist()
        parts = PARTS[level - 1][int(len(PARTS[level - 1]) * which)]
        x = 1 + int(MOST_X[level - 1] * x)
        factor = 2 + int(8 * factor) if "factor" in parts else 1
        inside = 1 + int(9 * inside) if "inside" in parts else 0
        added = (1 + int(MOST_ADDED * added)) * (1 if sign < 0.5 else -1) if "added" in parts else 0
        moved = 1 + int((factor - 1) * moved) if "moved" in parts else 0
        right = factor * (x + inside) + added - moved * x
        if right > 0:
            return Equation(factor, inside, added, moved, right)


_EQUATION = re.compile(
    r"(?:([2-9])\*)?(?:x|\(x\+([1-9])\))([+-][1-9]\d?)?=(?:(?:([2-9])\*)?(x)\+)?([1-9]\d{0,2})", re.ASCII
)


def read_equation(_: str, value: str) -> Equation:
    found = _EQUATION.fullmatch(value)
    if not found:
        raise ValueError("write c*(x+p)+q=d*x+r, or less, with c, p and d from 1 to 9, q up to 99 and r up to 999")
    factor, inside, added, moved, x, right = found.groups()
    content = Equation(int(factor or 1), int(inside or 0), int(added or 0), int(moved or 1) if x else 0, int(right))
    if equation_level(content) == 0:
        raise ValueError("it is solved already; write a factor or something added")
    if content.inside and content.factor == 1:
        raise ValueError("brackets need a factor before them")
    if content.moved >= content.factor:
        raise ValueError("the left side needs the larger factor of x")
    rest = content.right - content.factor * content.inside - content.added
    if rest <= 0 or rest % (content.factor - content.moved):
        raise ValueError("no positive whole number solves it; choose other numbers")
    return content


def equation_level(content: Equation) -> int:
    return (content.factor > 1) + (content.inside > 0) + (content.added != 0) + (content.moved > 0)


def solve_equation(content: Equation, style: Style) -> tuple[list[str], str]:
    factor, inside, added, moved, right = content
    steps, states = [], []

    def operate(a, operator, b, result):
        steps.append(f"{a}{operator}{b}={result}")
        return result

    if inside:
        number = operate(factor, "*", inside, factor * inside)
        added = operate(number, "-" if added < 0 else "+", abs(added), number + added) if added else number
        states.append(Equation(factor, 0, added, moved, right))
    if moved:
        factor = operate(factor, "-", moved, factor - moved)
        states.append(Equation(factor, 0, added, 0, right))
    if added:
        right = operate(right, "+" if added < 0 else "-", abs(added), right - added)
        states.append(Equation(factor, 0, 0, 0, right))
    if factor > 1:
        right = operate(right, "/", factor, right // factor)
        states.append(Equation(1, 0, 0, 0, right))
    return steps if style == "steps" else [str(state) for state in states], str(right)


KINDS = {
    "arithmetic": of_reasoning("mathematics", "arithmetic", ("compute",)),
    "equation": Kind(
        "mathematics",
        draw_equation,
        write=lambda content: f"solve: {content}",
        solve=solve_equation,
        level=equation_level,
        identity=str,
        is_held_out=lambda content: content.factor == 7 and content.added < 0,
        read=read_equation,
        heads=("solve",),
        example="solve: 3*(x+2)-4=17",
    ),
}
