"""The experiment's pieces: shipped weights, stages, routing, and one step on one device and on eight."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from configs import common, flow_opd, scenes_base
from experiments import flow_methods, scenes, stages
from experiments import flow_opd as experiment
from experiments.scenes_base import phase_settings
from opd_jax import optim, rng, sharding
from opd_jax.config import ConfigError
from opd_jax.models import lora

NAMES = ("base", *experiment.grpo_parts(flow_opd.get_config()))


def about(name):
    with safe_open(stages.SHIPPED / f"scenes_{name}.safetensors", "np") as file:
        return file.metadata()


@pytest.mark.parametrize("name", NAMES)
def test_shipped_weights_are_small_whole_and_say_how_they_were_made(name):
    path = stages.SHIPPED / f"scenes_{name}.safetensors"
    assert path.stat().st_size < 8 * 2**20
    made = stages.load(path)
    assert made.sha256 in json.dumps(about(name))
    assert name == "base" or (made.seconds > 0 and made.images > 0)


def test_shipped_recipes_are_those_of_the_configs():
    """What `default` starts from is what `full` would make: the hashes of the recipes agree."""
    config = flow_opd.get_config()
    base, recipe = stages.load(stages.SHIPPED / "scenes_base.safetensors"), None
    for name in (pretraining := scenes_base.get_config()).phases:
        recipe = stages.recipe_of(phase_settings(pretraining, name), *([recipe] if recipe else []))
    assert base.recipe == recipe
    for name, part in experiment.grpo_parts(config).items():
        recipe = stages.recipe_of(experiment.grpo_settings(config, part), base.sha256)
        assert stages.load(experiment.shipped(name)).recipe == recipe, name


def test_another_recipe_is_refused(tmp_path):
    path = experiment.shipped("grpo_ocr")
    with pytest.raises(ConfigError, match="full"):
        stages.load(path, "0" * 64)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"damaged\.safetensors"):
        stages.load(damaged)


def test_a_stage_is_made_once(tmp_path):
    calls = []

    def make(checkpoint_dir):
        calls.append(checkpoint_dir)
        return {"w": np.arange(3.0)}, 5

    first, second = (stages.once("x", tmp_path, "a" * 64, make, {}) for _ in range(2))
    assert len(calls) == 1
    assert first.sha256 == second.sha256
    stages.once("x", tmp_path, "b" * 64, make, {})
    assert len(set(calls)) == 2, "another recipe has checkpoints of its own"


def pieces(devices):
    """Flow-OPD on a tiny model over some of the eight devices."""
    config = flow_opd.get_config("tiny")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("data",))
    model = scenes.module(config)
    params = scenes.init_params(model, 0)
    params = jax.tree.map(lambda x: x + 0.02 * jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), params)
    backbone = sharding.replicate(params, mesh)
    velocity = flow_methods.adapted_velocity(model, 1.0, backbone)
    routed = flow_methods.routed_velocity(model, 1.0, backbone)
    adapters = [lora.init(rng.stream(i, "a"), params, config.lora.pattern, 2) for i in range(3)]
    adapters = [jax.tree.map(lambda x, i=i: x + 0.02 * (i + 1), adapter) for i, adapter in enumerate(adapters)]
    recipe = experiment.arm_recipe(config, "flow_opd")
    update, optimizer = flow_methods.opd_update(velocity, config, recipe)
    method = flow_methods.opd_method(velocity, routed, update, config, recipe)
    captions = [text for texts in scenes.held_out(4, 0, False).values() for text in texts]
    batch = {"tokens": scenes.tokens_of(captions), "task": np.repeat(np.arange(2, dtype=np.int32), 4)}
    batch = sharding.shard_batch(batch, mesh)
    teachers = sharding.replicate((adapters[:2], adapters[2]), mesh)
    state = sharding.replicate(optim.init_state(lora.average(adapters), optimizer), mesh)
    return method, state, batch, teachers, velocity


def step(devices):
    method, state, batch, teachers, _ = pieces(devices)
    rollout = method.sample(state.params, batch, rng.stream(0, "sample"))
    labels = method.label(teachers, rollout)
    state, metrics = method.update(state, rollout, labels, rng.stream(0, "update"))
    return jax.device_get((rollout.states, labels, state.params, metrics))


@pytest.fixture(scope="module")
def one_device():
    return step(1)


def test_one_device_equals_eight(one_device):
    for a, b in zip(jax.tree.leaves(one_device), jax.tree.leaves(step(8)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)


def test_every_record_is_labelled_by_its_own_teacher():
    method, state, batch, (teachers, anchor), velocity = pieces(1)
    rollout = method.sample(state.params, batch, rng.stream(0, "sample"))
    labels = method.label((teachers, anchor), rollout)
    x, t = rollout.states[:, 1], rollout.times[:, 1]
    for task, adapter in enumerate(teachers):
        mine = np.flatnonzero(np.asarray(rollout.task) == task)
        alone = velocity(adapter, x, t, rollout.condition)
        np.testing.assert_allclose(labels.teacher_velocity[mine, 1], alone[mine], atol=2e-5)
    alone = velocity(anchor, x, t, rollout.condition)
    np.testing.assert_allclose(labels.anchor_velocity[:, 1], alone, atol=2e-5)


def test_the_position_embedding_and_backbone_stay_frozen():
    method, state, batch, teachers, velocity = pieces(1)
    before = jax.device_get(velocity.args)
    rollout = method.sample(state.params, batch, rng.stream(0, "sample"))
    method.update(state, rollout, method.label(teachers, rollout), rng.stream(0, "update"))
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(velocity.args))


def test_config_pieces_agree():
    assert flow_opd.get_config().model.to_dict() == common.scene_model().to_dict()
    with pytest.raises(ValueError, match="no_such"):
        flow_opd.get_config("no_such")
