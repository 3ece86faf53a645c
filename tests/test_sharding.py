# SPDX-License-Identifier: Apache-2.0
import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from opd_jax import optim, sharding
from opd_jax.config import ConfigError
from opd_jax.losses.linear_divergence import linear_divergence
from opd_jax.models import decoder
from opd_jax.models.decoder import Decoder
from opd_jax.types import Weighted


@pytest.fixture(autouse=True)
def no_mesh_left_behind():
    before = jax.sharding.get_mesh()
    yield
    jax.set_mesh(before)


def single_device():
    return jax.make_mesh((1,), ("data",), devices=jax.devices()[:1], axis_types=(AxisType.Auto,))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (None, {"data": 8}),
        ({"data": 4, "tensor": 2}, {"data": 4, "tensor": 2}),
        ({"data": -1, "tensor": 4}, {"data": 2, "tensor": 4}),
        ({"data": 2, "fsdp": -1, "sequence": 1, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}),
    ],
)
def test_make_mesh_sets_an_auto_mesh(shape, expected):
    mesh = sharding.make_mesh(shape)
    assert dict(mesh.shape) == expected
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert jax.sharding.get_mesh() == mesh


@pytest.mark.parametrize("shape", [{"data": 3}, {"data": -1, "tensor": 3}, {"data": 0}, {"data": -1, "tensor": -1}])
def test_make_mesh_refuses_what_does_not_fit(shape):
    with pytest.raises(
        ConfigError, match=r"mesh=.*: does not fit 8 devices; make the sizes multiply to 8, as by --config.mesh.data=-1"
    ):
        sharding.make_mesh(shape)


def test_an_axis_of_another_name_is_refused():
    with pytest.raises(ConfigError, match=r"there is no axis 'model'; choose of data, fsdp, sequence, tensor$"):
        sharding.make_mesh({"data": 4, "model": 2})


@pytest.mark.parametrize(
    ("shape", "axes", "parts"),
    [
        ({"data": 8}, ("data",), 8),
        ({"data": 2, "fsdp": 4}, ("data", "fsdp"), 8),
        ({"fsdp": 2, "sequence": 2, "tensor": 2}, ("fsdp",), 2),
        ({"tensor": 8}, (), 1),
    ],
)
def test_records_split_over_records_and_fsdp_together(shape, axes, parts):
    mesh = sharding.make_mesh(shape)
    assert sharding.record_axes(mesh) == sharding.record_axes() == axes
    assert sharding.record_parts(mesh) == sharding.record_parts() == parts
    placed = sharding.shard_batch(np.arange(8), mesh)
    assert placed.addressable_shards[0].data.shape == (8 // parts,)
    assert sharding.mapped_axis(8) == (axes or None) and sharding.mapped_axis(9) in (None, axes or None)
    assert bool(sharding.uneven(9, mesh)) == (parts > 1)


def test_without_a_mesh_records_are_whole():
    assert sharding.record_axes() == () and sharding.record_parts() == 1 and sharding.mapped_axis(3) is None


@pytest.mark.parametrize(("batch", "remedy"), [(12, "use 8 or 16"), (3, "use 8"), (0, "use 8")])
def test_an_uneven_batch_is_named(batch, remedy):
    mesh = sharding.make_mesh()
    assert sharding.uneven(16, mesh) == ""
    wrong = sharding.uneven(batch, mesh, "sft.batch_size")
    assert wrong == f"sft.batch_size={batch}: does not split over 8 devices; {remedy}"


@pytest.mark.parametrize(
    ("records", "parts", "says"),
    [
        (64, 0, "64 records do not divide into 0 micro-batches; use a divisor, or change micro_batches=0 or mesh="),
        (64, 3, "64 records do not divide into 3"),
        (12, 1, "records=12: does not split over 8 devices; use 8 or 16, or change micro_batches=1"),
        (64, 16, "records of a micro-batch=4: does not split over 8 devices; use 8"),
    ],
)
def test_uneven_micro_batches_are_named(records, parts, says):
    mesh = sharding.make_mesh()
    assert sharding.uneven_parts(64, 8, mesh) == ""
    assert sharding.uneven_parts(records, parts, mesh).startswith(says)


def test_shard_batch_splits_the_first_axis_and_keeps_values():
    mesh = sharding.make_mesh({"data": 4, "tensor": 2})
    batch = {"x": np.arange(24.0).reshape(8, 3), "id": np.arange(8)}
    sharded = sharding.shard_batch(batch, mesh)
    assert sharded["x"].addressable_shards[0].data.shape == (2, 3)
    assert sharded["id"].sharding == NamedSharding(mesh, PartitionSpec("data"))
    jax.tree.map(np.testing.assert_array_equal, sharded, batch)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"x": np.zeros((8, 2)), "y": np.zeros(4)}, "needs the same one"),
        ({"x": np.zeros(8), "temperature": np.zeros(())}, "needs the same one"),
        ({"x": np.zeros((9, 2))}, "batch_size=9: does not split over 8 devices; use 8 or 16"),
    ],
)
def test_shard_batch_refuses_uneven_batches(batch, expected):
    with pytest.raises(ConfigError, match=expected):
        sharding.shard_batch(batch, sharding.make_mesh())


RULES = (("dense/kernel$", PartitionSpec(None, "tensor")), ("embed", PartitionSpec("tensor")))


def example_params():
    return {
        "block_0": {"dense": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones((6,))}},
        "embed": {"table": jnp.ones((8, 4))},
    }


def test_rules_reach_params_and_the_optimizer_state_alike():
    mesh = sharding.make_mesh({"data": 4, "tensor": 2})
    params = sharding.shard_params(example_params(), mesh, RULES)
    assert params["block_0"]["dense"]["kernel"].sharding.spec == PartitionSpec(None, "tensor")
    assert params["block_0"]["dense"]["bias"].sharding.spec == PartitionSpec()
    assert params["embed"]["table"].addressable_shards[0].data.shape == (4, 4)
    adam = sharding.shard_params(optax.adam(1e-3).init(example_params()), mesh, RULES)[0]
    assert adam.mu["block_0"]["dense"]["kernel"].sharding == params["block_0"]["dense"]["kernel"].sharding
    assert adam.count.sharding.spec == PartitionSpec()


def test_the_first_rule_that_matches_wins():
    rules = (("kernel", PartitionSpec("tensor")), *RULES)
    assert sharding.param_specs(example_params(), rules)["block_0"]["dense"]["kernel"] == PartitionSpec("tensor")


def test_a_later_rule_says_what_stays_whole():
    mesh = sharding.make_mesh({"data": 2, "tensor": 4})
    rules = (*RULES, ("dense/kernel$", PartitionSpec("tensor")))
    assert sharding.param_specs(example_params(), rules, mesh)["block_0"]["dense"]["kernel"] == PartitionSpec("tensor")
    assert sharding.param_specs(example_params(), rules)["block_0"]["dense"]["kernel"] == PartitionSpec(None, "tensor")


def test_shard_params_names_the_parameter_that_does_not_fit():
    mesh = sharding.make_mesh({"data": 2, "tensor": 4})
    with pytest.raises(ConfigError, match=r"block_0/dense/kernel: an axis of 6 does not split over tensor=4"):
        sharding.shard_params(example_params(), mesh, RULES)
    with pytest.raises(ConfigError, match=r"block_0/dense/bias: .* does not fit the shape \(6,\)"):
        sharding.shard_params(example_params(), mesh, (("bias", PartitionSpec(None, "tensor")),))


def test_a_copy_to_sample_from_stays_split_over_all_axes_but_fsdp():
    rules = (("a$", PartitionSpec("fsdp", "tensor")), ("b$", PartitionSpec("tensor", "fsdp")))
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    for found in (sharding.gathered_rules(rules), sharding.gathered_rules(rules, mesh)):
        assert found == (("a$", PartitionSpec(None, "tensor")), ("b$", PartitionSpec("tensor", None)))
    whole = PartitionSpec(None, None)
    assert sharding.gathered_rules(rules, single_device()) == (("a$", whole), ("b$", whole))


def test_replicate_puts_the_whole_array_everywhere():
    array = sharding.replicate({"w": np.arange(4.0)}, sharding.make_mesh())["w"]
    assert len(array.addressable_shards) == 8
    assert all(shard.data.shape == (4,) for shard in array.addressable_shards)


def weighted_mean_loss(params, batch):
    """Records of unequal weight: the mean of per-device means would differ."""
    hidden = jnp.tanh(batch["x"] @ params["in"]["kernel"])
    error = jnp.sum((hidden @ params["out"]["kernel"] - batch["y"]) ** 2, axis=-1)
    return jnp.sum(error * batch["weight"]) / jnp.sum(batch["weight"])


@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 4, "tensor": 2}])
def test_gradient_of_a_weighted_mean_is_the_same_on_1_and_8_devices(shape):
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=(16, 4)).astype(np.float32),
        "y": rng.normal(size=(16, 2)).astype(np.float32),
        "weight": np.arange(16, dtype=np.float32) ** 2,
    }
    params = {
        "in": {"kernel": rng.normal(size=(4, 6)).astype(np.float32)},
        "out": {"kernel": rng.normal(size=(6, 2)).astype(np.float32)},
    }
    step = jax.jit(jax.value_and_grad(weighted_mean_loss))
    one = single_device()
    jax.set_mesh(one)
    expected = step(sharding.replicate(params, one), sharding.shard_batch(batch, one))
    mesh = sharding.make_mesh(shape)
    rules = (("in/kernel", PartitionSpec(None, "tensor")),) if "tensor" in shape else ()
    got = step(sharding.shard_params(params, mesh, rules), sharding.shard_batch(batch, mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)

    x, y, w = (np.asarray(batch[k], np.float64) for k in ("x", "y", "weight"))
    hidden = np.tanh(x @ params["in"]["kernel"])
    error = hidden @ params["out"]["kernel"] - y
    np.testing.assert_allclose(got[0], np.sum(np.sum(error**2, -1) * w) / w.sum(), rtol=1e-5)
    np.testing.assert_allclose(
        got[1]["out"]["kernel"], hidden.T @ (2 * error * w[:, None]) / w.sum(), rtol=1e-4, atol=1e-5
    )


def test_micro_batches_by_swapped_axes_gather_nothing():
    mesh = sharding.make_mesh()
    x = sharding.shard_batch(np.arange(64.0, dtype=np.float32).reshape(32, 2), mesh)

    def pieces(x):
        return jnp.swapaxes(x.reshape(32 // 4, 4, 2), 0, 1)

    text = jax.jit(lambda x: jax.lax.map(jnp.sum, pieces(x))).lower(x).compile().as_text()
    assert "all-gather" not in text


def test_a_new_state_lies_where_the_old_one_did():
    mesh = sharding.make_mesh({"data": 4, "tensor": 2})
    x = sharding.shard_batch({"x": np.ones((8, 4), np.float32)}, mesh)["x"]

    def begin():
        tree = {"dense": {"kernel": np.ones((4, 6), np.float32), "bias": np.zeros(6, np.float32)}}
        return sharding.shard_params(tree, mesh, RULES) | {"empty": None}

    def update(scale, state, x):
        out = x @ state["dense"]["kernel"]
        new = {"kernel": state["dense"]["kernel"] + scale, "bias": state["dense"]["bias"] + out.sum(0)}
        return {"dense": new, "empty": None}, {"loss": out.sum()}

    moved = jax.jit(update)(1.0, begin(), x)[0]["dense"]["bias"]
    assert not moved.sharding.is_fully_replicated, "or the test sees nothing"
    old, in_place = begin(), sharding.InPlace(update)
    where = jax.tree.map(lambda leaf: leaf.sharding, old)
    new, _ = in_place(1.0, old, x)
    assert jax.tree.map(lambda leaf: leaf.sharding, new) == where
    assert old["dense"]["kernel"].is_deleted(), "the state is donated"
    np.testing.assert_array_equal(new["dense"]["bias"], moved)
    alone, _ = in_place(
        1.0, {"dense": {"kernel": jnp.ones((4, 6)), "bias": jnp.zeros(6)}, "empty": None}, jnp.ones((8, 4))
    )
    np.testing.assert_array_equal(alone["dense"]["bias"], moved)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), new)
    assert in_place.lower(1.0, shapes, x).compile().output_shardings[0]["dense"]["bias"].is_fully_replicated


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fsdp_gathers_parameters_in_the_type_of_the_products(dtype):
    """Masters are float32; what devices send each other of them before a layer's turn is `dtype`.

    Read from the program as it is when XLA has split it over devices, which all backends share: the CPU's compiler goes
    on to make float32 of bfloat16, for it has no such products.
    """
    mesh = sharding.make_mesh({"fsdp": 4}, jax.devices()[:4])
    rules, optimizer = decoder.partition_rules(mesh), optim.adamw(1e-3)
    place = lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
    module = Decoder(64, 32, 48, 2, 4, 2, 8, dtype=jnp.dtype(dtype))

    def supervise(head, params, tokens, labels, key):
        hidden = module.apply({"params": params}, tokens, method="hidden")
        total = linear_divergence(hidden, module.head(params), hidden, head).divergence.sum(1)
        return Weighted(total, jnp.ones_like(total))

    init = lambda: module.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    state = jax.eval_shape(lambda: optim.init_state(init(), optimizer))
    state = jax.tree.map(place, state, sharding.param_specs(state, rules, mesh))
    tokens = place(jax.ShapeDtypeStruct((8, 16), jnp.int32), sharding.record_spec(mesh))
    head = place(jax.ShapeDtypeStruct((32, 64), jnp.float32), PartitionSpec("fsdp"))
    update, key = optim.dense(Partial(supervise, head), optimizer), jax.eval_shape(lambda: jax.random.key(0))
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, "xla_dump_hlo_pass_re": "spmd-partitioning"}
        update.func.lower(*update.args, state, tokens, None, key).compile(compiler_options=options)
        text = next(Path(folder).glob("*jit_update*after_spmd-partitioning*")).read_text()
    found = re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather\(", text)
    kernels = {
        tuple(leaf.shape[-2:]) for leaf in jax.tree.leaves(state.params) if leaf.ndim > 2 or leaf.shape == (32, 64)
    }
    gathered = [kind for kind, dims in found if tuple(map(int, dims.split(",")))[-2:] in kernels]
    assert len(gathered) >= 16 and set(gathered) == {{"bfloat16": "bf16", "float32": "f32"}[dtype]}  # the head too
