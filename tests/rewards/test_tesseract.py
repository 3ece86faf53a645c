"""The second opinion reads clean signs where an engine is installed, and says None where none is."""

import numpy as np

from opd_jax.rewards import tesseract
from opd_jax.worlds import scenes


def test_reads_clean_signs_or_says_none():
    rng = np.random.default_rng(0)
    signs = [scenes.draw_scene(rng, "ocr") for _ in range(30)]
    words = tesseract.read(np.stack([scenes.render(sign, rng) for sign in signs]), scenes.LETTERS)
    if tesseract.engine(scenes.LETTERS) is None:
        assert words is None
    else:
        assert np.mean([tesseract.likeness(word, sign.text) for word, sign in zip(words, signs)]) > 0.95


def test_likeness_by_hand():
    pairs = {("AX", "AX"): 1, ("LAXL", "AX"): 1, ("AH", "AX"): 0.5, ("XA", "AX"): 0, ("", "AX"): 0, ("TOTO", "AX"): 0}
    for (word, target), value in pairs.items():
        assert tesseract.likeness(word, target) == value
