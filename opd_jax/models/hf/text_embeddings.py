# SPDX-License-Identifier: Apache-2.0
"""What text encoders make of prompts, computed once and read by the index of a prompt.

```
text_embeddings.write(folder, pipeline, prompts, Settings(max_sequence_length=128))  # again after a kill: goes on
stored = text_embeddings.open_embeddings(folder, prompts, max_sequence_length=128)
condition = stored.rows(batch["prompt"])  # types.Condition of numpy arrays [B, 77 + 128, 4096] and [B, 2048]
velocity_fn = flow.guided(velocity_fn, stored.null, 4.5)
```

A store is a folder of safetensors shards, each written whole or not at all, with all it depends on in its header. Rows
are prompts in their order, then the negative prompt. The zeros that widen CLIP's states to T5's, or stand in the place
of T5's, are not stored: with bfloat16 a prompt takes 0.3 MB, and 8 kB more per token of T5.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Int
from tqdm import tqdm

from opd_jax.config import ConfigError, checks, differences, fingerprint, write_atomic
from opd_jax.models.hf import text_encoders
from opd_jax.models.hf.text_encoders import Encoded, TextEncoders
from opd_jax.types import Condition

FORMAT = "opd_jax.text_embeddings 1"
DTYPES = ("float32", "bfloat16", "float16")


class Settings(NamedTuple):
    """How prompts are encoded and stored."""

    max_sequence_length: int = 256  # tokens of T5; diffusers' default is 256, Flow-GRPO's 128
    dtype: str = "bfloat16"  # of what is stored
    compute_dtype: str = "float32"  # of the encoders
    negative_prompt: str = ""  # of guidance
    shard_size: int = 256  # prompts; what a kill can lose


class About(NamedTuple):
    """What a store was made from: two with equal ones hold the same."""

    encoders: str  # text_encoders.encoders_fingerprint
    prompts: str  # fingerprint of all prompts in their order
    count: int  # of prompts
    width: int  # E, of the context
    settings: Settings

    @property
    def shards(self) -> int:
        return -(-(self.count + 1) // self.settings.shard_size)

    def name(self, index: int) -> str:
        """Of a shard's file."""
        return f"shard-{index:05d}-of-{self.shards:05d}.safetensors"


def write(
    directory: str | os.PathLike,
    pipeline: str | os.PathLike,
    prompts: Sequence[str],
    settings: Settings = Settings(),  # noqa: B008
    batch_size: int = 16,
    device: str = "cpu",
) -> "TextEmbeddings":
    """Encodes the prompts of those shards that are not there yet, and opens the store. One writer at a time.

    Args:
        directory: created when missing; after a kill, the one of before.
        pipeline: a local diffusers directory of Stable Diffusion 3 or 3.5. Without T5 (`text_encoder_3` is null in its
            `model_index.json`) T5's states are zeros, as in diffusers.
        prompts: the index of a prompt here is its row.
        batch_size: prompts that are encoded at once; of no influence but rounding.
        device: torch's name of where the encoders run.

    Raises:
        ConfigError: the folder holds another store; values that the stored type cannot hold; as `TextEncoders`.
    """
    _check(settings, prompts)
    directory, pipeline = Path(directory).expanduser().absolute(), Path(pipeline).expanduser()
    encoders = text_encoders.encoders_fingerprint(pipeline)
    about = About(encoders, fingerprint(list(prompts)), len(prompts), text_encoders.context_width(pipeline), settings)
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(".*.tmp"):  # of a writer that was killed in the middle of a write
        leftover.unlink(missing_ok=True)
    for file in sorted(directory.glob("*.safetensors")):
        if changed := differences(_header(file), _json(about)):
            raise ConfigError(f"{file} is of another store ({'; '.join(changed)}); give another folder, or delete this")
    missing = [index for index in range(about.shards) if not (directory / about.name(index)).exists()]
    rows, size = [*prompts, settings.negative_prompt], settings.shard_size
    encode = TextEncoders(pipeline, settings.compute_dtype, device) if missing else None
    for index in tqdm(missing, "text embeddings", unit="shard", disable=None):
        shard = rows[index * size : (index + 1) * size]
        batches = [shard[start : start + batch_size] for start in range(0, len(shard), batch_size)]
        parts = [encode(batch, settings.max_sequence_length) for batch in batches]
        tensors = {name: _stored([getattr(part, name) for part in parts], settings.dtype) for name in _names(parts[0])}
        metadata = {"format": FORMAT, "about": json.dumps(_json(about))}
        write_atomic(directory / about.name(index), safetensors.numpy.save(tensors, metadata))
    return TextEmbeddings(directory, about)


def open_embeddings(
    directory: str | os.PathLike,
    prompts: Sequence[str],
    max_sequence_length: int,
    pipeline: str | os.PathLike | None = None,
) -> "TextEmbeddings":
    """Opens a finished store that was made for these prompts, in this order.

    Args:
        pipeline: where given, its encoders and tokenizers must be those of the store; their files are read for it.

    Raises:
        ConfigError: naming what differs; no store, an unfinished one, or a shard that is corrupt.
    """
    directory = Path(directory).expanduser().absolute()
    first = next(iter(sorted(directory.glob("shard-*.safetensors"))), None)
    if first is None:
        raise ConfigError(f"{directory} holds no text embeddings; make them by text_embeddings.write")
    header = _header(first)
    about = About(**header | {"settings": Settings(**header["settings"])})
    expected = about._replace(
        prompts=fingerprint(list(prompts)),
        count=len(prompts),
        settings=about.settings._replace(max_sequence_length=max_sequence_length),
    )
    if pipeline is not None:
        expected = expected._replace(encoders=text_encoders.encoders_fingerprint(pipeline))
    if changed := differences(header, _json(expected)):
        raise ConfigError(f"{directory} is of another store ({'; '.join(changed)}); write one for these prompts")
    return TextEmbeddings(directory, about)


class TextEmbeddings:
    """A finished store. Rows are read from the file when they are asked for, in the type stored.

    `stored[i]` is the `Condition` of prompt i, without a batch axis, for functions that draw one record.
    """

    def __init__(self, directory: Path, about: About):
        files = [directory / about.name(index) for index in range(about.shards)]
        if absent := [file.name for file in files if not file.exists()]:
            raise ConfigError(f"{directory}: {len(absent)} shards missing, {absent[0]} first; run what writes it again")
        for file in files:
            if changed := differences(_header(file), _json(about)):
                raise ConfigError(f"{file} is of another store ({'; '.join(changed)}); delete it and write it again")
        self.about = about
        self._files = [safetensors.safe_open(file, "numpy") for file in files]

    def __len__(self) -> int:
        return self.about.count

    def __getitem__(self, index: int) -> Condition:
        return Condition(*(leaf[0] for leaf in self.rows([index])))

    def rows(self, index: Sequence[int] | Int[np.ndarray, "B"]) -> Condition:
        """The condition of these prompts: context `[B, 77 + max_sequence_length, E]` and pooled `[B, P]`, numpy arrays.

        Raises:
            IndexError: no such prompt.
        """
        if outside := [int(i) for i in index if not 0 <= i < len(self)]:
            raise IndexError(f"prompt {outside[0]} of {len(self)}; give indices from 0 on")
        return self._read(index)

    @property
    def null(self) -> Condition:
        """Of the negative prompt, with a batch axis of one, as `flow.guided` takes it; jax arrays."""
        return Condition(*(jnp.asarray(leaf) for leaf in self._read([len(self)])))

    def _read(self, index: Sequence[int] | Int[np.ndarray, "B"]) -> Condition:
        places = [divmod(int(i), self.about.settings.shard_size) for i in index]
        read = lambda name: np.stack([self._files[shard].get_slice(name)[row] for shard, row in places])
        names = set(self._files[0].keys())
        encoded = Encoded(**{name: read(name) if name in names else None for name in Encoded._fields})
        context = text_encoders.join(encoded, self.about.width, self.about.settings.max_sequence_length)
        return Condition(context, encoded.pooled)


def _check(settings: Settings, prompts: Sequence[str]) -> None:
    longest = text_encoders.LONGEST
    with checks() as check:
        check(len(prompts) > 0 and not isinstance(prompts, str), f"prompts={prompts!r:.40}: give a list of them")
        check(0 < settings.max_sequence_length <= longest, f"{settings.max_sequence_length=}: choose 1 to {longest}")
        check(settings.shard_size > 0, f"{settings.shard_size=}: must be positive")
        for name in ("dtype", "compute_dtype"):
            value = getattr(settings, name)
            check(value in DTYPES, f"settings.{name}={value!r}: choose {', '.join(DTYPES)}")


def _names(encoded: Encoded) -> list[str]:
    return [name for name, value in encoded._asdict().items() if value is not None]


def _stored(parts: list[np.ndarray], dtype: str) -> np.ndarray:
    whole = np.concatenate(parts)
    with np.errstate(over="ignore"):
        stored = whole.astype(jnp.dtype(dtype))
    if not np.isfinite(stored).all():
        raise ConfigError(f"settings.dtype={dtype}: cannot hold {np.abs(whole).max():.3g}; take bfloat16")
    return stored


def _header(file: Path) -> dict:
    """What a shard was made from."""
    try:
        with safetensors.safe_open(file, "numpy") as opened:
            metadata = opened.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise ConfigError(f"{file} is corrupt ({error}); delete it and write it again") from error
    if metadata.get("format") != FORMAT:
        raise ConfigError(f"{file} has format {metadata.get('format')!r}, not {FORMAT!r}; give another folder")
    return json.loads(metadata["about"])


def _json(about: About) -> dict:
    return about._asdict() | {"settings": about.settings._asdict()}
