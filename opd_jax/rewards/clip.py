# SPDX-License-Identifier: Apache-2.0
"""CLIP score and PickScore: how well a picture fits its prompt, by a CLIP from a local directory, with torch.

| scorer | score | source |
| --- | --- | --- |
| `clip_score` | exp(logit_scale) cos / 100 | CLIP score, arXiv:2104.08718; scaled as in Flow-GRPO's code |
| `pick_score` | exp(logit_scale) cos / 26 | PickScore, arXiv:2305.01569; scaled as in Flow-GRPO's code |

The first is the cosine for OpenAI's models, whose scale is 100; the paper has a factor of 2.5 and a cut at 0. The
second is 0.8 to 0.9 for pictures of today's models.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from opd_jax.config import ConfigError


class Clip:
    """`exp(logit_scale) cos(picture, prompt) / divisor`: a scorer, `clip(images, prompts, metadata)`.

    Pictures are resized, cropped and normalised by the directory's processor. Prompts are cut at as many tokens as the
    text tower has positions, 77 of all published models.

    Args:
        path: a directory as transformers writes it, with a model, a tokenizer and an image processor.
        divisor: of the score.
        name: what a server calls it.
        processor: another directory, where that of the model has no tokenizer or image processor.
        device: of torch.
        batch_size: pictures in a forward pass at most.

    Raises:
        ConfigError: torch is not installed, or the directory holds no such model or processor.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        divisor: float = 100.0,
        name: str = "clip",
        processor: str | Path | None = None,
        device: str = "cpu",
        batch_size: int = 32,
    ):
        self.name, self.version = name, _fingerprint(Path(path), name)
        try:
            import torch
            from transformers import AutoProcessor, CLIPModel
        except ImportError as error:
            raise ConfigError(f"{name} needs torch: pip install torch ({error})") from error
        try:
            model = CLIPModel.from_pretrained(path, local_files_only=True, dtype=torch.float32)
            self._processor = AutoProcessor.from_pretrained(processor or path, local_files_only=True)
            self._model = model.eval().requires_grad_(False).to(device)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            line = " ".join(str(error).split())[:300]
            raise ConfigError(f"{name}: path={path} is not read ({line}); give a CLIP's directory") from error
        self._divisor, self._device, self._batch_size = divisor, device, batch_size
        self._length = model.config.text_config.max_position_embeddings

    def __call__(
        self,
        images: Sequence[np.ndarray],
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> list[float]:
        """One score for each picture.

        Args:
            images: uint8 `[H, W, 3]`, of any size.
            metadata: not read.
        """
        size, scores = self._batch_size, []
        for start in range(0, len(images), size):
            scores += self._scores(images[start : start + size], prompts[start : start + size])
        return scores

    def _scores(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
        text = {"padding": True, "truncation": True, "max_length": self._length}
        inputs = self._processor(images=list(images), text=list(prompts), return_tensors="pt", **text)
        logits = self._model(**inputs.to(self._device)).logits_per_image  # of every picture and every prompt
        return (logits.diagonal() / self._divisor).tolist()


def clip_score(path: str | Path, **options) -> Clip:
    """The CLIP score, by default named `clip`; options as of `Clip`."""
    return Clip(path, **{"divisor": 100.0, "name": "clip"} | options)


def pick_score(path: str | Path, **options) -> Clip:
    """PickScore over 26, by default named `pickscore`; options as of `Clip`. Its model is a CLIP-H."""
    return Clip(path, **{"divisor": 26.0, "name": "pickscore"} | options)


def _fingerprint(path: Path, name: str) -> str:
    """SHA-256 of a model's config and weights, 16 digits: what tells one reward from another."""
    files = sorted(file for end in ("config.json", "*.safetensors") for file in path.glob(end))
    if len(files) < 2:
        raise ConfigError(f"{name}: path={path} holds no config.json and *.safetensors; give a CLIP's directory")
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]
