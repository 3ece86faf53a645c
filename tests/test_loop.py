"""The loop itself: order of the four functions, resume in the middle, and no state saved that is not finite."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opd_jax import data, loop, optim
from opd_jax.types import Method, Weighted


def supervise(params, rollout, labels, key):
    error = (rollout - labels) @ params["w"]
    return Weighted(error**2, jnp.ones_like(error))


OPTIMIZER = optax.adam(0.1)


def method(spoil_at=None):
    def sample(params, batch, key):
        noise = jax.random.normal(key, batch["x"].shape)
        spoilt = jnp.nan if spoil_at is not None and batch["x"][0, 0] == spoil_at else 0.0
        return batch["x"] + noise * params["w"][None] + spoilt

    return Method(sample, lambda teacher, rollout: rollout * teacher, optim.dense(supervise, OPTIMIZER))


def numbers():
    return data.batches(lambda rng: {"x": rng.standard_normal(3).astype(np.float32)}, 4, seed=1)


def run(workdir, steps, **options):
    return loop.run(
        options.get("method") or method(),
        optim.init_state({"w": jnp.ones(3)}, OPTIMIZER),
        options.get("data") or numbers(),
        workdir=workdir,
        stage="toy",
        checkpoint_dir=workdir / "checkpoints",
        steps=steps,
        seed=3,
        teacher_params=jnp.float32(0.5),
        save_every=2,
    )[0]


def test_resumed_in_the_middle_equals_unbroken(tmp_path):
    """4 + 3 steps, the second part from another process's point of view, equal 7; and adding none changes nothing."""
    whole = run(tmp_path / "whole", 7)
    run(tmp_path / "parts", 4)
    parts = run(tmp_path / "parts", 7)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    jax.tree.map(np.testing.assert_array_equal, whole, run(tmp_path / "parts", 7))
    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(7))
    assert {"seconds/sample", "seconds/label", "seconds/update", "peak_memory"} <= lines[-1].keys()


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    fourth = [next(batches) for batches in [numbers()] for _ in range(4)][3]["x"][0, 0]
    with pytest.raises(FloatingPointError, match=r"toy step 3.*checkpoints/2"):
        run(tmp_path, 8, method=method(spoil_at=fourth))
    saved = run(tmp_path, 2)
    assert int(saved.step) == 2
    assert np.isfinite(saved.params["w"]).all()


class Three:
    """Three batches, and no more."""

    def __init__(self):
        self.all = numbers()

    def __iter__(self):
        return self

    def __next__(self):
        if self.get_state()["next_index"] >= 3:
            raise StopIteration
        return next(self.all)

    def get_state(self):
        return self.all.get_state()

    def set_state(self, state):
        self.all.set_state(state)


def test_where_the_data_ends_the_run_does_and_what_it_made_is_kept(tmp_path):
    assert int(run(tmp_path / "short", 7, data=Three()).step) == 3
    kept = run(tmp_path / "short", 7, data=Three())
    jax.tree.map(np.testing.assert_array_equal, kept, run(tmp_path / "whole", 3))
