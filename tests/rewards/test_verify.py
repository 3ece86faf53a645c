"""Verdicts: in order, unknown rather than wrong, and counted."""

import threading
import time

import numpy as np
import pytest

from opd_jax.config import ConfigError
from opd_jax.rewards import verify
from opd_jax.rewards.sandbox import sandbox_report
from opd_jax.rewards.verify import Unverified, verdicts

EQUAL = {"": lambda completion, reference: float(completion == reference)}


def broken(error):
    def verifier(completion, reference):
        if reference == "broken":
            raise error
        return float(completion == reference)

    return {"": verifier}


@pytest.mark.parametrize("threads", [1, 4, None])
def test_right_wrong_and_unknown_in_order(threads):
    references = ["a", "b", None, "", ["a"], {"a": 1}] * 20
    said = verdicts(EQUAL, ["a", "a", "a", "", "a", "a"] * 20, references, [""] * 120, threads)
    assert said.outcome.dtype == np.float32 and said.failures == {}
    np.testing.assert_array_equal(said.outcome, [1, 0, np.nan, np.nan, 0, 0] * 20)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Unverified("maths: time"), "maths: time"),
        (Unverified(), "Unverified"),
        (ValueError("1 of many texts"), "ValueError"),
        (RecursionError(), "RecursionError"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_failures_are_unknown_and_counted(threads, error, reason):
    references = ["a", "broken", "b", "broken", ""]
    said = verdicts(broken(error), ["a", "a", "a", "broken", "a"], references, [""] * 5, threads)
    np.testing.assert_array_equal(said.outcome, [1, np.nan, 0, np.nan, np.nan])
    assert said.failures == {reason: 2}


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), ConfigError("math-verify is not installed")])
def test_what_holds_for_the_whole_run_passes_through(threads, error):
    with pytest.raises(type(error)):
        verdicts(broken(error), ["a"] * 3, ["a", "broken", "a"], [""] * 3, threads)


def test_an_unknown_domain_is_named_before_anything_is_run():
    ran = []
    with pytest.raises(ConfigError, match=r"'music'.*maths") as error:
        verdicts({"maths": lambda *_: ran.append(1)}, ["a"] * 2, ["a"] * 2, ["maths", "music"])
    assert not ran and "\n" not in str(error.value)


def test_a_function_finds_verifiers_once_a_domain():
    found = []

    def find(domain):
        found.append(domain)
        return lambda completion, reference: float(domain == "one")

    said = verdicts(find, "abcd", "abcd", ["one", "two", "one", "two"])
    assert said.outcome.tolist() == [1, 0, 1, 0] and found == ["one", "two"]


def test_threads_ask_side_by_side_and_stay():
    together, names = threading.Barrier(4), set()

    def verifier(*_):
        names.add(threading.get_ident())
        together.wait(timeout=10)
        return 1.0

    for _ in range(2):
        assert verdicts({"": verifier}, "abcd", "abcd", [""] * 4, threads=4).failures == {}
    assert len(names) == 4 and threading.get_ident() not in names


def test_after_an_interrupt_nothing_more_is_asked():
    asked = []

    def verifier(completion, _):
        asked.append(completion)
        if completion == "0":
            raise KeyboardInterrupt
        time.sleep(0.05)
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        verdicts({"": verifier}, [str(i) for i in range(100)], ["a"] * 100, [""] * 100, threads=2)
    time.sleep(0.2)
    assert len(asked) < 20


def test_verifiers_by_domain():
    pytest.importorskip("math_verify")
    if missing := [how for how in sandbox_report().values() if how.startswith("none")]:
        pytest.skip("; ".join(missing))
    code = {"inputs": ["1"], "outputs": ["2"]}
    said = verdicts(
        verify.VERIFIERS,
        ["(B)", "(B)", "Answer: 3.1", "seven", "hello word", "print(int(input()) + 1)", r"\boxed{7}"],
        ["B", "C", "3", "7", "hello world", code, "7"],
        ["choice", "choice", "number", "number", "text", "code", "maths"],
    )
    assert said.failures == {}
    np.testing.assert_allclose(said.outcome, [1, 0, 1, 0, 10 / 11, 1, 1], rtol=1e-6)
