"""Robot policies whose parameters lie by their rules on meshes of eight devices: updates and episodes of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import TENSOR, exhaustive

from configs import vla_opd as configs
from experiments import stages, vla_flow, vla_methods, vla_tabletop
from experiments.recipes import arm_recipe
from experiments.vla_worlds import Acting, Starts
from opd_jax import optim, sharding
from opd_jax.losses.policy_gradient import RewardLabels
from opd_jax.models.decoder import partition_rules
from opd_jax.models.vla import RULES
from opd_jax.sampling import flow
from opd_jax.sampling.episodes import Plan
from opd_jax.types import ActionPaths, EpisodeRollout, PathLabels

B, T, STEPS = 8, 2, 3  # episodes, decisions of each, steps of a flow
MESHES = [pytest.param(TENSOR, id="data2-fsdp2-tensor2"), exhaustive({"data": 4, "fsdp": 2}, id="data4-fsdp2")]
METHODS = {  # the head, and what an arm changes; {}: SFT on demonstrations
    "reverse_kl": ("bins", {"objective": "reverse_kl"}),
    "forward_kl": ("bins", {"objective": "forward_kl"}),
    "hard_cross_entropy": ("bins", {"objective": "hard_cross_entropy"}),
    "sampled": ("bins", {"objective": "sampled"}),
    "grpo": ("bins", {"method": "grpo"}),
    "sft": ("bins", {}),
    "flow": ("flow", {"method": "opd"}),
    "sft of a flow": ("flow", {}),
}
QUICK = ("reverse_kl", "grpo", "flow")
CONFIG = configs.get_config("tiny")


@functools.cache
def world():
    return vla_tabletop.Tabletop(CONFIG, jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]))


@functools.cache
def policy(head):
    if head == "flow":
        return vla_flow.policy(world(), Plan(T, 3), CONFIG.sigma, **CONFIG.flow)
    return vla_methods.bins(world(), Plan(T, 3), CONFIG.sigma, CONFIG.floor)


@functools.cache
def params_of(head, seed=0):
    """Kernels larger than they begin, so that a policy is sure of something."""
    params = jax.jit(policy(head).init)(jax.random.key(seed), world().example)
    return jax.tree.map(lambda leaf: np.asarray(leaf) * (2 if leaf.ndim > 1 else 1), params)


def placed(tree, mesh):
    """As `vla_stages.Experiment.put`."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    return sharding.shard_params(tree, mesh, partition_rules(mesh, RULES))


def rows(tree, mesh):
    return jax.tree.map(jnp.asarray, tree) if mesh is None else sharding.shard_batch(tree, mesh)


@functools.cache
def acted(head):
    """Episodes of a policy that sees noise; some are over early, and every other one is a success."""
    numbers, module, example = np.random.default_rng(0), world().module, jax.device_get(world().example)
    observation = example._replace(
        images=numbers.integers(0, 256, (B, T, *example.images.shape[1:]), np.uint8),
        proprioception=numbers.standard_normal((B, T, *example.proprioception.shape[1:])).astype(np.float32),
        instruction=np.tile(example.instruction[:, None], (B, T, 1)),
    )
    left = np.array([6, 3, 4, 6] * 2)[:, None] - 3 * np.arange(T)  # steps from a decision on
    counted = np.arange(module.horizon) < np.clip(left, 0, 3)[..., None]
    if head == "flow":
        states = numbers.standard_normal((B, T, STEPS + 1, module.horizon, module.action_dim)).astype(np.float32)
        along = np.broadcast_to(flow.time_grid(STEPS), (B, T, STEPS + 1))
        drawn = ActionPaths(states, along, np.full((B, T, STEPS), 0.5, np.float32))
    else:
        flat = jax.tree.map(lambda leaf: jnp.asarray(leaf).reshape(B * T, *leaf.shape[2:]), observation)
        act = jax.jit(vla_methods.drawn(vla_methods.logits_fn(module)))
        drawn, _ = act(params_of(head), flat, jax.random.split(jax.random.key(1), B * T))
        drawn = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(B, T, *leaf.shape[1:]), drawn)
    index = np.arange(B, dtype=np.int32)
    success = (index % 2).astype(np.float32)
    return EpisodeRollout(observation, drawn, counted, success, counted.sum((1, 2)).astype(np.int32), index // 2, index)


def shown():
    """A batch of demonstrations."""
    observation = jax.tree.map(lambda leaf: leaf[:, 0], acted("bins").observation)
    size = B, world().module.horizon, world().module.action_dim
    actions = np.random.default_rng(1).uniform(-1, 1, size).astype(np.float32)
    counted = np.arange(size[1]) < 1 + np.arange(B)[:, None] % size[1]
    return {"observation": observation, "actions": actions, "counted": counted, "task": np.zeros(B, np.int32)}


def given(name, mesh):
    """`(method, optimizer, rollout, labels)` of a method."""
    head, changes = METHODS[name]
    recipe = arm_recipe(CONFIG, "vla_opd")
    recipe.unlock()
    recipe.update({"teacher": "another", "warmup": 0, "learning_rate": 1e-3} | changes)
    if not changes:
        method, optimizer = policy(head).imitation(recipe)
        rollout = method.sample(None, rows(shown(), mesh), jax.random.key(4))
        return method, optimizer, rollout, method.label(None, rollout)
    (method, optimizer), rollout = policy(head).on_policy(recipe), rows(acted(head), mesh)
    if head == "flow":
        velocity = np.random.default_rng(2).standard_normal(rollout.drawn.states[:, :, :-1].shape)
        return method, optimizer, rollout, PathLabels(rows(velocity.astype(np.float32), mesh))
    teacher = None if recipe.method == "grpo" else placed(params_of(head, 1), mesh)
    return method, optimizer, rollout, method.label(teacher, rollout)


def two_updates(name, mesh):
    """Losses and gradient norms; the second knows the gradient of the first."""
    method, optimizer, rollout, labels = given(name, mesh)
    if isinstance(labels, RewardLabels):
        assert jnp.unique(labels.advantage).size == 2
    state = placed(optim.init_state(placed(params_of(METHODS[name][0]), mesh), optimizer), mesh)
    places, found = jax.tree.map(lambda leaf: leaf.sharding, state), []
    split = [leaf for leaf in jax.tree.leaves(state.params) if not leaf.sharding.is_fully_replicated]
    assert len(split) > 8 or mesh is None
    for _ in range(2):
        state, metrics = method.update(state, rollout, labels, jax.random.key(2))
        found.append((float(metrics["loss"]), float(metrics["gradient_norm"])))
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    return found


@functools.cache
def on_one_device(name):
    return two_updates(name, None)


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("name", [name if name in QUICK else exhaustive(name) for name in METHODS])
def test_losses_are_those_of_one_device(name, shape):
    expected = on_one_device(name)
    found = two_updates(name, sharding.make_mesh(shape))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=2e-6)
    # Between them is Adam's first step, which divides a gradient by its own size: the rounding of small ones counts.
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5 if name in QUICK else 1e-4, atol=2e-6)


@pytest.mark.slow
def test_episodes_are_those_of_one_device():
    """Of a copy of the parameters that is whole over fsdp."""
    act = vla_methods.drawn(vla_methods.logits_fn(world().module))
    starts = Starts(np.arange(B, dtype=np.uint32), np.arange(B, dtype=np.int32))
    drawn = []
    for mesh in (None, sharding.make_mesh(TENSOR)):
        params = stages.copied(world().module.sampling_copy, placed(params_of("bins"), mesh))
        rollout = world().play(act, params, rows(starts, mesh), jax.random.key(1), Acting(Plan(T, 3)))
        drawn.append(jax.device_get((rollout.drawn.tokens, rollout.length)))
    jax.tree.map(np.testing.assert_array_equal, *drawn)
