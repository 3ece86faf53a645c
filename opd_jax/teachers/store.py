# SPDX-License-Identifier: Apache-2.0
"""Rollouts and a teacher's labels on disk: sampled once, scored once, read for as many steps as training takes.

A store is a folder of ArrayRecord shards, one record per response, and a `manifest.json` that is written last. A record
is a safetensors blob: token ids as they were sampled, never text, with the end token; log-probs of the response alone.

```
manifest = store.write(folder, about, num_shards, make_shard)   # only the shards that are not there yet
opened = store.open_store(folder, tokenizer=fingerprint)        # every checksum, before step 0
store.check_consistency(opened.manifest)                        # did this teacher write the SFT data?
data = lookup.batches(opened, batch_size, seed)                 # StoredBatch, endless, position restorable
Method(lookup.rollout, lookup.labels, dense(lightning_opd.supervise(apply_fn), optimizer))
```
"""

import contextlib
import functools
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Bool, Float, Int

from opd_jax import hosts
from opd_jax.config import ConfigError, checks, differences, fingerprint, to_json, write_atomic

FORMAT, VERSION = "opd_jax.store", 1
DTYPES = ("float32", "float16")
LOGPS = ("teacher_logp", "reference_logp", "behavior_logp", "sampling_logp")


class Record(NamedTuple):
    """One response, not padded. Log-probs in nats as in TokenRollout and LightningLabels; 0 where not `response`."""

    tokens: Int[np.ndarray, "S"]  # prompt, then response, as sampled
    response: Bool[np.ndarray, "S"]  # the end token included; tokens of an environment are not
    teacher_logp: Float[np.ndarray, "S"]
    reference_logp: Float[np.ndarray, "S"]
    behavior_logp: Float[np.ndarray, "S"]
    sampling_logp: Float[np.ndarray, "S"]
    group: int
    task: int = 0
    outcome: float = float("nan")  # 1 correct, 0 incorrect, NaN unknown
    truncated: bool = False
    payload: dict[str, np.ndarray] = {}  # noqa: RUF012  more of the teacher, [response tokens, ...]; see payloads.py


class About(NamedTuple):
    """Where the labels come from. Models and tokenizers by a fingerprint, such as `checkpoint.params_sha256`."""

    teacher: str  # that labelled
    sft_teacher: str  # that wrote the data the reference was fine-tuned on
    reference: str  # the SFT'd student, whose answers these are
    tokenizer: str
    sampler: dict[str, Any]  # temperature, top_p, seed, ...
    logp_dtype: str = "float32"
    residual: bool = False  # teacher_logp is that of `residual_teacher_logp`
    notes: dict[str, Any] = {}  # noqa: RUF012


class Shard(NamedTuple):
    """What the manifest knows of a shard."""

    name: str
    bytes: int
    sha256: str
    response_tokens: int
    lengths: list[int]  # prompt and response tokens of each record


class Manifest(NamedTuple):
    """Everything about a store but its records."""

    about: About
    shards: list[Shard]

    @property
    def lengths(self) -> np.ndarray:
        return np.concatenate([np.asarray(shard.lengths, np.int64) for shard in self.shards])

    @property
    def counts(self) -> dict[str, int]:
        lengths = self.lengths
        response = sum(shard.response_tokens for shard in self.shards)
        counts = {"records": lengths.size, "tokens": lengths.sum(), "max_length": lengths.max()}
        return {name: int(value) for name, value in counts.items()} | {"response_tokens": response}


# ---- writing ---------------------------------------------------------------------------------------------------------


class Writer:
    """Writes a store shard by shard, from any number of threads or processes; what is complete is never written again.

    A shard is written under a temporary name, synced, hashed, renamed, and then described by a small JSON file beside
    it: a writer killed at any moment leaves whole shards and temporary files, which `finish` removes.

    Args:
        directory: created when missing.
        about: the same in every process that writes this store.
        num_shards: fixed for the life of the store.

    Raises:
        ConfigError: the folder holds shards of another store.
    """

    def __init__(self, directory: str | os.PathLike, about: About, num_shards: int):
        with checks() as check:
            check(num_shards > 0, f"num_shards={num_shards}: must be positive")
            check(about.logp_dtype in DTYPES, f"logp_dtype={about.logp_dtype}: choose {' or '.join(DTYPES)}")
        self.directory, self.about, self.num_shards = Path(directory).expanduser().absolute(), about, num_shards
        self.directory.mkdir(parents=True, exist_ok=True)
        mine = {self._path(index).name for index in range(num_shards)}
        for path in self.directory.glob("*.arrayrecord"):
            if path.name not in mine:
                raise ConfigError(f"{path} is not of a store of {num_shards} shards; give another folder, or delete it")
        for index in range(num_shards):
            self._complete(index)

    @property
    def missing(self) -> list[int]:
        """The shards that are not complete on disk, in order."""
        return [index for index in range(self.num_shards) if self._complete(index) is None]

    def write_shard(self, index: int, records: Iterable[Record]) -> None:
        """Writes shard `index` whole, or nothing.

        Raises:
            ValueError: a record's arrays disagree, a log-prob of a response token is not finite, or there is no record.
        """
        path = self._path(index)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        lengths, response_tokens = [], 0
        try:
            with contextlib.closing(ArrayRecordWriter(str(temporary), "group_size:1,zstd:3")) as file:  # 1: any order
                for record in records:
                    file.write(encode(record, self.about.logp_dtype))
                    lengths.append(len(record.tokens))
                    response_tokens += int(record.response.sum())
            if not lengths:
                raise ValueError(f"{path.name} has no records; use fewer than num_shards={self.num_shards}")
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            shard = Shard(path.name, temporary.stat().st_size, _sha256(temporary), response_tokens, lengths)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        write_atomic(f"{path}.json", json.dumps({"about": _about_json(self.about), "shard": shard._asdict()}))

    def finish(self) -> Manifest:
        """Writes the manifest, without which nothing reads the store, and removes what killed writers left.

        Raises:
            ConfigError: shards are missing.
        """
        shards = [self._complete(index) for index in range(self.num_shards)]
        if None in shards:
            absent = [self._path(index).name for index, shard in enumerate(shards) if shard is None]
            raise ConfigError(f"{self.directory}: {len(absent)} shards missing, {absent[0]} first; write them")
        manifest = Manifest(self.about, shards)
        body = {"format": FORMAT, "version": VERSION, "about": _about_json(self.about), **manifest.counts}
        body["shards"] = [shard._asdict() for shard in shards]
        text = json.dumps(body | {"fingerprint": fingerprint(body)}, indent=None) + "\n"
        write_atomic(self.directory / "manifest.json", text)
        for leftover in self.directory.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        return manifest

    def _path(self, index: int) -> Path:
        return self.directory / f"shard-{index:05d}-of-{self.num_shards:05d}.arrayrecord"

    def _complete(self, index: int) -> Shard | None:
        path = self._path(index)
        try:
            beside = json.loads(Path(f"{path}.json").read_text())
            size = path.stat().st_size
        except FileNotFoundError:
            return None
        if changed := differences(beside["about"], _about_json(self.about)):
            raise ConfigError(f"{path} is of another store ({'; '.join(changed)}); give another folder, or delete this")
        shard = Shard(**beside["shard"])
        return shard if size == shard.bytes else None


def write(
    directory: str | os.PathLike,
    about: About,
    num_shards: int,
    make_shard: Callable[[int], Iterable[Record]],
    *,
    shards: Sequence[int] | None = None,
    threads: int = 4,
) -> Manifest | None:
    """Makes and writes the shards that are missing: the whole pipeline of a store, to be run again after any crash.

    Args:
        make_shard: the records of a shard, a function of its index alone. Called in this thread, one shard at a time,
            since it drives the accelerator; up to `threads` shards are encoded and written behind it. Of several
            processes of one run all make every shard, together, and the first writes.
        shards: those of this process, such as `range(process, num_shards, processes)`; None: all.

    Returns:
        The manifest; None while shards of other processes are missing.
    """
    writer, pending = Writer(directory, about, num_shards), []
    missing = writer.missing
    hosts.wait("what is missing is known")
    with ThreadPoolExecutor(threads) as pool:
        for index in missing:
            if shards is None or index in shards:
                records = list(make_shard(index))
                if len(pending) >= threads:
                    pending.pop(0).result()
                if hosts.first():
                    pending.append(pool.submit(writer.write_shard, index, records))
        for future in pending:
            future.result()
    hosts.wait("shards are written")
    if writer.missing:
        return None
    hosts.by_first(writer.finish)
    return load_manifest(directory)


def encode(record: Record, dtype: str) -> bytes:
    """A record as a safetensors blob; `decode` is the inverse, up to the rounding of log-probs to `dtype`."""
    tokens, response = np.asarray(record.tokens, np.int32), np.asarray(record.response, bool)
    arrays = {"tokens": tokens, "response": response}
    for name in LOGPS:
        logp = np.asarray(getattr(record, name))
        if not tokens.shape == response.shape == logp.shape or not np.isfinite(logp[response]).all():
            raise ValueError(f"{name} {logp.shape} of tokens {tokens.shape} must have their shape, and be finite")
        arrays[name] = logp[response].astype(dtype)
    for name, kind in (("group", np.int64), ("task", np.int64), ("outcome", np.float32), ("truncated", bool)):
        arrays[name] = np.asarray(getattr(record, name), kind)
    for name, value in record.payload.items():
        if len(value) != response.sum():
            raise ValueError(f"payload {name} has {len(value)} rows; give one per response token, {response.sum()}")
        arrays[f"payload/{name}"] = np.array(value, order="C")  # safetensors writes strided arrays wrongly
    return safetensors.numpy.save(arrays)


def decode(blob: bytes) -> Record:
    """A record as it was written, log-probs as float32."""
    arrays = safetensors.numpy.load(bytes(blob))
    response = arrays["response"]
    logps = {name: np.zeros(response.shape, np.float32) for name in LOGPS}
    for name, logp in logps.items():
        logp[response] = arrays[name]
    scalars = {name: arrays[name].item() for name in ("group", "task", "outcome", "truncated")}
    payload = {name.removeprefix("payload/"): a for name, a in sorted(arrays.items()) if name.startswith("payload/")}
    return Record(arrays["tokens"], response, **logps, **scalars, payload=payload)


# ---- opening ---------------------------------------------------------------------------------------------------------


class Store:
    """The records of a verified store, by index, in the order of the shards."""

    def __init__(self, directory: Path, manifest: Manifest):
        self.directory, self.manifest = directory, manifest
        self._source = grain.sources.ArrayRecordDataSource([str(directory / shard.name) for shard in manifest.shards])

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        return decode(self._source[int(index)])

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))


def load_manifest(directory: str | os.PathLike) -> Manifest:
    """Reads the manifest alone.

    Raises:
        ConfigError: missing, unreadable, altered, or of another format version.
    """
    path = Path(directory).expanduser().absolute() / "manifest.json"
    try:
        body = json.loads(path.read_text())
        found, stated = (body.get("format"), body.get("version")), body.pop("fingerprint", None)
    except FileNotFoundError as error:
        raise ConfigError(f"no {path}: the store is unfinished; run what writes it again, it continues") from error
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); run what writes the store again") from error
    if found != (FORMAT, VERSION):
        raise ConfigError(f"{path}: format {found[0]} version {found[1]}, not {FORMAT} {VERSION}; write the store anew")
    if stated != fingerprint(body):
        raise ConfigError(f"{path}: was altered, its fingerprint does not match; run what writes the store again")
    return Manifest(About(**body["about"]), [Shard(**shard) for shard in body["shards"]])


def open_store(
    directory: str | os.PathLike, *, tokenizer: str, reference: str | None = None, threads: int = 8
) -> Store:
    """Opens a store after reading every byte of it once.

    Args:
        tokenizer: fingerprint of the student's tokenizer: the ids mean nothing under another.
        reference: fingerprint of the parameters that training starts from, where they should be those that sampled.
        threads: shards hashed at once.

    Raises:
        ConfigError: naming the file: a shard that is missing, truncated or altered; another tokenizer or reference;
            and as `load_manifest`.
    """
    directory = Path(directory).expanduser().absolute()
    manifest = load_manifest(directory)
    for name, given in (("tokenizer", tokenizer), ("reference", reference)):
        stored = getattr(manifest.about, name)
        if given not in (None, stored):
            raise ConfigError(f"{directory / 'manifest.json'}: {name} {stored}, not the student's {given}; use its own")
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(functools.partial(_verify, directory), manifest.shards))
    return Store(directory, manifest)


def _verify(directory: Path, shard: Shard) -> None:
    path, remedy = directory / shard.name, "delete it and its .json, and run what writes the store again"
    if not path.exists():
        raise ConfigError(f"{path}: shard is missing; {remedy}")
    if (size := path.stat().st_size) != shard.bytes:
        raise ConfigError(f"{path}: shard has {size} of {shard.bytes} bytes, it is truncated or altered; {remedy}")
    if _sha256(path) != shard.sha256:
        raise ConfigError(f"{path}: shard was altered, its sha256 does not match; {remedy}")


def check_consistency(manifest: Manifest, allow_inconsistent: bool = False) -> None:
    """Stops where the labels are not of the teacher that wrote the SFT data, which costs accuracy (arXiv:2604.13010).

    Raises:
        ConfigError: the two differ, it is not allowed, and the labels are not residual (Lightning OPD 2.0).
    """
    about = manifest.about
    if about.teacher != about.sft_teacher and not (allow_inconsistent or about.residual):
        raise ConfigError(
            f"teacher {about.teacher} labelled, but {about.sft_teacher} wrote the SFT data: the advantages would carry "
            "the difference of the two teachers' styles; label with the SFT teacher, or correct the labels by "
            "lookup.write_residual, or run it as an ablation by --config.allow_inconsistent_teacher"
        )


def _about_json(about: About) -> dict[str, Any]:
    return to_json(about._asdict())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
