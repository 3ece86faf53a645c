"""Flow-OPD, its specialists and the offline baseline on meshes of eight devices, and what devices exchange."""

import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from flow_pieces import HEADS, one, pieces
from meshes import TENSOR, exhaustive

from configs import flow_opd, scenes_base
from experiments import flow_methods, scenes
from experiments import flow_opd as experiment
from experiments import scenes_base as pretraining
from opd_jax import cost, optim, rng, sharding

MESHES = [
    pytest.param(TENSOR, id="data2-fsdp2-tensor2"),
    exhaustive({"data": 8}, id="data8"),
    exhaustive({"data": 2, "fsdp": 4}, id="data2-fsdp4"),
    exhaustive({"data": 2, "tensor": 4}, id="data2-tensor4"),
    exhaustive({"tensor": 8}, id="tensor8"),  # more than there are heads
]
METHODS = ("flow_opd", "flow_grpo", "awm", "offline")


def made(name, world, adapters):
    """`(method, optimizer, teacher_params)`."""
    config = flow_opd.get_config("tiny").copy_and_resolve_references().unlock()
    grpo = name in ("flow_grpo", "awm")
    recipe = experiment.grpo_recipe(config, config.teachers.ocr) if grpo else experiment.arm_recipe(config, name)
    recipe.unlock().update({"warmup": 0, "method": name} if grpo else {"warmup": 0})
    if grpo:
        update, optimizer = flow_methods.grpo_update(world.velocity, recipe)
        judge = lambda *what: flow_methods.Own(world.reward, what)
        method = flow_methods.grpo_method(world, ("quality", "quality"), update, config, recipe, judge)
        return method, optimizer, adapters[0][0]
    if name == "offline":
        update, optimizer = flow_methods.offline_update(world.velocity, recipe)
        return flow_methods.offline_method(world, adapters[0], update, config, recipe), optimizer, None
    update, optimizer = flow_methods.opd_update(world.velocity, recipe, config)
    return flow_methods.opd_method(world, update, config, recipe), optimizer, adapters


def two_updates(name, mesh):
    """The rollout, its labels, losses and gradient norms; the second pair knows the gradient of the first."""
    _, state, batch, adapters, world = pieces(mesh, 0.1)
    method, optimizer, taught = made(name, world, adapters)
    rollout = method.sample(state.params, batch, rng.stream(0, "sample"))
    labels = method.label(taught, rollout)
    state, found = sharding.replicate(optim.init_state(state.params, optimizer), mesh), []
    for _ in range(2):
        state, metrics = method.update(state, rollout, labels, rng.stream(0, "update"))
        found.append((float(metrics["loss"]), float(metrics["gradient_norm"])))
    return *jax.device_get((rollout, labels)), found


@functools.cache
def on_one_device(name):
    return two_updates(name, one())


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("name", ["flow_opd", *map(exhaustive, METHODS[1:])])
def test_one_device_equals_eight(name, shape):
    """States and velocities are of size 1, and differ by no more than their rounding in float32."""
    *expected, losses = on_one_device(name)
    *found, others = two_updates(name, sharding.make_mesh(shape))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(others, losses, rtol=1e-5, atol=1e-7)
    assert min(norm for _, norm in losses) > 1e-5, "or the second update hardly differs from the first"


def test_parameters_are_split_over_fsdp_and_gathered_a_layer_at_a_time():
    """The frozen backbone of a student; and all of what the base trains, with its gradient, moments and average."""
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    *_, world = pieces(mesh)
    (backbone,) = world.velocity.args
    state, update, arguments = base_update(mesh)
    whole = {leaf.shape for leaf in jax.tree.leaves(backbone) if leaf.ndim == 2}
    for leaf in jax.tree.leaves((backbone, state)):
        split = leaf.shape in whole and 4 * leaf.addressable_shards[0].data.size == leaf.size
        assert split or leaf.shape not in whole, leaf.shape
    text = update.func.lower(*update.args, state, *arguments).compile().as_text()
    sent = cost.cost_of(text, devices=8).collectives
    weights = sum(4 * leaf.size for leaf in jax.tree.leaves(state.params) if leaf.ndim == 2) * 3 / 4
    assert 0.9 * weights < sent["all-gather"].bytes < 2 * weights, "forward, and perhaps again backward"
    assert sent["all-to-all"].bytes < 1e3, "activations stay where their records are"


def test_layers_are_split_over_tensor_and_none_is_gathered():
    """Megatron's exchange: the sums of what the parts of a layer give, and the vectors of modulation."""
    mesh = sharding.make_mesh({"data": 2, "tensor": 4})
    state, update, arguments = base_update(mesh)
    inside = [
        leaf
        for path, leaf in flatten_dict(state.params, sep="/").items()
        if path.endswith("kernel") and path.startswith(("blocks", "norm_out"))
    ]
    assert all(4 * leaf.addressable_shards[0].data.size == leaf.size for leaf in inside)
    sent = cost.cost_of(update.func.lower(*update.args, state, *arguments).compile().as_text(), devices=8).collectives
    assert sent.keys() == {"all-gather", "all-reduce"}
    assert sent["all-gather"].bytes < min(4 * leaf.size for leaf in inside), "of vectors alone, in the whole update"


def base_update(mesh, heads=HEADS):
    """A state, an update of the base's pretraining, and what it is given."""
    config = pretraining.phase_of(scenes_base.get_config("tiny"), "web")
    model = scenes.module(config).clone(**heads)
    method, optimizer = pretraining.method(config, scenes.full_velocity(model))
    state = scenes.place(optim.init_state(scenes.place(scenes.init_params(model, 0), mesh), optimizer), mesh)
    captions = [text for texts in scenes.held_out(4, 0, False).values() for text in texts]
    images = np.random.default_rng(0).standard_normal((8, *scenes.SHAPE)).astype(np.float32)
    batch = sharding.shard_batch({"image": images, "condition": scenes.tokens_of(captions)}, mesh)
    rollout = method.sample(state.params, batch, rng.stream(0, "sample"))
    return state, method.update, (rollout, rollout.velocity, rng.stream(0, "update"))


@functools.cache
def base_losses(shape, heads=4):
    mesh = sharding.make_mesh(dict(shape)) if shape else one()
    state, update, arguments = base_update(mesh, {"num_heads": heads, "head_dim": 96 // heads})
    places, found = jax.tree.map(lambda leaf: leaf.sharding, state), []
    for _ in range(2):
        state, metrics = update(state, *arguments)
        found.append((float(metrics["loss"]), float(metrics["gradient_norm"])))
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    return found


def test_the_base_learns_the_same_on_one_device_and_on_eight():
    alone = {heads: base_losses((), heads) for heads in (4, 3)}
    for heads, shape in ((4, {"data": 2, "fsdp": 4}), (4, TENSOR), (3, TENSOR)):  # three do not divide
        np.testing.assert_allclose(base_losses(tuple(shape.items()), heads), alone[heads], rtol=1e-5)
