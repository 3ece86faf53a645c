"""Eight CPU devices, checked shapes and strict broadcasting for every test. Must run before jax is imported."""

import os
import pathlib
import signal

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"  # compiles in a quarter to a half of the time
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest
from absl import flags

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)  # most of a test is compilation; this halves the suite
jax.config.update("jax_cpu_enable_async_dispatch", False)  # as experiments/main.py: collectives can wait for each other
assert jax.device_count() == 8  # reads XLA_FLAGS
os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].removesuffix(" --xla_cpu_use_fusion_emitters=false")  # ends libtpu
flags.FLAGS.mark_as_parsed()  # grain reads absl flags
signal.signal(signal.SIGINT, signal.default_int_handler)  # `pytest &` in a script ignores it; some tests send it


@pytest.fixture
def optimized():
    """Programs of the test are compiled with care: for a test that runs them for longer than that takes."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True)
def no_mesh_of_another_test():
    """`sharding.make_mesh` sets a mesh for the process; a test must not find that of the one before."""
    before = jax.sharding.get_mesh()
    assert before.empty, "a module set a mesh where it is imported; take jax.make_mesh, which sets none"
    yield
    jax.set_mesh(before)


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    """Every compiled program takes mappings of memory; at Linux' 65,530 of a process the compiler crashes."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 30_000:
        jax.clear_caches()
