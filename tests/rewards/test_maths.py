"""Answers compared as mathematics, and completions that try to break the comparison."""

import concurrent.futures
import resource
import signal
import sys
from pathlib import Path

import pytest

from opd_jax.config import ConfigError
from opd_jax.rewards import maths
from opd_jax.rewards.verify import Unverified

pytest.importorskip("math_verify")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so it is \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} and then \fbox {2}", "2"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"\boxed{a_{b_{c}}} the answer is 3", "a_{b_{c}}"),
        (r"The answer is $\boxed{7}$", "7"),
        (r"#### 3 and \boxed{12", None),  # cut off in the middle of its answer
        (r"\boxed{}", None),
        ("3*6=18\n#### 18", "18"),
        ("#### $1,234.50", "1,234.50"),
        ("#### 1\n#### 2 ", "2"),
        ("The answer is $\\frac12$. Done.", r"\frac12"),
        ("the Answer is: 3.5.", "3.5"),
        (r"The answer is \(x^2\).", "x^2"),
        ("The answer is **42**", "42"),
        ("The answer is 18 dollars per day.", "18"),
        ("The answer is 2 x", "2 x"),
        ("The answer is 1. No: the answer is 2.", "2"),
        ("no idea 5", None),
        ("", None),
        ("####", None),
        (r"\boxed{" + "1" * 2000 + "}", None),
    ],
)
def test_final_answer(text, answer):
    assert maths.final_answer(text) == answer


@pytest.mark.parametrize(
    ("written", "reference", "equal"),
    [
        (r"\frac{1}{2}", "0.5", 1),
        ("1/2", r"\frac{2}{4}", 1),
        ("0.5", "0.51", 0),
        ("1,234", "1234", 1),
        (r"2\sqrt{2}", r"\sqrt{8}", 1),
        ("(x+1)^2", "x^2+2x+1", 1),
        ("(x+1)^2", "x^2+1", 0),
        (r"\{1,2\}", r"\{2,1\}", 1),
        ("(1,2)", "(2,1)", 0),
        ("[1,2)", "[1,2)", 1),
        ("(1,2)", "[1,2)", 0),
        (r"(3,\infty)\cup[1,2)", r"[1,2)\cup(3,\infty)", 1),
        ("x=3", "3", 1),
        (r"50\%", "0.5", 1),
        (r"50\%", "50", 1),
        (r"50\%", "5", 0),
        (r"3\text{ cm}", "3", 1),
        (r"\text{Monday}", "Monday", 1),
        (r"\text{Monday}", "Tuesday", 0),
        (r"\text{Monday}", r"\text{Monday}", 1),
        ("18", "6*3=18\n#### 18", 1),
        ("18.", r"We get \boxed{18}", 1),
        ("1,2,3", "2", 0),
        ("2", "", 0),
    ],
)
def test_equality_is_mathematical(written, reference, equal):
    assert maths.correct(rf"so \boxed{{{written}}}", reference) == equal


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\\boxed{",
        "\\boxed{\\frac{}{}}",
        "\\boxed{\x00\ud800\n}",
        "\\boxed{{{{}}}\\left(}",
        "\\boxed{\\input{/etc/passwd}}",
        "\\boxed{__import__('os').system('true')}",
        "\\boxed{7 or 8}",
        "\\boxed{" * 20000,
        "#### " * 20000,
        "\n " * 50000,
        "the answer is " * 5000 + "\n",
    ],
)
def test_garbage_scores_zero(text):
    assert maths.correct(text, "7", seconds=1.0) == 0.0


def test_nothing_written_is_run(tmp_path):
    for path in (tmp_path / "a", tmp_path / "b"):
        call = f"__import__('os').system('touch {path}')" if path.name == "a" else f"open('{path}','w')"
        for text in (rf"\boxed{{{call}}}", f"#### {call}", f"The answer is {call}", rf"\boxed{{1}} ${call}$"):
            maths.correct(text, "7")
            maths.correct(text, text)
    assert not list(tmp_path.iterdir())


def test_no_expression_holds_the_run_up_and_the_next_is_compared():
    alarm = signal.getsignal(signal.SIGALRM)
    for text in ("9^{9^{9^{9}}}", "(x+1)^{3000}", "(" * 300 + "1" + ")" * 300):
        with pytest.raises(Unverified, match="not finished"):  # neither right nor wrong
            maths.correct(rf"\boxed{{{text}}}", "x+1" if "x" in text else "7", seconds=0.5)
    assert maths.correct(r"\boxed{0.25}", r"\frac{1}{4}") == 1.0
    assert signal.getsignal(signal.SIGALRM) is alarm


def test_memory_is_limited():
    worker = maths._worker()
    assert resource.prlimit(worker.pid, resource.RLIMIT_AS) == (maths.MEMORY, maths.MEMORY)
    used = int(Path(f"/proc/{worker.pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(worker.pid, resource.RLIMIT_AS, (used + (1 << 20), maths.MEMORY))
    with pytest.raises(Unverified, match="not finished"):
        maths.correct(r"\boxed{2^{100000000}}", "7", seconds=20.0)
    assert maths.correct("#### 2.0", "2") == 1.0


def test_a_worker_that_was_killed_is_replaced():
    maths.correct("#### 1", "1.0")
    worker = maths._worker()
    worker.kill()
    worker.wait()
    assert maths.correct("#### 2.0", "2") == 1.0
    assert maths._worker() is not worker


def test_threads_compare_side_by_side():
    pairs = [(f"#### {i}.0", str(i + i % 2)) for i in range(40)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda pair: maths.correct(*pair), pairs)) == [float(i % 2 == 0) for i in range(40)]


def test_an_interrupted_comparison_leaves_no_reply_for_the_next(monkeypatch):
    worker = maths._worker()
    pipe = worker.stdin

    class Interrupted:  # by the user, once the request is on its way
        write = pipe.write

        def flush(self):
            pipe.flush()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(worker, "stdin", Interrupted())
        maths.correct("#### 3.0", "3")
    assert maths.correct("#### 3.0", "4") == 0.0


def test_a_missing_library_is_one_line_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)  # as if it were not installed
    monkeypatch.setattr(maths, "_own", maths.threading.local())
    with pytest.raises(ConfigError, match="pip install math-verify") as error:
        maths.correct("#### 3", "3")
    assert "\n" not in str(error.value)
