"""The attack: what it finds where noise is as accounted for, and where there is none."""

import numpy as np
import pytest

from experiments import dp_audit
from opd_jax import privacy, privacy_audit


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("loss", dp_audit.LOSSES)
def test_the_attack_stays_below_what_was_accounted_for_and_exceeds_it_without_noise(loss):
    multiplier = privacy.noise_multiplier(2.0, dp_audit.DELTA, dp_audit.RATE, dp_audit.STEPS)
    noised, plain = (dp_audit.attacked(noise, dp_audit.LOSSES[loss]) for noise in (multiplier, 0.0))
    assert noised.epsilon <= 2.0 < plain.epsilon
    assert plain.area > 0.9 > noised.area


def test_a_perfect_attack_and_a_blind_one():
    made = privacy_audit.canaries(0, 1_000, 4, 50)
    assert 400 < made.included.sum() < 600 and made.tokens.min() >= 2 and made.tokens.max() < 50
    seen = privacy_audit.audit(made.included + 0.0, made.included, 1e-5)
    blind = privacy_audit.audit(np.random.default_rng(0).random(1_000), made.included, 1e-5)
    assert seen.epsilon > 4 and seen.area == 1
    assert blind.epsilon < 0.5 and abs(blind.area - 0.5) < 0.06
