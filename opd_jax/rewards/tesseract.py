"""A second opinion on signs by an OCR engine that no model was trained against: Tesseract, where it is installed.

pip install tesserocr; apt-get install tesseract-ocr-eng
"""

import functools
import glob
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

SCALE, MARGIN = 4, 8  # of a plate ten pixels high; with these it reads 99 % of clean signs
_FOLDERS = (os.environ.get("TESSDATA_PREFIX", ""), *sorted(glob.glob("/usr/share/tesseract-ocr/*/tessdata")))


@functools.cache
def engine(letters: str, layout: str = "SINGLE_WORD"):
    """One engine for this process; None where the engine or its data is missing.

    Args:
        letters: what may occur; "" is all it knows.
        layout: of the text, as Tesseract names it.
    """
    folder = next((f for f in _FOLDERS if os.path.exists(os.path.join(f, "eng.traineddata"))), None)
    try:
        import tesserocr
    except ImportError:
        return None
    if folder is None:
        return None
    os.environ.setdefault("OMP_THREAD_LIMIT", "1")
    api = tesserocr.PyTessBaseAPI(path=folder, lang="eng", psm=getattr(tesserocr.PSM, layout))
    api.SetVariable("tessedit_char_whitelist", letters)
    return api


def read(images: Float[np.ndarray, "N H W 3"], letters: str) -> list[str] | None:
    """The word on the light plate of each picture, spaces removed; None where no engine is installed. A few
    milliseconds a picture, one engine, one thread.

    Args:
        images: in [-1, 1]; what is lighter than the rest is taken for the plate, and enlarged for the engine.
        letters: what may occur.
    """
    api = engine(letters)
    if api is None:
        return None
    words = []
    for image in images:
        ys, xs = np.where(image.mean(-1) > 0.6)
        if ys.size:
            image = image[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        plate = Image.fromarray(np.uint8(np.clip((image + 1) * 127.5, 0, 255))).convert("L")
        plate = plate.resize((plate.width * SCALE, plate.height * SCALE), Image.Resampling.BICUBIC)
        page = Image.new("L", (plate.width + 2 * MARGIN, plate.height + 2 * MARGIN), 245)
        page.paste(plate, (MARGIN, MARGIN))
        api.SetImage(page)
        words.append("".join(api.GetUTF8Text().split()))
    return words


def read_anywhere(image: UInt8[np.ndarray, "H W 3"]) -> str | None:
    """All text in a picture, wherever it stands, spaces removed; None where no engine is installed.

    A tenth of a second for 512 x 512. Letters lower than about 15 pixels are not read. One engine: not for two threads
    at once.
    """
    api = engine("", "SPARSE_TEXT")
    if api is None:
        return None
    api.SetImage(Image.fromarray(image).convert("L"))
    return "".join(api.GetUTF8Text().split())


def likeness(word: str, target: str) -> float:
    """1 - edit distance / length of the target, not below 0; 1 where the target stands within the word (Flow-GRPO)."""
    if target in word:
        return 1.0
    row: Sequence[int] = range(len(word) + 1)
    for i, letter in enumerate(target, 1):
        new = [i]
        for j, other in enumerate(word, 1):
            new.append(min(row[j - 1] + (letter != other), row[j] + 1, new[-1] + 1))
        row = new
    return 1 - min(row[-1], len(target)) / len(target)
