"""Parameters that wait in files: made where they are asked for, written one at a time, read by safetensors."""

import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from opd_jax.checkpoint import load_params, open_params, save_params
from opd_jax.config import ConfigError
from opd_jax.models import lora
from opd_jax.tensors import Lazy, code_of, dtype_of, write_tensors


def test_a_lazy_parameter_is_made_each_time_and_kept_by_no_one():
    made = []

    def make():
        made.append(weakref.ref(array := np.arange(6.0).reshape(2, 3)))
        return array

    lazy = Lazy((2, 3), np.dtype(np.float64), make)
    assert not made
    np.testing.assert_array_equal(np.asarray(lazy), np.arange(6.0).reshape(2, 3))
    assert np.asarray(lazy, np.float32).dtype == np.float32
    assert len(made) == 2 and not any(ref() is not None for ref in made)


def test_one_array_at_a_time_is_written(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # strided
        "b": np.arange(5).astype(ml_dtypes.bfloat16),
        "c": np.array([True, False, True]),
        "d": np.int8(7),
    }
    alive = []

    def one_by_one():
        for value in arrays.values():
            assert all(ref() is None for ref in alive)
            copy = np.array(value)
            alive.append(weakref.ref(copy))
            yield copy
            del copy

    file = write_tensors(tmp_path / "x.safetensors", list(arrays.items()), one_by_one(), {"format": "pt"})
    read = load_file(file)
    assert read.keys() == arrays.keys() and len(alive) == 4
    for name, value in arrays.items():
        assert read[name].dtype == value.dtype
        np.testing.assert_array_equal(read[name], value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int64", "uint8", "bool"])
def test_types_have_the_names_of_safetensors(dtype):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    assert dtype_of(code_of("x", dtype)) == dtype


def test_a_type_without_a_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="x is complex64, which safetensors does not hold"):
        write_tensors(tmp_path / "x", [("x", np.zeros(2, np.complex64))], [np.zeros(2, np.complex64)], {})
    assert not list(tmp_path.iterdir())


def test_an_opened_file_is_read_where_it_is_asked_for(tmp_path):
    tree = {
        "block": {"kernel": np.ones((3, 4), np.float32), "bias": np.zeros(4, ml_dtypes.bfloat16)},
        "n/": np.int32(3),
    }
    file = save_params(tmp_path / "p.safetensors", tree, {"said": 1})
    opened, about = open_params(file)
    loaded, same = load_params(file)
    assert about == same == {"said": 1}
    for lazy, leaf in zip(jax.tree.leaves(opened), jax.tree.leaves(loaded), strict=True):
        assert isinstance(lazy, Lazy) and (lazy.shape, lazy.dtype) == (leaf.shape, leaf.dtype)
        np.testing.assert_array_equal(np.asarray(lazy), leaf)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="cannot read parameters from"):
        open_params(file)
    with pytest.raises(ConfigError, match="no parameters at"):
        open_params(tmp_path / "none")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_merge_on_the_host_is_the_merge_on_the_device(dtype):
    numbers = np.random.default_rng(0)
    draw = lambda *shape: numbers.standard_normal(shape).astype(np.float32)
    params = {"layers": {"q": {"kernel": draw(3, 8, 6)}}, "out": {"kernel": draw(2, 4, 5)}, "norm": {"scale": draw(8)}}
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    adapter = {
        "layers/q/kernel": {"a": draw(3, 8, 2), "b": draw(3, 2, 6)},
        "out/kernel": {"a": draw(8, 2), "b": draw(2, 5)},
    }
    lazy = jax.tree.map(lambda leaf: Lazy(leaf.shape, leaf.dtype, lambda: leaf), params)
    expected = lora.merge(*jax.tree.map(jnp.asarray, (params, adapter)), 0.7)
    for given in (params, lazy):
        merged = lora.merge_lazily(given, adapter, 0.7)
        for one, other in zip(jax.tree.leaves(merged), jax.tree.leaves(expected), strict=True):
            assert one.dtype == other.dtype and one.shape == other.shape
            tolerance = 1e-6 if dtype == np.float32 else 1e-2
            np.testing.assert_allclose(np.asarray(one).astype(np.float32), other.astype(jnp.float32), rtol=tolerance)
    with pytest.raises(ValueError, match="is not a parameter"):
        lora.merge_lazily(params, {"other": adapter["out/kernel"]}, 1.0)
