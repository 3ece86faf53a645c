"""Low-rank adapters (Hu et al., arXiv 2106.09685) on any Linen parameter, the models untouched.

    W' = W + scale * a @ b,    a [in, r],  b [r, out],    scale = alpha / r            (section 4.1, equation 3)

An adapter is a plain dict, path of the parameter -> {"a", "b"}: a pytree to differentiate, save and average. `scale` is
never stored: it is one static number, given wherever an adapter meets a backbone. A kernel of more than two dimensions
counts as the matrix `[product of the leading dimensions, last dimension]`; unless its first dimension is that of layers
under one scan (`init`'s `scanned`): then its factors have that dimension too, `a [n, in, r]` and `b [n, r, out]`.

The paper starts `a` Gaussian and `b` zero, so a new adapter changes nothing; so does `init`.
"""

import functools
import re
import zlib
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int, Key

from opd_jax.tensors import Lazy

Adapter = dict[str, dict[str, Array | np.ndarray]]
Params = Any


def init(key: Key[Array, ""], params: Params, pattern: str, rank: int, scanned: str | None = None) -> Adapter:
    """A new adapter of rank `rank` on every parameter whose path, such as `blocks_0/attn/to_q/kernel`, `pattern` finds.

    `a` is Gaussian with variance 1 / in, `b` zero. A path's draw depends on `key` and the path alone. Where `scanned`
    finds a path, such as `^layers/`, each of its layers has factors of its own.

    Raises:
      ValueError: where the pattern finds nothing, or a parameter that is not a matrix (a bias), or rank < 1.
    """
    if rank < 1:
        raise ValueError(f"rank={rank}; a LoRA rank is at least 1")
    found = {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items() if re.search(pattern, path)}
    if not found:
        raise ValueError(
            f"pattern {pattern!r} finds no parameter; paths look like {sorted(flatten_dict(params, sep='/'))[:3]}"
        )
    adapter = {}
    for path, shape in found.items():
        if len(shape) < 2:
            raise ValueError(f"pattern {pattern!r} finds {path} of shape {shape}; end it with /kernel")
        layers = shape[: int(scanned is not None and re.search(scanned, path) is not None)]
        rows, columns = int(np.prod(shape[len(layers) : -1])), shape[-1]
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        a = jax.random.normal(own, (*layers, rows, rank)) / np.sqrt(rows)
        adapter[path] = {"a": a, "b": jnp.zeros((*layers, rank, columns))}
    return adapter


def delta(adapter: Adapter) -> dict[str, Float[Array, "*layers in out"]]:
    """`a @ b` of every path: the update before `scale`. Adapters are equal where these are, not the factors."""
    return {path: factors["a"] @ factors["b"] for path, factors in adapter.items()}


def merge(params: Params, adapter: Adapter, scale: float) -> Params:
    """The parameters with `scale * a @ b` added; differentiable in both. Storage types stay; the sum is in float32.

    Raises:
      ValueError: naming the adapted path that `params` does not have, or has in another shape.
    """
    flat = flatten_dict(params, sep="/")
    for path, update in delta(adapter).items():
        weight = _adapted(flat, path, adapter)
        flat[path] = (weight + scale * update.reshape(weight.shape)).astype(weight.dtype)
    return unflatten_dict(flat, sep="/")


def merge_lazily(params: Params, adapter: Adapter, scale: float) -> Params:
    """`merge` on the host, for who writes the result: what is adapted is a `tensors.Lazy`, as `params` may be too.

    Raises: as `merge`.
    """
    flat = flatten_dict(params, sep="/")

    def merged(weight: Any, a: Any, b: Any) -> np.ndarray:
        update = np.matmul(np.asarray(a), np.asarray(b), dtype=np.float32).reshape(weight.shape)
        update *= scale
        update += np.asarray(weight)
        return update.astype(weight.dtype, copy=False)

    for path, factors in adapter.items():
        weight = _adapted(flat, path, adapter)
        flat[path] = Lazy(weight.shape, weight.dtype, functools.partial(merged, weight, **factors))
    return unflatten_dict(flat, sep="/")


def average(adapters: Sequence[Adapter]) -> Adapter:
    """The adapter whose update is exactly the mean of the given ones' updates; its rank is the sum of their ranks.

    The mean of the factors is not that: `mean(a) @ mean(b)` has cross terms. Here the factors are concatenated,
    `[a_1 ... a_N] @ [b_1; ...; b_N] / N`. `truncate` brings the rank back.

    Raises:
      ValueError: where there is no adapter, or they adapt different paths.
    """
    if not adapters:
        raise ValueError("average of no adapters; give at least one")
    for other in adapters[1:]:
        if other.keys() != adapters[0].keys():
            raise ValueError(
                f"adapters differ in {sorted(other.keys() ^ adapters[0].keys())}; give all the same pattern"
            )
    return {
        path: {
            "a": jnp.concatenate([adapter[path]["a"] for adapter in adapters], axis=-1),
            "b": jnp.concatenate([adapter[path]["b"] for adapter in adapters], axis=-2) / len(adapters),
        }
        for path in adapters[0]
    }


def truncate(adapter: Adapter, rank: int) -> Adapter:
    """The best adapter of rank at most `rank`, in the Frobenius norm of its update (Eckart-Young).

    `a = Q_a R_a` and `b^T = Q_b R_b` give `a @ b = Q_a (R_a R_b^T) Q_b^T`: the SVD is of the small middle, never of an
    `[in, out]` matrix. Both factors carry the root of the singular values. The rank stays where it is lower already.
    """
    if rank < 1:
        raise ValueError(f"rank={rank}; a LoRA rank is at least 1")

    def best(a: Float[Array, "*layers in r"], b: Float[Array, "*layers r out"]) -> dict[str, Array]:
        (qa, ra), (qb, rb) = jnp.linalg.qr(a), jnp.linalg.qr(b.mT)
        u, s, vt = jnp.linalg.svd(ra @ rb.mT, full_matrices=False)
        root = jnp.sqrt(s[..., None, :rank])
        return {"a": qa @ (u[..., :rank] * root), "b": (root.mT * vt[..., :rank, :]) @ qb.mT}

    return {path: best(**factors) for path, factors in adapter.items()}


def apply(module: nn.Module, params: Params, adapter: Adapter, scale: float, *args: Any, method: Any = None) -> Any:
    """`module.apply` with `merge(params, adapter, scale)`, the merged parameters never made: `y = x W + scale x a b`.

    For gradients of each record on its own it is the cheaper one: theirs are of the factors, not of whole kernels.
    Scanned layers must take the collection "lora" along, as those of `decoder` and `gpt2` do. Products of `a` and `b`
    with the input are in the module's dtype.

    Raises:
      ValueError: naming the adapted path that is not the kernel of a Dense this call went through, or differs in shape.
    """
    flat, used = flatten_dict(params, sep="/"), set()
    for path in adapter:
        _adapted(flat, path, adapter)
    factors = unflatten_dict({tuple(path.split("/")[:-1]): one for path, one in adapter.items()})

    def interceptor(call, inputs, kwargs, context):
        y, dense = call(*inputs, **kwargs), context.module
        if type(dense) is not nn.Dense or context.method_name != "__call__" or not dense.has_variable("lora", "a"):
            return y
        used.add("/".join((*dense.path, "kernel")))
        a, b = (dense.get_variable("lora", name) for name in "ab")
        x, a, b = nn.dtypes.promote_dtype(inputs[0], a, b, dtype=dense.dtype)
        return y + (scale * (x @ a @ b)).astype(y.dtype)

    with nn.intercept_methods(interceptor):
        out = module.apply({"params": params, "lora": factors}, *args, method=method)
    if adapter.keys() - used:
        raise ValueError(f"{sorted(adapter.keys() - used)} are no kernels of a Dense in this call; use merge")
    return out


def routed_apply(
    module: nn.Module, params: Params, adapters: Sequence[Adapter], index: Int[Array, "B"], scale: float, *args: Any
) -> Any:
    """`module.apply` on a batch whose record i wears adapter `index[i]`; other indices wear none.

        y = x W + scale * (mask(x @ [a_1 ... a_N])) @ [b_1; ...; b_N],    mask keeps the ranks of the record's adapter

    One forward of the backbone, whatever the number of adapters; they may differ in rank and in the layers they adapt.
    Equals, record by record, `module.apply` with `merge(params, adapters[index[i]], scale)`; so do its gradients.
    Each Dense must see its rows in the order of the records, as many for each: `[B, D]`, `[B, T, D]` or `[B * T, D]`.

    Raises:
      ValueError: naming the adapted path that is not the kernel of a Dense this call went through, that differs in
        shape, or whose input has a number of rows that the records do not divide.
    """
    stacked, used, flat = _stack(adapters), set(), flatten_dict(params, sep="/")
    for adapter in adapters:
        for path in adapter:
            _adapted(flat, path, adapter)
            if adapter[path]["a"].ndim > 2:
                raise ValueError(f"{path} is of scanned layers, whose adapters cannot be routed; use apply")

    def interceptor(call, inputs, kwargs, context):
        y = call(*inputs, **kwargs)
        path = "/".join((*context.module.path, "kernel"))
        if type(context.module) is not nn.Dense or context.method_name != "__call__" or path not in stacked:
            return y
        used.add(path)
        a, b, owner = stacked[path]
        x, a, b = nn.dtypes.promote_dtype(inputs[0], a, b, dtype=context.module.dtype)
        return y + scale * _routed(x, a, b, index[:, None] == owner[None], path).reshape(y.shape).astype(y.dtype)

    with nn.intercept_methods(interceptor):
        out = module.apply({"params": params}, *args)
    if stacked.keys() - used:
        raise ValueError(f"{sorted(stacked.keys() - used)} are no kernels of a Dense in this call; use merge")
    return out


def _routed(x: Array, a: Array, b: Array, keep: Array, path: str) -> Float[Array, "rows out"]:
    """`x @ a @ b` with, for each record, only the ranks that `keep [B, R]` marks."""
    x = x.reshape(-1, x.shape[-1])
    records = keep.shape[0]
    if x.shape[0] % records:
        raise ValueError(f"{path} sees {x.shape[0]} rows, not a multiple of {records} records; give one index each")
    hidden = (x @ a).reshape(records, -1, a.shape[1])
    return jnp.where(keep[:, None], hidden, 0).reshape(-1, a.shape[1]) @ b


def _stack(adapters: Sequence[Adapter]) -> dict[str, tuple[Array, Array, np.ndarray]]:
    """For every path the concatenated factors, and which adapter each of their ranks belongs to."""
    stacked = {}
    for path in dict.fromkeys(path for adapter in adapters for path in adapter):
        wearing = [(i, adapter[path]) for i, adapter in enumerate(adapters) if path in adapter]
        a = jnp.concatenate([factors["a"] for _, factors in wearing], axis=1)
        b = jnp.concatenate([factors["b"] for _, factors in wearing], axis=0)
        stacked[path] = a, b, np.concatenate([np.full(factors["a"].shape[1], i) for i, factors in wearing])
    return stacked


def _adapted(flat: dict[str, Any], path: str, adapter: Adapter) -> Any:
    """The parameter at `path`, which must fit the adapter."""
    if path not in flat:
        raise ValueError(f"the adapter's {path} is not a parameter; paths look like {sorted(flat)[:3]}")
    (*layers, rows, _), columns = adapter[path]["a"].shape, adapter[path]["b"].shape[-1]
    layers = tuple(layers)
    shape = flat[path].shape
    if (int(np.prod(shape[len(layers) : -1])), shape[-1]) != (rows, columns) or shape[: len(layers)] != layers:
        size = "x".join(map(str, (*layers, rows, columns)))
        raise ValueError(f"the adapter of {path} is for a {size} matrix; the parameter has shape {shape}")
    return flat[path]
