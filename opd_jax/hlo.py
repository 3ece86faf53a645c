# SPDX-License-Identifier: Apache-2.0
"""Compiled XLA programs as data: the text of an optimised HLO module, parsed into computations and instructions.

Only what counting needs is kept. Shapes are those of one device, for a program that XLA has split over several.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}  # others have their bits in their name: bf16, s32
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(calls|body|condition|to_apply|true_computation|false_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Shape(NamedTuple):
    """An array, or one of a tuple."""

    dtype: str
    dims: tuple[int, ...]
    hbm: bool  # False: on-chip memory, or flags

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Without the padding of a tiled layout."""
        bits = BITS[self.dtype] if self.dtype in BITS else int(re.search(r"\d+", self.dtype)[0])
        return self.elements * bits // 8


class Instruction(NamedTuple):
    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of the result, tuples flattened
    operands: tuple[str, ...]  # names in the same computation
    literal: str  # what stands in the parentheses: a parameter's number, a constant's value
    attributes: str

    def called(self, kind: str) -> str | None:
        """The computation that the attribute `kind` names: calls, body, condition, to_apply."""
        return next((name for key, name in _CALLED.findall(self.attributes) if key == kind), None)

    def branches(self) -> tuple[str, ...]:
        """The computations of a conditional."""
        if match := _BRANCHES.search(self.attributes):
            return tuple(_NAME.findall(match[1]))
        return tuple(filter(None, map(self.called, ("true_computation", "false_computation"))))


class Computation(NamedTuple):
    instructions: dict[str, Instruction]
    root: str

    def parameters(self) -> list[Instruction]:
        """In the order of the arguments."""
        found = (one for one in self.instructions.values() if one.opcode == "parameter")
        return sorted(found, key=lambda one: int(one.literal))

    def users(self, name: str) -> Iterator[Instruction]:
        return (one for one in self.instructions.values() if name in one.operands)


class Program(NamedTuple):
    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Program:
    """The program of `compiled.as_text()`.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations, entry = {}, None
    name, instructions, root = None, {}, ""
    for line in text.splitlines():
        if line.startswith("}"):
            computations[name] = Computation(instructions, root)
        elif line.endswith("{") and (match := re.match(r"(ENTRY )?%([\w.\-]+) ", line)):
            name, instructions, root = match[2], {}, ""
            entry = name if match[1] else entry
        elif match := re.match(r"\s+(ROOT )?%([\w.\-]+) = (.*)", line):
            instructions[match[2]] = _instruction(match[2], match[3])
            root = match[2] if match[1] else root
    if entry is None:
        raise ValueError("no ENTRY computation in this text; give the as_text() of a compiled program")
    return Program(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shapes, rest = text[:end], text[end:].strip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    return Instruction(name, rest[:opening], _shapes(shapes), tuple(_NAME.findall(inside)), inside, rest[closing + 1 :])


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.start()
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def _shapes(text: str) -> tuple[Shape, ...]:
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        found.append(Shape(dtype, sizes, "S(" not in layout))
    return tuple(found)
