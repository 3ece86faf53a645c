"""A student, a teacher, problems and meshes of eight devices, for tests of methods of language models on them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import language, token_methods
from opd_jax import sharding
from opd_jax.models.decoder import Decoder, partition_rules
from opd_jax.sampling.tokens import SamplingParams

exhaustive = functools.partial(pytest.param, marks=pytest.mark.exhaustive)
TENSOR, SEQUENCE = {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "sequence": 2, "tensor": 2}
MESHES = [
    pytest.param(TENSOR, id="data2-fsdp2-tensor2"),
    pytest.param(SEQUENCE, id="fsdp2-sequence2-tensor2"),
    exhaustive({"data": 8}, id="data8"),
    exhaustive({"data": 2, "fsdp": 4}, id="data2-fsdp4"),
    exhaustive({"tensor": 4, "data": 2}, id="data2-tensor4"),
    exhaustive({"data": 4, "sequence": 2}, id="data4-sequence2"),
    exhaustive({"fsdp": 8}, id="fsdp8"),
    exhaustive({"tensor": 8}, id="tensor8"),
    exhaustive({"sequence": 8}, id="sequence8"),
]
ALONE = [pytest.param(*mesh.values, id=mesh.id) for mesh in MESHES[-3:]]  # meshes of one axis
V, ROOM, NEW = 72, 24, 16  # columns of the heads, some of them padding; tokens of prompts and of answers
STUDENT = Decoder(V, 32, 64, 2, 4, 2, 8, qk_norm=True)
TEACHER = Decoder(V, 48, 64, 2, 4, 2, 16)
LANGUAGE, PROBLEMS = language.reasoning_language(), language.reasoning_problems(8, 0, (1,))
HOW = SamplingParams(NEW, LANGUAGE.stop_ids, temperature=0.9)
student, teacher = (language.functions(module, LANGUAGE.vocab_size) for module in (STUDENT, TEACHER))


@functools.cache
def params_of(module, seed=0):
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    numbers = np.random.default_rng(seed)
    draw = lambda x: (0.2 * numbers.standard_normal(x.shape) + (x.ndim < 3 and x.shape[-1] < V)).astype(np.float32)
    return jax.tree.map(draw, shapes)


def placed(tree, mesh):
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    return sharding.shard_params(tree, mesh, partition_rules(mesh))


def rows(tree, mesh):
    return jax.tree.map(jnp.asarray, tree) if mesh is None else sharding.shard_batch(tree, mesh)


def sampled(mesh):
    """Two answers to each of eight problems."""
    batch = [token_methods.prompt(PROBLEMS, ROOM, index) for index in range(8)]
    batch = rows(jax.tree.map(lambda *leaves: np.stack(leaves), *batch), mesh)
    return token_methods.answer(student, HOW, 2)(placed(params_of(STUDENT), mesh), batch, jax.random.key(1))


@functools.cache
def on_one_device():
    return jax.device_get(sampled(None))
