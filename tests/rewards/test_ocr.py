"""The OCR reward: what is quoted, what is read, and the score of both."""

import os

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from opd_jax.rewards import tesseract
from opd_jax.rewards.ocr import Ocr, quoted


def test_quoted_text():
    assert quoted('a sign that says "Open  Daily" and "no"') == "opendaily"
    for prompt in ("no quotes", 'one " quote', 'nothing "" quoted', 'blank " " quoted', ""):
        assert quoted(prompt) == ""


def picture(text, size=40):
    image = Image.new("RGB", (512, 256), (90, 140, 90))
    font = ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)
    ImageDraw.Draw(image).text((60, 100), text, font=font, fill=(250, 250, 250))
    return np.asarray(image)


@pytest.mark.skipif(tesseract.engine("", "SPARSE_TEXT") is None, reason="no Tesseract here")
def test_scores_of_pictures():
    images = [picture(text) for text in ("Hello World", "Hello World", "Hello World", "", "Hello World")]
    prompts = ['"hello world"', 'a wall with "HELLO"', 'it says "help"', '"hello"', "no text asked for"]
    scores = Ocr()(images, prompts, [None] * 5)
    # read as helloworld: equal; within; "help" is one letter from "hell" but 7 from all of it, so nothing; blank
    assert scores[:4] == [1.0, 1.0, 0.0, 0.0] and scores[4] == "no text in double quotes in the prompt"
    assert Ocr()([picture("Hallo")], ['"hello"'])[0] == pytest.approx(1 - 1 / 5)
    assert Ocr().name == "ocr" and "tesseract" in Ocr().version
