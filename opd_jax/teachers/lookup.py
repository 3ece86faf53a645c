# SPDX-License-Identifier: Apache-2.0
"""Offline is a look-up: from sampled batches to stored records and back, and two functions of a `Method`."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from opd_jax.config import ConfigError, to_json
from opd_jax.losses.lightning_opd import LightningLabels, residual_teacher_logp
from opd_jax.teachers.store import LOGPS, Manifest, Record, Store, write
from opd_jax.types import PyTree, TokenRollout


class StoredBatch(NamedTuple):
    """A TokenRollout with its labels: what `batches` yields, right-padded with zeros to a fixed length."""

    tokens: Int[Array, "B S"]
    response: Bool[Array, "B S"]
    length: Int[Array, "B"]
    group: Int[Array, "B"]
    task: Int[Array, "B"]
    behavior_logp: Float[Array, "B S"]
    sampling_logp: Float[Array, "B S"]
    truncated: Bool[Array, "B"]
    teacher_logp: Float[Array, "B S"]
    reference_logp: Float[Array, "B S"]
    outcome: Float[Array, "B"]
    payload: dict[str, Array]  # [B, S, ...]


def rollout(student_params: PyTree, batch: StoredBatch, key: Any) -> StoredBatch:
    """`Method.sample` of an offline method."""
    return batch


def labels(teacher_params: PyTree, rollout: StoredBatch) -> LightningLabels:
    """`Method.label` of an offline method."""
    return LightningLabels(rollout.teacher_logp, rollout.reference_logp, rollout.outcome)


def records_of(
    rollout: TokenRollout, labels: LightningLabels, payloads: Sequence[dict[str, np.ndarray]] | None = None
) -> list[Record]:
    """The records of a sampled and scored batch, without its padding: what a `make_shard` returns."""
    scored = {"teacher_logp": labels.teacher_logp, "reference_logp": labels.reference_logp}
    scored |= {"behavior_logp": rollout.behavior_logp, "sampling_logp": rollout.sampling_logp}
    if labels.reference_logp is None:
        scored["reference_logp"] = rollout.behavior_logp
    arrays = {"tokens": rollout.tokens, "response": rollout.response} | scored
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    length, group, task, truncated = map(np.asarray, (rollout.length, rollout.group, rollout.task, rollout.truncated))
    outcome = np.full(length.shape, np.nan) if labels.outcome is None else np.asarray(labels.outcome)
    return [
        Record(
            **{name: array[i, :n] for name, array in arrays.items()},
            group=int(group[i]),
            task=int(task[i]),
            outcome=float(outcome[i]),
            truncated=bool(truncated[i]),
            payload={} if payloads is None else payloads[i],
        )
        for i, n in enumerate(length)
    ]


def collate(records: Sequence[Record], length: int, payload: Sequence[str] = ()) -> StoredBatch:
    """Stacks records, padded to `length`, as numpy arrays."""
    shape = len(records), length
    out = {name: np.zeros(shape, np.float32) for name in LOGPS}
    out |= {"tokens": np.zeros(shape, np.int32), "response": np.zeros(shape, bool)}
    for i, record in enumerate(records):
        for name, array in out.items():
            array[i, : len(record.tokens)] = getattr(record, name)
    scalar = lambda name, dtype: np.array([getattr(record, name) for record in records], dtype)
    out |= {"group": scalar("group", np.int32), "task": scalar("task", np.int32)}
    out |= {"truncated": scalar("truncated", bool), "outcome": scalar("outcome", np.float32)}
    extra = {name: np.zeros((*shape, *(a := records[0].payload[name]).shape[1:]), a.dtype) for name in payload}
    for name, array in extra.items():
        array[out["response"]] = np.concatenate([record.payload[name] for record in records])
    lengths = np.array([len(record.tokens) for record in records], np.int32)
    return StoredBatch(**out, length=lengths, payload=extra)


class Batches:
    """A random-access source whose batch i is a function of (seed, i): epochs of all records, each in a new order."""

    def __init__(
        self,
        store: Store,
        batch_size: int,
        seed: int,
        buckets: Sequence[int] | None,
        payload: Sequence[str],
        whole_groups: bool = False,
    ):
        self.store, self.seed, self.payload = store, seed, payload
        lengths = store.manifest.lengths
        self.buckets = sorted(buckets or [int(lengths.max())])
        if self.buckets[-1] < lengths.max():
            raise ConfigError(f"buckets={self.buckets}: the store holds {lengths.max()} tokens; add that length")
        if not 1 <= batch_size <= len(store):
            raise ConfigError(f"batch_size={batch_size}: the store has {len(store)} records; use 1 to that many")
        self.units = _groups_of(store) if whole_groups else np.arange(len(store))[:, None]  # records that stay together
        if batch_size % self.units.shape[1]:
            raise ConfigError(f"batch_size={batch_size}: whole groups have {self.units.shape[1]}; use a multiple")
        self.lengths, self.batch_units = lengths[self.units].max(1), batch_size // self.units.shape[1]
        self._plan = functools.lru_cache(maxsize=2)(self._make_plan)

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> StoredBatch:
        epoch, place = divmod(int(index), len(self.units) // self.batch_units)
        length, ids = self._plan(epoch)[place]
        return collate([self.store[i] for i in self.units[ids].ravel().tolist()], length, self.payload)

    def _make_plan(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """Padded length and units of every batch. What fills no batch of its bucket goes to the next longer one."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.lengths))
        bucket = np.searchsorted(self.buckets, self.lengths[order])
        plan, left = [], order[:0]
        for b, length in enumerate(self.buckets):
            ids = np.concatenate([left, order[bucket == b]])
            whole = len(ids) - len(ids) % self.batch_units
            plan += [(length, part) for part in ids[:whole].reshape(-1, self.batch_units)]
            left = ids[whole:]
        return [plan[i] for i in rng.permutation(len(plan))]


def _groups_of(store: Store) -> np.ndarray:
    """Records of each group, `[groups, G]`."""
    group = np.array([record.group for record in store])
    names, sizes = np.unique(group, return_counts=True)
    if len(set(sizes.tolist())) > 1:
        raise ConfigError(f"groups of {sizes.min()} to {sizes.max()} records: whole groups must be of one size")
    return np.argsort(group, kind="stable").reshape(len(names), -1)


def batches(
    store: Store,
    batch_size: int,
    seed: int,
    *,
    buckets: Sequence[int] | None = None,
    payload: Sequence[str] = (),
    place: Callable[[StoredBatch], Any] = lambda batch: batch,
    threads: int = 1,
    whole_groups: bool = False,
) -> grain.DatasetIterator:
    """Endless shuffled batches with `get_state()` and `set_state()`, for the loop; the same whatever `threads` is.

    Every epoch visits each record once, but for the last `len(store) % batch_size`, which differ from epoch to epoch.

    Args:
        buckets: lengths that batches are padded to, in place of the longest record's; one compilation for each.
        payload: names of the payloads wanted.
        place: puts a batch where it is used, ahead of time, as in `data.batches`.
        whole_groups: the answers to one prompt come together, for losses that compare them.

    Raises:
        ConfigError: more records per batch than there are, a longest bucket shorter than the longest record, or whole
            groups that differ in size or do not divide the batch.
    """
    source = Batches(store, batch_size, seed, buckets, payload, whole_groups)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(grain.MapDataset.source(source).map(place).to_iter_dataset(options))


def write_residual(store: Store, directory: str | Path, **options: Any) -> Manifest | None:
    """The same store with `residual_teacher_logp(..., **options)` in place of the teacher's: Lightning OPD 2.0."""
    whole = collate(list(store), store.manifest.counts["max_length"])
    logp = residual_teacher_logp(
        whole.tokens, whole.teacher_logp, whole.reference_logp, whole.response, whole.group, **options
    )
    ends = np.cumsum([0, *(len(shard.lengths) for shard in store.manifest.shards)])

    def make_shard(index: int) -> Iterator[Record]:
        for i in range(ends[index], ends[index + 1]):
            record = store[i]
            yield record._replace(teacher_logp=logp[i, : len(record.tokens)])

    notes = store.manifest.about.notes | {"residual": to_json(options)}
    about = store.manifest.about._replace(residual=True, notes=notes)
    return write(directory, about, len(store.manifest.shards), make_shard)
