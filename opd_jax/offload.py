# SPDX-License-Identifier: Apache-2.0
"""What an update needs once, between updates in the memory of the host: an optimiser's moments, the moving average.

Nothing else has to know: `optim.dense` and `dp_sgd.private` take what they find there onto the device, and put it back,
a leaf where it lay. Sampling and labels have the room. The update itself needs no less: the TPU's compiler begins to
fetch before the gradient is done (16 layers of 2048 x 2048 on four v5e chips: 3.4 GiB in place of 3.3). And every
update pays for the transfer, there and back.
"""

import jax

from opd_jax.config import ConfigError
from opd_jax.types import PyTree, TrainState

HOST = "pinned_host"


def offloaded(state: TrainState) -> TrainState:
    """The state with its moments and its average in the host's memory, each part beside its device; values unchanged.

    Raises:
        ConfigError: the devices cannot reach such a memory.
    """
    return state._replace(opt_state=_to_host(state.opt_state), ema=_to_host(state.ema))


def fetched(tree: PyTree) -> PyTree:
    """Within jit: the tree with what lies in the host's memory on the device."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, jax.memory.Space.Device) if _is_away(leaf) else leaf, tree)


def returned(tree: PyTree, like: PyTree) -> PyTree:
    """Within jit: the tree with every leaf in the memory of that of `like`."""
    return jax.tree.map(
        lambda leaf, old: jax.device_put(leaf, jax.memory.Space.Host) if _is_away(old) else leaf, tree, like
    )


def _is_away(leaf) -> bool:
    return jax.typeof(leaf).memory_space == jax.memory.Space.Host


def _to_host(tree: PyTree) -> PyTree:
    def move(leaf: jax.Array) -> jax.Array:
        if leaf.ndim == 0:  # a count, which schedules read
            return leaf
        device = next(iter(leaf.sharding.device_set))
        if HOST not in {memory.kind for memory in device.addressable_memories()}:
            raise ConfigError(f"offload=True: {device.device_kind} has no {HOST} memory; set it to False")
        return jax.device_put(leaf, leaf.sharding.with_memory_kind(HOST))

    return jax.tree.map(move, tree)
