"""Flow-OPD on a tiny model of scenes, for tests."""

import jax
import jax.numpy as jnp
import numpy as np

from configs import flow_opd
from experiments import flow_methods, scenes
from experiments import flow_opd as experiment
from opd_jax import optim, rng, sharding
from opd_jax.models import lora

HEADS = {"num_heads": 4, "head_dim": 24}  # which an axis `tensor` of 2 or 4 divides


class World(scenes.Scenes):
    """The scenes with a backbone of the test's."""

    def __init__(self, model, backbone):
        wearing = model, 1.0, backbone, scenes.encode
        self.velocity = flow_methods.adapted_velocity(*wearing)
        self.routed = flow_methods.routed_velocity(*wearing)


def pieces(mesh, size=0.02):
    """Flow-OPD on a tiny model; `size`: of adapters, and of what teachers differ by."""
    config = flow_opd.get_config("tiny")
    model = scenes.module(config).clone(**HEADS)
    params = scenes.init_params(model, 0)
    params = jax.tree.map(lambda x: x + 0.02 * jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), params)
    backbone = scenes.place(params, mesh)
    world = World(model, backbone)
    adapters = [lora.init(rng.stream(i, "a"), params, config.lora.pattern, 2) for i in range(3)]
    adapters = [jax.tree.map(lambda x, i=i: x + size * (i + 1), adapter) for i, adapter in enumerate(adapters)]
    recipe = experiment.arm_recipe(config, "flow_opd")
    update, optimizer = flow_methods.opd_update(world.velocity, recipe, config)
    method = flow_methods.opd_method(world, update, config, recipe)
    captions = [text for texts in scenes.held_out(4, 0, False).values() for text in texts]
    batch = {"condition": scenes.tokens_of(captions), "task": np.repeat(np.arange(2, dtype=np.int32), 4)}
    batch = sharding.shard_batch(batch, mesh)
    teachers = sharding.replicate((adapters[:2], adapters[2]), mesh)
    state = sharding.replicate(optim.init_state(lora.average(adapters), optimizer), mesh)
    return method, state, batch, teachers, world


def one():
    return jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
