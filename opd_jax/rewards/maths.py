r"""Answers to real mathematics problems, compared as mathematics by the library math-verify: fractions, decimals, sets,
intervals, matrices, percentages, equations solved for a variable.

pip install math-verify

A completion is not to be trusted: `\boxed{9^{9^{9^9}}}` keeps a computer algebra system busy for ever. So comparisons
run in a worker process that the kernel ends when its processor time is up, and that may not take much memory. A worker
belongs to the thread that asks, so a pool of threads compares in parallel, and this process needs no signals.
"""

import contextlib
import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

LONGEST = 1000  # characters of an answer
MEMORY = 4 << 30  # bytes a worker may take
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_LINE = re.compile(r"^[ \t]*####(.+)$", re.MULTILINE)
_SENTENCE = re.compile(r"\banswer is:?\s*", re.IGNORECASE)
_NUMBER_OF = re.compile(r"^([-+]?\d[\d,.]*%?)(?: +[A-Za-z]{3,})+$")  # 18 dollars
_own = threading.local()


def final_answer(text: str) -> str | None:
    r"""The answer a text ends on, without dollar signs and, outside a box, without units written out as words.

    Returns:
        The content of the last `\boxed{...}`, else what follows the last `####`, else the last "answer is" up to the
        end of the line or sentence. None where there is none, or the last box is not closed within LONGEST characters.
    """
    if boxes := list(_BOX.finditer(text)):
        content, depth = text[boxes[-1].end() :][:LONGEST], 1
        for found in re.finditer(r"\\.|[{}]", content, re.DOTALL):  # \{ and \} do not count
            depth += {"{": 1, "}": -1}.get(found[0], 0)
            if depth == 0:
                return _bare(content[: found.start()])
        return None
    found = _LINE.findall(text) or [re.split(r"[.!?]\s|\n", rest)[0] for rest in _SENTENCE.split(text)[1:]]
    span = _bare(found[-1]) if found else None
    return _NUMBER_OF.sub(r"\1", span) if span else None


def _bare(span: str) -> str | None:
    """A formula without what surrounds it in a text; None when nothing is left or too much."""
    span = re.sub(r"(?<!\\right)\.$", "", span.strip()).strip("$* ")
    if re.fullmatch(r"\\\(.*\\\)|\\\[.*\\\]", span):
        span = span[2:-2].strip()
    return span if 0 < len(span) <= LONGEST else None


def correct(completion: str, answer: str, seconds: float = 5.0) -> float:
    r"""1.0 where the final answer of a completion equals the reference as mathematics, else 0.0.

    Equality is math-verify's `verify(answer, completion)`: real and symbolic values to six decimals (1/2 = 0.5,
    2\sqrt{2} = \sqrt{8}), sets in any order, intervals with their ends, `x=3` for 3, 50\% for 50 and for 0.5.

    | completion | reward |
    | --- | --- |
    | no final answer, an unclosed box, text that is no mathematics and not the reference itself | 0.0 |
    | a comparison that takes longer than `seconds`, or all memory: nobody knows | Unverified |
    | several boxes | the last counts |

    Args:
        completion: whatever a model wrote; see `final_answer` for what is read from it.
        answer: the reference, as a bare answer or as a solution with a final answer of the same form.
        seconds: limit of one comparison in processor time, so that a busy machine changes no reward. Usual are a few
            milliseconds; the first call in a thread, and the one after a limit was reached, also start a worker, which
            takes seconds.

    Raises:
        ConfigError: math-verify is not installed, or its worker cannot start.
        Unverified: as above.
    """
    worker = _worker()
    gold, target = final_answer(answer) or _bare(answer), final_answer(completion)
    if gold is None or target is None:
        return 0.0
    return float(gold == target or _ask(worker, {"gold": gold, "target": target, "seconds": seconds}))


def _worker() -> subprocess.Popen:
    """The worker of this thread, started when there is none or it has ended. It ends when its input is closed."""
    worker, owner = getattr(_own, "worker", (None, None))
    if worker is not None and owner == os.getpid() and worker.poll() is None:  # a forked process needs its own
        return worker
    from opd_jax.config import ConfigError  # not at the top: a worker runs this file, and needs no JAX

    if importlib.util.find_spec("math_verify") is None:
        raise ConfigError("answers are compared by math-verify, which is not installed; pip install math-verify")
    command = [sys.executable, "-P", __file__]
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, text=True)
    if worker.stdout.readline() != "ready\n":
        raise ConfigError(f"the worker that compares answers does not start; run `{' '.join(command)}` to see why")
    _own.worker = worker, os.getpid()
    return worker


def _ask(worker: subprocess.Popen, request: dict) -> bool:
    """The worker's reply. Where it ended without one, or this process was interrupted, it is not asked again."""
    reply = ""
    try:
        worker.stdin.write(json.dumps(request) + "\n")
        worker.stdin.flush()
        reply = worker.stdout.readline()
    except BrokenPipeError:
        pass
    finally:
        if not reply:
            worker.kill()
            worker.wait()
    if not reply:
        from opd_jax.rewards.verify import Unverified  # not at the top, as in `_worker`

        raise Unverified("maths: a comparison that was not finished")
    return reply == "True\n"


def _short_of_memory() -> bool:
    """Whether this process ever took a quarter of its limit. The library catches MemoryError, and says unequal."""
    import resource

    try:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    except OSError:  # not Linux
        return False
    return 0 < resource.getrlimit(resource.RLIMIT_AS)[0] < 4 * int(status["VmHWM"].split()[0]) << 10


def serve() -> None:
    """What a worker does: a request a line on standard input, a reply a line on standard output."""
    import resource

    from math_verify import parse, verify

    with contextlib.suppress(ValueError, OSError):  # where the system does not limit it
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the default action ends the process, whatever it is busy with
    logging.disable()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply

    def equal(gold: str, target: str) -> bool:
        try:  # without the library's own time limits, which cannot stop everything
            gold, target = (parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in (gold, target))
            return bool(verify(gold, target, timeout_seconds=None))
        except MemoryError:  # no reply
            raise
        except Exception:  # garbage; a parser finds many ways to fail on it
            return False

    equal("(x+1)^2", "x^2+2x+1")  # what is loaded and built at the first use is not on the first request's account
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        reply = equal(request["gold"], request["target"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        if not reply and _short_of_memory():
            return
        print(reply, file=replies, flush=True)


if __name__ == "__main__":
    serve()
