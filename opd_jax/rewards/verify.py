"""Verifiers decide whether a completion is right: one protocol for mathematics, programs and answers to pictures.

A verifier is a function `(completion, reference) -> 1.0 or 0.0`; where it cannot tell it raises `Unverified`, which
makes the outcome unknown, NaN, and never wrong. A completion that no verifier could make sense of is wrong.
"""

import concurrent.futures
import functools
import importlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from opd_jax.config import ConfigError

Reference = str | Sequence | Mapping | None  # what a problem says about right answers; None and "" say nothing
Verifier = Callable[[str, Any], float]


class Unverified(Exception):
    """Neither right nor wrong, for a short reason that is the same for all answers it holds for."""


class Verdicts(NamedTuple):
    outcome: Float[np.ndarray, "B"]  # 1 right, 0 wrong, NaN unknown
    failures: dict[str, int]  # why outcomes are unknown although there is a reference, and how often


def _later(module: str, name: str) -> Verifier:
    """A verifier of this package whose module is imported when it is first asked."""
    return lambda completion, reference: getattr(importlib.import_module(module), name)(completion, reference)


VERIFIERS: dict[str, Verifier] = {  # by domain
    "maths": _later("opd_jax.rewards.maths", "correct"),
    "code": _later("opd_jax.rewards.code", "correct"),
    "choice": _later("opd_jax.rewards.answers", "choice"),
    "number": _later("opd_jax.rewards.answers", "number"),
    "text": _later("opd_jax.rewards.answers", "anls"),
}


def verdicts(
    verifiers: Mapping[str, Verifier] | Callable[[str], Verifier],
    completions: Sequence[str],
    references: Sequence[Reference],
    domains: Sequence[str],
    threads: int | None = None,
) -> Verdicts:
    """What the verifier of its domain says of every completion, in order.

    | case | outcome | failures |
    | --- | --- | --- |
    | a reference of None or "" | NaN | not counted, no verifier asked |
    | `Unverified` | NaN | by its reason |
    | any other exception | NaN | by the name of its class |

    Args:
        verifiers: by domain, such as `VERIFIERS`.
        threads: that ask side by side, one for each processor if None. They live on, and with them the workers that
            belong to them. 1 asks in the caller's thread, best where a verifier takes microseconds.

    Raises:
        ConfigError: naming a domain without verifier, before any is asked; or as a verifier raised it, since what is
            not installed is missing for all answers.
    """
    find = verifiers.__getitem__ if isinstance(verifiers, Mapping) else verifiers
    by_domain = {}
    for domain in dict.fromkeys(domains):
        try:
            by_domain[domain] = find(domain)
        except KeyError as error:
            known = f"; there are {', '.join(sorted(verifiers))}" if isinstance(verifiers, Mapping) else ""
            raise ConfigError(f"no verifier for the domain {domain!r}{known}") from error
    asked = [by_domain[domain] for domain in domains]
    run = map if threads == 1 else _pool(threads or os.cpu_count() or 1).map
    said = list(run(_verdict, asked, completions, references))
    failures = Counter(reason for _, reason in said if reason)
    return Verdicts(np.asarray([outcome for outcome, _ in said], np.float32), dict(failures))


@functools.cache
def _pool(threads: int) -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(threads, "verifier")


def _verdict(verifier: Verifier, completion: str, reference: Reference) -> tuple[float, str]:
    """An outcome, and where it is unknown for no want of a reference, why."""
    if reference is None or reference == "":
        return np.nan, ""
    try:
        return float(verifier(completion, reference)), ""
    except ConfigError:
        raise
    except Unverified as error:
        return np.nan, str(error) or "Unverified"
    except Exception as error:
        return np.nan, type(error).__name__
