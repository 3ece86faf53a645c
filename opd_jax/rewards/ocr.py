# SPDX-License-Identifier: Apache-2.0
"""The OCR reward of Flow-GRPO (arXiv:2505.05470): is the text that the prompt quotes in the picture?

Flow-GRPO reads with PaddleOCR, this with Tesseract, which misses small and stylised letters more often: scores are not
comparable. Where Flow-GRPO scores 0 for an exception, the score here is unknown.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opd_jax.config import ConfigError
from opd_jax.rewards import tesseract


class Ocr:
    """`1 - min(edit distance, n) / n` of the text read and the n letters quoted, without spaces and case: a scorer.

    1 where the quoted text stands within what is read; unknown where the prompt has nothing between its first pair of
    double quotes.

    Raises:
        ConfigError: Tesseract, or its data for English, is not installed.
    """

    name = "ocr"

    def __init__(self):
        if tesseract.engine("", "SPARSE_TEXT") is None:
            raise ConfigError(
                "ocr needs Tesseract: pip install tesserocr, apt-get install tesseract-ocr-eng; data elsewhere is "
                "found by TESSDATA_PREFIX"
            )
        import tesserocr

        self.version, self._lock = tesserocr.tesseract_version().split("\n")[0], threading.Lock()

    def __call__(
        self,
        images: Sequence[np.ndarray],
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> list[float | str]:
        """A score for each picture, or why there is none.

        Args:
            images: uint8 `[H, W, 3]`, of any size.
            metadata: not read.
        """
        return [self._score(image, quoted(prompt)) for image, prompt in zip(images, prompts)]

    def _score(self, image: np.ndarray, text: str) -> float | str:
        if not text:
            return "no text in double quotes in the prompt"
        with self._lock:
            said = tesseract.read_anywhere(image)
        return float(tesseract.likeness(said.lower(), text))


def quoted(prompt: str) -> str:
    """What stands between the first two double quotes of a prompt, without spaces, in lower case; "" of none."""
    parts = prompt.split('"')
    return "".join(parts[1].split()).lower() if len(parts) > 2 else ""
