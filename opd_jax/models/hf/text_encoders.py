# SPDX-License-Identifier: Apache-2.0
"""Prompts as Stable Diffusion 3 and 3.5 see them: two CLIP text encoders and T5, on the host, through transformers.

Encoders are frozen and prompts are few, so that they run once, before training, and what they give is stored
(`text_embeddings`). This is the one module that runs torch, and it imports it when an encoder is loaded.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from opd_jax.config import ConfigError, fingerprint
from opd_jax.models.hf.tensor_files import MissingFile, read_json

CLIP, T5 = "CLIPTextModelWithProjection", "T5EncoderModel"
ENCODERS = {"text_encoder": CLIP, "text_encoder_2": CLIP, "text_encoder_3": T5}
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}
LONGEST = 512  # tokens of T5 that diffusers allows


class Encoded(NamedTuple):
    """Prompts, before `join` makes one context of the two kinds of states; in a shard of a store, without padding."""

    pooled: Float[np.ndarray, "B P"]  # projections of CLIP-L, then CLIP-G: 768 + 1280
    clip: Float[np.ndarray, "B 77 C"]  # last states but one of both, side by side
    t5: Float[np.ndarray, "B L E"] | None  # None for a pipeline without T5


class TextEncoders:
    """The text encoders of a pipeline directory: `encoders(prompts, max_sequence_length) -> Encoded`.

    As `StableDiffusion3Pipeline.encode_prompt`: text beyond 77 tokens is cut off for CLIP, beyond
    `max_sequence_length` for T5, and no mask tells padding from text.

    Args:
        pipeline: a local directory with `model_index.json`, such as a Stable Diffusion 3.5 snapshot.
        dtype: that the encoders have and compute in, `float32`, `bfloat16` or `float16`. T5 takes 19 GB in float32.
        device: torch's name of one.

    Raises:
        ConfigError: torch is absent, a file is, or an encoder is of another class than Stable Diffusion 3's.
    """

    def __init__(self, pipeline: str | Path, dtype: str = "float32", device: str = "cpu"):
        pipeline, self._torch, self.device = Path(pipeline), _import_torch(), device
        import transformers

        kinds = {CLIP: transformers.CLIPTokenizer, T5: transformers.T5TokenizerFast}
        self._clip, self._t5 = [], None
        for folder in encoder_folders(pipeline):
            kind = ENCODERS[folder]
            tokenizer = kinds[kind].from_pretrained(pipeline / TOKENIZERS[folder], local_files_only=True)
            model = getattr(transformers, kind).from_pretrained(
                pipeline / folder, dtype=getattr(self._torch, dtype), local_files_only=True, use_safetensors=True
            )
            pair = tokenizer, model.eval().to(device)
            if kind == T5:
                self._t5 = pair
            else:
                self._clip.append(pair)

    def __call__(self, prompts: Sequence[str], max_sequence_length: int = 256) -> Encoded:
        """Encodes a batch; float32 arrays, with values of the encoders' type."""
        length = self._clip[0][0].model_max_length
        with self._torch.inference_mode():
            run = lambda tokenizer, model: model(self._ids(tokenizer, prompts, length), output_hidden_states=True)
            clip = [run(*pair) for pair in self._clip]
            t5 = self._t5 and self._t5[1](self._ids(self._t5[0], prompts, max_sequence_length))[0]
        side_by_side = lambda parts: np.concatenate([_numpy(part) for part in parts], axis=-1)
        return Encoded(
            pooled=side_by_side([output.text_embeds for output in clip]),
            clip=side_by_side([output.hidden_states[-2] for output in clip]),
            t5=None if t5 is None else _numpy(t5),
        )

    def _ids(self, tokenizer, prompts: Sequence[str], length: int):
        padded = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return padded.input_ids.to(self.device)


def join(encoded: Encoded, width: int, max_sequence_length: int) -> Float[np.ndarray, "B S E"]:
    """The context of the transformer: CLIP's states, widened by zeros, and then T5's, or zeros in their place."""
    batch, length, own = encoded.clip.shape
    context = np.zeros((batch, length + max_sequence_length, width), encoded.clip.dtype)
    context[:, :length, :own] = encoded.clip
    if encoded.t5 is not None:
        context[:, length:] = encoded.t5
    return context


def encoder_folders(pipeline: Path) -> list[str]:
    """The encoders that a pipeline has: all three, or all but T5.

    Raises:
        ConfigError: no pipeline of Stable Diffusion 3, without one of the CLIP encoders, or with one of another class.
    """
    file = pipeline / "model_index.json"
    index = read_json(file)
    if not str(index.get("_class_name")).startswith("StableDiffusion3"):
        raise ConfigError(
            f"{file} has _class_name={index.get('_class_name')!r}; give a Stable Diffusion 3 or 3.5 pipeline"
        )
    found = {folder: (index.get(folder) or [None, None])[1] for folder in ENCODERS}
    if found["text_encoder_3"] is None:
        found.pop("text_encoder_3")
    for folder, kind in found.items():
        if kind != ENCODERS[folder]:
            raise ConfigError(f"{file} has {folder}={kind!r}; it must be {ENCODERS[folder]!r}")
    return list(found)


def context_width(pipeline: str | Path) -> int:
    """E, the width of the context: T5's, or what the transformer's `config.json` says where there is no T5.

    Raises:
        ConfigError: the states of both CLIP encoders together are wider.
    """
    pipeline = Path(pipeline)
    folders = encoder_folders(pipeline)
    if "text_encoder_3" in folders:
        width = read_json(pipeline / "text_encoder_3" / "config.json")["d_model"]
    else:
        width = read_json(pipeline / "transformer" / "config.json").get("joint_attention_dim", 4096)
    clip = [read_json(pipeline / folder / "config.json")["hidden_size"] for folder in folders[:2]]
    if sum(clip) > width:
        raise ConfigError(
            f"{pipeline}: CLIP's widths {clip} exceed the context's, {width}; take encoders that belong together"
        )
    return width


def encoders_fingerprint(pipeline: str | Path) -> str:
    """SHA-256 of every file that decides what a prompt becomes: weights, configs and tokenizers. Reads them all.

    Raises:
        ConfigError: a file is absent (then it is a FileNotFoundError too), or as `encoder_folders`.
    """
    pipeline = Path(pipeline)
    files = []
    for folder in encoder_folders(pipeline):
        files += [pipeline / folder / name for name in ("config.json", *_weights(pipeline / folder))]
        files += sorted(path for path in (pipeline / TOKENIZERS[folder]).glob("*") if path.is_file())
    if absent := [file for file in files if not file.is_file()]:
        raise MissingFile(f"{absent[0]} is absent; fetch the pipeline again, with its safetensors weights")
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_sha256, files)
    return fingerprint({str(file.relative_to(pipeline)): digest for file, digest in zip(files, digests)})


def _weights(directory: Path) -> list[str]:
    """The files that transformers reads: one where there is one, else the shards that the index names."""
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").exists() or not index.exists():
        return ["model.safetensors"]
    return sorted(set(read_json(index)["weight_map"].values()))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _numpy(tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()  # numpy has no bfloat16; every value of it is one of float32


def _import_torch():
    try:
        import torch
    except ImportError as error:
        raise ConfigError("text encoders run in torch, which is not installed; pip install torch==2.13.0") from error
    return torch
