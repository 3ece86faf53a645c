"""Why MMDiT's dense layers see `[B*T, D]`, and which attention is fastest at its CPU size.

    python benchmarks/flattened_dense.py

The model is the CPU default: 24x24x3 images in patches of 4, 10 text tokens, width 96, 5 blocks. The rank-3 form is the
same model with every Dense fed `[B, T, D]` through an interceptor. Candidates take turns, so that other load on the
machine falls on all of them alike; the table gives the fastest and the median call in milliseconds.

A training step touches about 200 MB of fresh memory, and without huge pages half its time can go to page faults: run
training as `GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python ...`, and this script both ways to see it.
"""

import time
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.models.mmdit import MMDiT

BATCH, ROUNDS = 64, 15


def timed(candidates: dict[str, Callable], *args) -> None:
    """Prints the fastest and the median time of each candidate and of its gradient."""
    compiled = {}
    for name, function in candidates.items():
        compiled[name, "forward"] = jax.jit(function)
        loss = lambda *a, function=function: jnp.square(function(*a)).sum()
        compiled[name, "forward + backward"] = jax.jit(jax.grad(loss, argnums=tuple(range(len(args)))))
    times = {key: [] for key in compiled}
    for _ in range(ROUNDS + 1):
        for key, function in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*args))
            times[key].append(1e3 * (time.perf_counter() - start))
    for (name, what), values in times.items():
        print(f"{name:36} {what:20} {min(values):8.1f} {np.median(values[1:]):8.1f}", flush=True)


def models(num_heads: int) -> None:
    module = MMDiT(4, 3, 3, 5, num_heads, 96 // num_heads, 32, 32, 6)
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (BATCH, 24, 24, 3), (BATCH, 10, 32), (BATCH, 32)
    latents, context, pooled = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes))
    inputs = latents, jnp.linspace(0, 1, BATCH), context, pooled
    params = jax.jit(module.init)(keys[3], *inputs)["params"]
    params = jax.tree.map(lambda x: x + 0.02, params)  # away from the zero start, where XLA has nothing to skip

    def rank3(params):
        def interceptor(call, args, kwargs, context):
            if type(context.module) is not nn.Dense or args[0].shape[0] == BATCH:
                return call(*args, **kwargs)
            y = call(args[0].reshape(BATCH, -1, args[0].shape[-1]))
            return y.reshape(-1, y.shape[-1])

        with nn.intercept_methods(interceptor):
            return module.apply({"params": params}, *inputs)

    flat = lambda params: module.apply({"params": params}, *inputs)
    timed({f"{num_heads} heads, flattened": flat, f"{num_heads} heads, rank 3": rank3}, params)


def heads_first(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return (jax.nn.softmax(q @ k.swapaxes(2, 3) * q.shape[-1] ** -0.5) @ v).swapaxes(1, 2)


def einsum(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def main() -> None:
    print(f"{'':36} {'':20} {'fastest':>8} {'median':>8}  ms, {jax.devices()[0].device_kind}, jax {jax.__version__}")
    for num_heads in (3, 4):
        models(num_heads)
    q, k, v = jax.random.normal(jax.random.key(0), (3, BATCH, 46, 4, 24))
    timed({"jax.nn.dot_product_attention": jax.nn.dot_product_attention, "einsum": einsum, "@": heads_first}, q, k, v)


if __name__ == "__main__":
    main()
