"""Chips by name, the least time of a step on them, and programs compiled for those that are not here."""

import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas

from opd_jax import chips, cost, sharding
from opd_jax.config import ConfigError


def test_roofline_is_the_slowest_resource():
    found = cost.Cost(459e12, 2765e9 / 2, {"all-reduce": cost.Traffic(1, 600e9 * 2)})
    line = chips.roofline(found, chips.CHIPS["v5p"], float32=True)
    assert line == chips.Roofline(1.0, 0.5, 2.0)
    assert line.seconds == 2.0 and line.bound == "interconnect"
    assert (
        chips.roofline(found, chips.CHIPS["h100"], True).compute > chips.roofline(found, chips.CHIPS["h100"], False)[0]
    )


@pytest.mark.parametrize("name", ["v5p", "v5p:", "v9:2x2", "v5e:0x2", "h100:eight", "v5p:4x4x4x4"])
def test_a_topology_that_is_none_is_refused_in_one_line(name):
    with pytest.raises(ConfigError, match=r"give CHIP:SHAPE") as error:
        chips.topology(name)
    assert "\n" not in str(error.value) and name in str(error.value)


@pytest.mark.parametrize(
    ("kind", "chip"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", None),
        ("NVIDIA H100 PCIe", None),
        ("cpu", None),
    ],
)
def test_a_device_is_known_by_its_kind(kind, chip):
    assert chips.of_device(kind) == (chip and chips.CHIPS[chip])


def test_no_cycles_or_no_clock_is_no_estimate():
    found = cost.Cost(1.0, 1.0, {}, 3e9)
    assert chips.expected(found, chips.CHIPS["v5e"]) == 2.0
    assert chips.expected(found._replace(cycles=0.0), chips.CHIPS["v5e"]) is None
    assert chips.expected(found, chips.CHIPS["h100"]) is None


def test_more_gpus_than_cpu_devices_are_refused():
    with pytest.raises(ConfigError, match="8 CPU devices stand for 16 GPUs"):
        chips.topology("h100:16")


def test_a_mesh_of_given_devices_is_not_set():
    devices = jax.devices()[:4]
    mesh = sharding.make_mesh({"data": -1, "tensor": 2}, devices)
    assert dict(mesh.shape) == {"data": 2, "tensor": 2} and np.size(mesh.devices) == 4
    assert jax.sharding.get_mesh().empty


def test_a_pallas_kernel_is_compiled_for_tpus_that_are_not_here():
    """Through the same door as a plan; a kernel has no FLOPs in the count, but its operands' and result's bytes."""
    pytest.importorskip("libtpu")
    where, size = chips.topology("v5e:2x2"), 256

    def kernel(x, y, out):
        out[...] = jnp.dot(x[...], y[...], preferred_element_type=jnp.float32)

    def product(x, y):
        tile = lambda index: pallas.BlockSpec((128, size) if index == 0 else (size, 128), _tiles(index))
        out = jax.ShapeDtypeStruct((size, size), jnp.float32)
        specs = {"in_specs": [tile(0), tile(1)], "out_specs": pallas.BlockSpec((128, 128), lambda i, j: (i, j))}
        return pallas.pallas_call(kernel, out, grid=(2, 2), **specs)(x, y)

    place = jax.sharding.SingleDeviceSharding(where.devices[0])
    x = jax.ShapeDtypeStruct((size, size), jnp.bfloat16, sharding=place)
    program = jax.jit(product).lower(x, x).compile()
    text = program.as_text()
    assert "tpu_custom_call" in text
    memory, found = cost.memory_of(program), cost.cost_of(text)
    assert memory.arguments == 2 * 2 * size**2 and memory.output == 4 * size**2
    assert found.flops == 0 and 0 < found.bytes <= memory.arguments + memory.output


def on_tpu(function, *args):
    """A program compiled for v5e chips, and its text with cycles."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        program = jax.jit(function).lower(*args).compile(compiler_options=options)
        files = sorted(Path(folder).glob("*.after_codegen.txt"), key=lambda file: file.stat().st_size)
        return program, files[-1].read_text()


@pytest.mark.parametrize("layers", [4, 16])
def test_a_tpus_program_is_counted_by_hand_and_its_cycles_as_often_as_they_run(layers):
    pytest.importorskip("libtpu")
    where, size = chips.topology("v5e:2x2"), 1024
    place = jax.sharding.SingleDeviceSharding(where.devices[0])
    x, stack = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in ((size, size), (layers, size, size))
    )

    def product(x, stack):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    program, text = on_tpu(product, x, stack)
    found, memory = cost.cost_of(text), cost.memory_of(program)
    assert found.flops == layers * 2 * size**3
    assert memory.arguments == 2 * (1 + layers) * size**2 and memory.output == 2 * size**2
    assert memory.temporary < 6 * 2 * size**2  # of the running layer alone
    line, expected = chips.roofline(found, where.chip, False), chips.expected(found, where.chip)
    assert line.bound == "compute" and line.seconds == pytest.approx(layers * 2 * size**3 / 197e12)
    assert line.seconds < expected < 4 * line.seconds
    assert expected / layers == pytest.approx(102.03e-6 / 4, rel=0.2)  # libtpu 0.0.52; one body, run `layers` times
    unknown = re.sub(r'(estimated_cycles":")\d+', rf"\g<1>{2**63 - 1}", text)
    assert found.cycles > 0 == cost.cost_of(unknown).cycles


def _tiles(index: int):
    return (lambda i, j: (i, 0)) if index == 0 else (lambda i, j: (0, j))
