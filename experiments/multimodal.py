"""A user's problems for text and vision-language models: JSONL files, pictures, and the verifier of each domain."""

import base64
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from experiments.language import Problems
from opd_jax.config import ConfigError
from opd_jax.models.images import ImageBank, image_bank, resize
from opd_jax.models.vlm import VLM
from opd_jax.rewards.verify import VERIFIERS


class Reference(NamedTuple):
    """What is known about right answers, and who compares."""

    verifier: str  # of `rewards.verify.VERIFIERS`
    known: Any


def correct(completion: str, reference: Reference) -> float:
    return VERIFIERS[reference.verifier](completion, reference.known)


class Reader:
    """Reads files of problems; it remembers the domains and pictures of all of them.

    A line is `{"prompt": ..., "domain": ..., "answer": ... or "tests": ..., "images": [...]}`; an image is a path, seen
    from the file, or base64; answer and images are optional.

    Args:
        part: of the config, `template`, `chat`, `thinking`, `prompt_tokens`, `images` and `max_pixels`.
        verifiers: by domain; a domain that is not named is verified by what has its own name.
    """

    def __init__(self, tokenizer, module, part, verifiers: dict[str, str]):
        self.tokenizer, self.module, self.part, self.verifiers = tokenizer, module, part, verifiers
        self.vocab_size = module.vocab_size
        self.domains: list[str] = []
        self.pictures: list[np.ndarray] = []

    def __call__(self, path: str, limit: int | None) -> Problems:
        """Raises: ConfigError, naming file and line."""
        try:
            lines = Path(path).read_text().splitlines()
        except OSError as error:
            raise ConfigError(f"cannot read the problems {path}: {error.strerror}; give a JSONL file") from error
        problems = Problems([], [], [])
        for number, line in enumerate(lines[:limit], 1):
            try:
                ids, reference, task = self.problem(json.loads(line), Path(path).parent)
            except (ValueError, KeyError, TypeError, OSError) as error:
                raise ConfigError(f"{path} line {number}: {error}; mend it") from error
            problems.ids.append(ids)
            problems.answers.append(reference)
            problems.tasks.append(task)
        if not problems.ids:
            raise ConfigError(f"{path}: holds no problems; give at least one line")
        return problems

    def problem(self, record: dict, folder: Path):
        domain = record["domain"]
        verifier = self.verifiers.get(domain, domain)
        known = record.get("tests", record.get("answer"))
        if known is not None and verifier not in VERIFIERS:
            raise ValueError(f"no verifier for domain {domain!r}; give verifiers.{domain}, one of {sorted(VERIFIERS)}")
        if domain not in self.domains:
            self.domains.append(domain)
        ids = self.encode(record["prompt"], [picture(source, folder) for source in record.get("images", [])])
        if not 1 <= len(ids) <= self.part.prompt_tokens:
            raise ValueError(
                f"{len(ids)} tokens with images; give 1 to {self.part.prompt_tokens}, problems.prompt_tokens"
            )
        return ids, "" if known is None else Reference(verifier, known), self.domains.index(domain)

    def encode(self, prompt: str, images: list[np.ndarray]) -> np.ndarray:
        """The ids of a prompt, pictures first, each as its ids in the bank."""
        if images and not isinstance(self.module, VLM):
            raise ValueError("a picture, but the student reads text alone; give a vision-language student")
        if len(images) > self.part.images:
            raise ValueError(f"{len(images)} pictures; give at most {self.part.images}, problems.images")
        text = self.part.template.replace("{prompt}", prompt)
        if self.part.chat:
            content = [{"type": "image"}] * len(images) + [{"type": "text", "text": text}] if images else text
            turn = [{"role": "user", "content": content}]
            how = {"add_generation_prompt": True, "enable_thinking": self.part.thinking}
            text = self.tokenizer.apply_chat_template(turn, tokenize=False, **how)
        elif images:
            marks = self.module.marks
            around = (marks.vision_start, marks.image, marks.vision_end)
            text = "".join(self.tokenizer.convert_ids_to_tokens(around)) * len(images) + text
        ids = np.asarray(self.tokenizer(text, add_special_tokens=not self.part.chat)["input_ids"], np.int32)
        return self.with_pictures(ids, images) if images else ids

    def with_pictures(self, ids: np.ndarray, images: list[np.ndarray]) -> np.ndarray:
        """The ids of each picture in the bank, in the place of its mark."""
        at = np.flatnonzero(ids == self.module.marks.image)
        if len(at) != len(images):
            raise ValueError(f"{len(images)} pictures, but the prompt has {len(at)} places for one; see the template")
        parts, done = [], 0
        for place, image in zip(at, images):
            image = resize(image, multiple=self.side, min_pixels=self.side**2, max_pixels=self.part.max_pixels)
            tokens = image.shape[0] * image.shape[1] // self.side**2
            first = self.vocab_size + len(self.pictures) * self.room
            parts += [ids[done:place], np.arange(first, first + tokens, dtype=np.int32)]
            self.pictures.append(image)
            done = place + 1
        return np.concatenate([*parts, ids[done:]])

    @property
    def side(self) -> int:
        """Pixels of what becomes one token."""
        return self.module.vision.patch_size * self.module.vision.merge_size

    @property
    def room(self) -> int:
        """Tokens of the largest picture."""
        return self.part.max_pixels // self.side**2

    def bank(self) -> ImageBank:
        """All pictures that were read."""
        if not isinstance(self.module, VLM):
            return image_bank([])
        vision = self.module.vision
        return image_bank(
            self.pictures,
            count=max(len(self.pictures), 1),
            max_patches=self.room * vision.merge_size**2,
            patch_size=vision.patch_size,
            merge_size=vision.merge_size,
            temporal_patch_size=vision.temporal_patch_size,
        )


def picture(source: str, folder: Path) -> np.ndarray:
    """A picture from a file, by its path, or from base64."""
    if source.startswith("data:"):
        source = source.partition(",")[2]
    path = folder / source if len(source) < 1024 else None
    data = path.read_bytes() if path and path.exists() else base64.b64decode(source, validate=True)
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
