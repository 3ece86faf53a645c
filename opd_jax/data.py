"""Endless, seeded batches whose position can be saved and restored (grain)."""

from collections.abc import Callable
from typing import Any

import grain
import numpy as np

Draw = Callable[[np.random.Generator], Any]
"""Draws one record: a dictionary of arrays of fixed shapes."""


class Endless:
    """A random-access source whose record i is a function of (seed, i) alone."""

    def __init__(self, draw: Draw, seed: int):
        self.draw, self.seed = draw, seed

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> Any:
        return self.draw(np.random.default_rng((self.seed, int(index))))


def batches(
    draw: Draw, batch_size: int, seed: int, place: Callable[[Any], Any] = lambda batch: batch, threads: int = 1
) -> grain.DatasetIterator:
    """An iterator of stacked records with `get_state()` and `set_state()`; the same whatever `threads` is.

    Args:
        draw: one record from a numpy generator; called ahead of time in `threads` background threads.
        batch_size: records per batch.
        seed: of the whole sequence.
        place: puts a batch where it is used, such as `lambda batch: sharding.shard_batch(batch, mesh)`, ahead of time.
    """
    dataset = grain.MapDataset.source(Endless(draw, seed)).batch(batch_size).map(place)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(dataset.to_iter_dataset(options))


def epochs(
    record: Callable[[int], Any],
    count: int,
    batch_size: int,
    seed: int,
    place: Callable[[Any], Any] = lambda batch: batch,
) -> grain.DatasetIterator:
    """Endless batches of a finite set, as `batches`: all records in one order, then all in another, without a gap.

    Args:
        record: record i of `count`.
    """
    rounds = 2**40 // count  # `repeat()` has no length that batches of one could be counted by
    dataset = grain.MapDataset.range(count).seed(seed).shuffle().repeat(rounds).map(record)
    return iter(dataset.batch(batch_size).map(place).to_iter_dataset(grain.ReadOptions(1, 2)))


def batch_of(records: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Stacks records once, for evaluation."""
    return {name: np.stack([record[name] for record in records]) for name in records[0]}
