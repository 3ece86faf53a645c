"""The mechanism under attack: a small model trained on canaries alone by DP-OPD's update, and what it gives away.

    python experiments/dp_audit.py          # a minute or two; a table

The canaries have hardly a token in common, so what a step learns of one says nothing of another: the attack is strong,
and the bound on epsilon from below comes close to the accounted one. `docs/privacy.md` says what is attacked.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a program

import jax
import jax.numpy as jnp
import numpy as np
import optax

from opd_jax import dp_sgd, optim, privacy, privacy_audit, report
from opd_jax.losses import dp_opd
from opd_jax.losses.dp_opd import PrivateLabels
from opd_jax.privacy_audit import Audit
from opd_jax.types import TokenRollout

VOCABULARY, WIDTH, LENGTH, CANARIES = 4_000, 16, 6, 400
RATE, STEPS, DELTA, CLIP_NORM, STEP_SIZE = 0.25, 40, 1e-5, 1.0, 40.0
LOSSES = {"distillation": {"beta": 0.0}, "fine-tuning": {"own_weight": 1.0}}


def hidden(params, tokens, segment_ids):
    """A model of bigrams: what comes next depends on the last token alone."""
    return params["embedding"][tokens]


def head(params):
    return params["head"]


def rows_of(tokens, index) -> TokenRollout:
    """Canaries as rollouts; nobody where the index is -1."""
    there = index >= 0
    response = (jnp.arange(LENGTH) > 0)[None] & there[:, None]
    length, nothing = jnp.where(there, LENGTH, 0), jnp.zeros(tokens.shape, jnp.float32)
    return TokenRollout(tokens, response, length, index, jnp.ones_like(index), nothing, nothing, index < -1)


def model(generator: np.random.Generator, scale: float) -> dict:
    """Random weights; the head's are of standard deviation `scale`."""
    embedding, head = generator.normal(size=(VOCABULARY, WIDTH)), scale * generator.normal(size=(WIDTH, VOCABULARY))
    return {"embedding": jnp.array(embedding, jnp.float32), "head": jnp.array(head, jnp.float32)}


def attacked(noise_multiplier: float, loss: dict, seed: int = 0) -> Audit:
    """A model trained on those canaries that are in, and how well they are told from those that are not."""
    made, generator = privacy_audit.canaries(seed, CANARIES, LENGTH, VOCABULARY), np.random.default_rng((seed, 1))
    start, teacher = model(generator, 0.1), model(generator, 1.0)
    supervise, optimizer = dp_opd.supervise(hidden, head, head(teacher), **loss), optax.sgd(STEP_SIZE)
    data = made.tokens[made.included]
    room, expected = privacy.capacity(len(data), RATE, 8), RATE * len(data)
    how = {"clip_norm": CLIP_NORM, "noise_multiplier": noise_multiplier, "expected_batch": expected}
    update, state = dp_sgd.private(supervise, optimizer, **how), optim.init_state(start, optimizer)
    labelled = lambda rows: (rows, PrivateLabels(hidden(teacher, rows.tokens, None), rows.task == 1))
    for step in range(STEPS):
        chosen = np.flatnonzero(generator.random(len(data)) < RATE)
        index = jnp.array(np.pad(chosen, (0, room - len(chosen)), constant_values=-1).astype(np.int32))
        state, _ = update(state, *labelled(rows_of(jnp.array(data)[index], index)), jax.random.key(1000 * seed + step))
    every = labelled(rows_of(jnp.array(made.tokens), jnp.arange(CANARIES)))
    loss_of = jax.jit(lambda params: supervise(params, *every, None).total)
    return privacy_audit.audit(np.asarray(loss_of(start) - loss_of(state.params)), made.included, DELTA)


def main() -> None:
    rows = []
    for name, loss in LOSSES.items():
        for epsilon in (1.0, 2.0, 8.0, None):
            multiplier = privacy.noise_multiplier(epsilon, DELTA, RATE, STEPS) if epsilon else 0.0
            found = attacked(multiplier, loss)
            rows.append({
                "loss": name, "epsilon accounted for": epsilon or "none", "noise multiplier": round(multiplier, 3),
                "epsilon found, at least": round(found.epsilon, 3), "area under ROC": round(found.area, 3),
            })  # fmt: skip
    print(report.format_table(rows))


if __name__ == "__main__":
    main()
