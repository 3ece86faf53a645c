# SPDX-License-Identifier: Apache-2.0
"""What an attacker learns: a lower bound on epsilon from one run with canaries (Steinke et al., arXiv:2305.08846).

Canaries are made-up records, each put among the private ones on the toss of a coin. Whoever guesses from the finished
model which of them were there, and is right more often than epsilon allows, has shown that epsilon is larger. The bound
is one of jax_privacy's `CanaryScoreAuditor`; a bound of 0 shows nothing, a bound above what was accounted for shows a
mistake in the mechanism or in its accounting.
"""

from typing import NamedTuple

import numpy as np
from jax_privacy.auditing import CanaryScoreAuditor
from jaxtyping import Bool, Float, Int


class Canaries(NamedTuple):
    """Records of random tokens, and which of them are in the data set."""

    tokens: Int[np.ndarray, "m S"]
    included: Bool[np.ndarray, "m"]


class Audit(NamedTuple):
    """What the attack found."""

    epsilon: float  # lower bound
    area: float  # under the ROC curve: 0.5 is guessing
    canaries: int


def canaries(seed: int, count: int, length: int, vocab_size: int, first: int = 2) -> Canaries:
    """`count` records of `length` tokens, uniform over ids `first` to `vocab_size`; a coin for each."""
    generator = np.random.default_rng((seed, count))
    tokens = generator.integers(first, vocab_size, size=(count, length), dtype=np.int32)
    return Canaries(tokens, generator.random(count) < 0.5)


def audit(
    score: Float[np.ndarray, "m"], included: Bool[np.ndarray, "m"], delta: float, confidence: float = 0.95
) -> Audit:
    """A lower bound on epsilon at `delta`, which holds with probability `confidence` over coins and training.

    Args:
        score: of every canary, higher where it looks as if it had been trained on: its loss before less its loss after.
        included: whether it was.
    """
    auditor = CanaryScoreAuditor(np.float64(score[included]), np.float64(score[~included]))
    bound = auditor.epsilon_one_run(significance=1 - confidence, delta=delta)
    return Audit(float(bound), float(auditor.attack_auroc()), len(score))
