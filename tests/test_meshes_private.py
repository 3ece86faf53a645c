"""Private updates of DP-OPD and its rivals on meshes of eight devices: what one device makes of the same rollouts."""

import functools

import jax
import numpy as np
import pytest
from meshes import HOW, MESHES, STUDENT, TEACHER, exhaustive, on_one_device, params_of, placed, rows, student, teacher

from configs import dp_opd
from experiments import dp_methods
from experiments.recipes import arm_recipe
from opd_jax import optim, sharding
from opd_jax.models import lora
from opd_jax.privacy import Mechanism

# Arm of the config, what it changes, and the noise: so little that the gradient shows, but for one with a real one.
UPDATES = {
    "dp_opd, ghost norms": ("dp_opd", {"lora_rank": 0, "ghost": True}, 1e-3),
    "dp_opd, with noise": ("dp_opd", {"lora_rank": 0}, 1.0),
    "dp_sgd": ("dp_sgd", {"lora_rank": 0}, 1e-3),
    "dpkd": ("dpkd", {}, 1e-3),
    "distildp": ("distildp", {}, None),
}
QUICK = ("dp_opd, ghost norms", "dpkd")


def updated(name, mesh):
    """After an update: Adam's moments, which are the gradient and its square, the metrics, and if the state moved.

    Not the parameters: Adam's first step divides a gradient by its size, however small.
    """
    arm, changes, noise = UPDATES[name]
    recipe = arm_recipe(dp_opd.get_config(), arm)
    recipe.unlock()
    recipe.update({"micro_batch": 8, "micro_batches": 2, "warmup": 0} | changes)
    taught, params, model = placed(params_of(TEACHER, 1), mesh), placed(params_of(STUDENT), mesh), student
    if recipe.lora_rank:
        model = dp_methods.adapted(STUDENT, student.vocab_size, params, recipe.lora_scale)
        params = lora.init(jax.random.key(5), params, recipe.lora_layers, recipe.lora_rank, r"^layers/")
    own = None if noise is None else Mechanism(1.0, 1e-5, noise, 0.1)
    method, optimizer = dp_methods.method(model, teacher, taught, HOW, recipe, own, 16)
    rollout = on_one_device()
    own_text = np.full_like(rollout.task, recipe.on_policy == 0)  # 1: of the record itself, whose log-prob counts
    rollout = rows(rollout._replace(task=own_text), mesh)
    state = placed(optim.init_state(params, optimizer), mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    state, metrics = method.update(state, rollout, method.label(None, rollout), jax.random.key(3))
    moved = [leaf for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(places)) if leaf.sharding != place]
    return *jax.device_get((state.opt_state, metrics)), len(moved)


@functools.cache
def on_one(name):
    return updated(name, None)


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("name", [name if name in QUICK else exhaustive(name) for name in UPDATES])
def test_a_private_update_is_that_of_one_device(name, shape):
    on_one_device()
    expected = on_one(name)
    found = updated(name, sharding.make_mesh(shape))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
