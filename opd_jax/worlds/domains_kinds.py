"""What a kind of problem is, for `domains`: the functions between its content and what is written, drawn and asked."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from opd_jax.worlds import reasoning

STYLES = ("steps", "states")
Style = Literal["steps", "states"]


class Kind(NamedTuple):
    """One kind of problem. Its content is a tuple of its own making, hashable, and all else is a function of it."""

    domain: str
    draw: Callable[[np.random.Generator, int], tuple]  # of a generator and a level
    write: Callable[[tuple], str]  # the question: one line
    solve: Callable[[tuple, Style], tuple[list[str], str]]  # lines, and the answer: "" where the last lines are it
    level: Callable[[tuple], int]
    identity: Callable[[tuple], str]  # what the train/test split hashes; may leave out what is asked
    is_held_out: Callable[[tuple], bool]  # whether it joins two things that no training problem of the kind joins
    read: Callable[[str, str], tuple] | None = None  # inverse of `write`, of what is before and after the colon
    heads: tuple[str, ...] = ()  # what may stand before the colon
    example: str = ""  # a question that can be read
    accepts: Callable[[tuple], bool] | None = None  # a drawn content is as it should be; asked last, since it is slow
    render: Callable[[tuple], np.ndarray] | None = None  # uint8 `[32, 32, 3]`
    cases: Callable[[tuple], tuple[tuple[list[int], list[int] | int], ...]] | None = None  # what f(x) has to give


def of_reasoning(domain: str, family: str, heads: tuple[str, ...]) -> Kind:
    """A family of `reasoning`, with its split: test problems of that world are test problems of this one."""
    table = reasoning.TABLE[family]

    def identity(content):
        program, data = content
        return table.write(("",) if family == "logic" else program, data) + "\n"

    return Kind(
        domain,
        draw=table.draw,
        write=lambda content: table.write(*content),
        solve=lambda content, style: table.solve(*content, style),
        level=lambda content: reasoning.Problem(family, *content).level,
        identity=identity,
        is_held_out=lambda content: reasoning.Problem(family, *content).is_held_out,
        read=table.read,
        heads=heads,
        example=table.example,
    )
