"""Prints which process this is, of how many, and its rows of two batches on meshes of four devices, as JSON."""

import json
import os

import jax
import numpy as np

from experiments import language, token_methods
from opd_jax import hosts, sharding

PROBLEMS, BATCH, ROOM = 16, 8, 20


def rows(mesh):
    """`[index, *tokens]` of what lies on this process's devices, each once, of the two batches of an epoch."""
    problems = language.reasoning_problems(PROBLEMS, 0, (1,))
    batches, mine = token_methods.prompts(problems, BATCH, ROOM, 0, mesh), []
    for _ in range(2):
        batch, found = next(batches), {}
        for index, tokens in zip(batch["index"].addressable_shards, batch["tokens"].addressable_shards):
            found[index.index[0].start or 0] = np.concatenate([np.asarray(index.data)[:, None], tokens.data], 1)
        mine.append(np.concatenate([found[place] for place in sorted(found)]).tolist())
    return mine


if __name__ == "__main__":
    if any(name in os.environ for name in (hosts.EXPLICIT[0], hosts.LAUNCHERS[0].count, hosts.LAUNCHERS[1].count)):
        hosts.initialize()
    said = {"process": jax.process_index(), "count": jax.process_count(), "devices": jax.device_count()}
    said["gpus"] = jax.config.read("jax_cuda_visible_devices")
    said["meshes"] = [rows(sharding.make_mesh(shape)) for shape in ({"data": 4}, {"data": 2, "fsdp": 2})]
    print(json.dumps(said))
