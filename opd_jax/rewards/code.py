"""Programs judged by their tests: what is printed for an input, what a function returns, or assertions that hold.

A program is run in a sandbox (`sandbox.py`): no network, no other processes, no files but libraries and a folder of its
own that is gone afterwards, limited processor time, memory and output. Expected outputs stay outside, so a program that
knows them has computed them. Assertions are different: they run in the program's own interpreter, where a program that
leaves early or prints a mark of success fails, but one that is out to deceive can change what `==` or an imported
module does, or look for the token that says that the last assertion was passed. Prefer inputs and outputs.
"""

import contextlib
import functools
import json
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from opd_jax.rewards.sandbox import Sandbox, sandbox_report
from opd_jax.rewards.verify import Unverified

__all__ = ["correct", "program", "sandbox_report"]

TOLERANCE = 1e-6  # relative or absolute, between decimal numbers
_FENCE = re.compile(r"^[ \t]*```[ \t]*(\S*)[^\n]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_DECIMAL = re.compile(r"[-+]?(?=\d|\.\d)\d*(\.\d*)?(e[-+]?\d+)?", re.IGNORECASE)


def program(completion: str) -> str:
    """The last block fenced as Python, else the last fenced as nothing in particular, else all of the text."""
    blocks = [(language.lower(), text) for language, text in _FENCE.findall(completion)]
    for languages in (("python", "python3", "py"), ("",)):
        if found := [text for language, text in blocks if language in languages]:
            return found[-1]
    return completion


def correct(
    completion: str,
    tests: str | Sequence[str] | Mapping[str, Any],
    *,
    seconds: float = 4.0,
    memory: int = 512 << 20,
    output: int = 1 << 20,
    allow_weak: bool = False,
) -> float:
    """1.0 where a completion's program passes all tests, else 0.0.

    | tests, or their JSON | a test is passed by |
    | --- | --- |
    | Python statements, or a list of such (HumanEval+, MBPP) | no exception, in the names the program leaves |
    | `{"inputs": [...], "outputs": [...]}` (APPS, PRIME) | status 0, the same words line by line, decimals to 1e-6 |
    | the same with `"fn_name"` | a function, or method of `class Solution`, that returns the output |

    A function's arguments are a list, or text with one argument in JSON a line, its output then in JSON as well.
    HumanEval's `test` defines `check`: append `check(name)` to it.

    | program | reward |
    | --- | --- |
    | raises, exits before its tests are done, answers wrongly, is no Python | 0.0 |
    | takes more processor time, memory or output than it may, or sleeps four times `seconds`: its own doing | 0.0 |
    | tries what the sandbox denies, and fails by it | 0.0 |
    | the sandbox did not start, the machine had no processor for it, someone else killed it | Unverified |

    Args:
        completion: see `program` for what is taken from it. Packages of this environment can be imported.
        tests: at least one.
        seconds: of processor time a test (all statements are one), rounded up to whole ones.
        memory: bytes of address space.
        output: bytes on standard output, or in one file.
        allow_weak: run programs even where `sandbox_report()` names a missing protection.

    Raises:
        ConfigError: a protection is missing.
        Unverified: as above, and for tests of no form above.
    """
    text, cases = program(completion), _cases(tests)
    with Sandbox(seconds, memory, output, allow_weak) as sandbox:
        for form, payload, expected in cases:
            written = sandbox.run(text, form, payload)
            if written is None or not _MATCHES[form](written, expected):
                return 0.0
    return 1.0


def _cases(tests) -> list[tuple[str, Any, Any]]:
    """Tests as (form, payload, expected); the first two are the sandbox's."""
    if isinstance(tests, str):
        with contextlib.suppress(ValueError):
            tests = json.loads(tests)
    try:
        if isinstance(tests, Mapping):
            case = functools.partial(_call, tests["fn_name"]) if tests.get("fn_name") else _input
            cases = [case(*pair) for pair in zip(tests["inputs"], tests["outputs"], strict=True)]
        else:
            statements, token = tests if isinstance(tests, str) else "\n".join(tests), secrets.token_bytes(16)
            compile(statements, "tests", "exec", dont_inherit=True)  # where these are no Python, no program is wrong
            cases = [("tests", (statements, token), token)] if statements.strip() else []
    except (KeyError, SyntaxError, TypeError, ValueError) as error:
        raise Unverified("code: tests of an unknown form") from error
    if not cases:
        raise Unverified("code: no tests")
    return cases


def _input(given, expected) -> tuple[str, Any, Any]:
    given, expected = (text if isinstance(text, str) else "\n".join(text) for text in (given, expected))
    return "input", given.encode(), expected


def _call(name: str, arguments, expected) -> tuple[str, Any, Any]:
    if not isinstance(arguments, str | list):
        raise TypeError("arguments of a function are a list")
    if isinstance(arguments, str):
        arguments = [json.loads(line) for line in arguments.splitlines() if line.strip()]
        expected = json.loads(expected)
    return "call", (name, json.dumps(arguments)), expected


def _same_value(written: bytes, expected) -> bool:
    """Whether a function returned what was expected; APPS wraps some outputs in a list of one."""
    try:
        value = json.loads(written)
    except (ValueError, RecursionError):
        return False
    alone = expected[0] if isinstance(expected, list) and len(expected) == 1 else expected
    return _close(value, expected) or _close(value, alone)


def _close(value, expected) -> bool:
    """Equality with a tolerance for decimal numbers, within lists and objects too."""
    if isinstance(expected, list) and isinstance(value, list):
        return len(value) == len(expected) and all(map(_close, value, expected))
    if isinstance(expected, dict) and isinstance(value, dict):
        return value.keys() == expected.keys() and all(_close(value[key], expected[key]) for key in expected)
    if isinstance(expected, float) and isinstance(value, int | float):
        return _near(value, expected)
    return value == expected


def _same_text(written: bytes, expected: str) -> bool:
    """Whether the same words stand on the same lines; blank lines do not count."""
    ours, theirs = (
        [line.split() for line in text.split("\n") if line.strip()]
        for text in (written.decode(errors="replace"), expected)
    )
    return len(ours) == len(theirs) and all(
        len(line) == len(right) and all(map(_same_word, line, right)) for line, right in zip(ours, theirs)
    )


def _same_word(word: str, expected: str) -> bool:
    if word == expected:
        return True
    decimal = _DECIMAL.fullmatch(expected)
    if not decimal or not any(decimal.groups()) or not _DECIMAL.fullmatch(word):  # whole numbers are exact
        return False
    return _near(float(word), float(expected))


def _near(value: float, expected: float) -> bool:
    return math.isclose(value, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


_MATCHES = {"input": _same_text, "call": _same_value, "tests": lambda written, token: written == token}
