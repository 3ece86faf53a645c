# SPDX-License-Identifier: Apache-2.0
import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from opd_jax import report
from opd_jax.report import Estimate, HeatMap, Samples

ROWS = [
    {"model": "student", "accuracy ↑": Estimate(0.5, 0.02), "KL ↓": 1.5, "steps": 0},
    {"model": "teacher", "accuracy ↑": Estimate(0.901, 0.011), "KL ↓": None, "steps": 1200, "extra": "yes"},
    {"model": "distilled", "accuracy ↑": Estimate(0.872, 0.012), "KL ↓": 0.125, "steps": 800},
]


def test_format_table_aligns_and_marks_the_best():
    assert report.format_table(ROWS).splitlines() == [
        "| model     |        accuracy ↑ |     KL ↓ | steps | extra |",
        "| :-------- | ----------------: | -------: | ----: | ----: |",
        "| student   |     0.500 ± 0.020 |     1.50 |     0 |     – |",
        "| teacher   | **0.901 ± 0.011** |        – | 1,200 |   yes |",
        "| distilled |     0.872 ± 0.012 | **0.12** |   800 |     – |",
    ]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.0], ["**0.0**", "**0.0**"]),
        ([0.00012345, 0.5], ["0.000", "**0.500**"]),
        ([1234.5, -2], ["**1,234**", "-2"]),
        ([float("nan"), 1.0], ["nan", "**1.00**"]),
        ([1, 3], ["1", "**3**"]),
        ([np.float32(0.25), True], ["**0.250**", "True"]),
        (["yes", None], ["yes", "–"]),
    ],
)
def test_numbers_of_a_column_share_their_decimals(values, expected):
    lines = report.format_table([{"m": "a", "x ↑": value} for value in values]).splitlines()[2:]
    assert [line.split("|")[2].strip() for line in lines] == expected


def test_a_single_row_and_columns_without_direction_have_no_best():
    assert "**" not in report.format_table(ROWS[:1])
    assert "**" not in report.format_table([{"m": "a", "x": 1}, {"m": "b", "x": 2}])


def test_to_uint8_rounds_and_clips():
    images = np.array([-1, 1, 0, 2, -3, 1 / 127.5 - 1], np.float32).reshape(1, 1, 2, 3)
    assert report.to_uint8(images).ravel().tolist() == [0, 255, 128, 255, 0, 1]
    assert report.to_uint8(np.full((1, 1, 1, 3), 7, np.uint8)).max() == 7


def test_image_grid_places_and_enlarges():
    images = np.stack([np.full((2, 3, 3), value, np.uint8) for value in (10, 20, 30)])
    grid = np.asarray(report.image_grid(images, columns=2, scale=2, gap=1))
    assert grid.shape == (2 * 4 + 1, 2 * 6 + 1, 3)
    assert (grid[:4, :6] == 10).all() and (grid[:4, 7:] == 20).all() and (grid[5:, :6] == 30).all()
    assert (grid[4] == 255).all() and (grid[5:, 7:] == 255).all()


def test_curves_are_of_the_first_seed_where_there_are_several():
    stages = ["base", "a_seed10", "a_seed2", "b_seed1", "other_seed", "a_seed2"]
    rows = [{"stage": stage, "step": i, "loss": float(i)} for i, stage in enumerate(stages)]
    curves = report.curves_from(rows, ["loss"])["loss"]
    assert curves == {"base": ([0], [0.0]), "a_seed2": ([2, 5], [2.0, 5.0]), "b_seed1": ([3], [3.0]),
                      "other_seed": ([4], [4.0])}  # fmt: skip


def test_curves_from_metrics_lines():
    rows = [
        {"stage": "sft", "step": 0, "loss": 2.0},
        {"stage": "distill", "step": 0, "loss": 1.0, "reward": 0.1},
        {"stage": "distill", "step": 1, "loss": 0.5},
    ]
    assert report.curves_from(rows, ["loss", "reward", "absent"]) == {
        "loss": {"sft": ([0], [2.0]), "distill": ([0, 1], [1.0, 0.5])},
        "reward": {"distill": ([0], [0.1])},
    }


def test_curves_by_what_was_spent():
    rows = [
        {"stage": "a", "step": 0, "seconds": 1.0, "episodes": 4, "success": 0.1},
        {"stage": "b", "step": 0, "seconds": 9.0, "success": 0.3},
        {"stage": "a", "step": 1, "seconds": 3.0, "episodes": 2, "success": 0.2},
    ]
    assert report.curves_by(rows, "success", "episodes") == {"a": ([4, 6], [0.1, 0.2])}
    assert report.curves_by(rows, "success", "seconds") == {"a": ([1.0, 3.0], [0.1, 0.2]), "b": ([9.0], [0.3])}
    seeds = [{"stage": f"a_seed{i}", "step": 0, "seconds": 1.0, "success": 0.1} for i in (1, 0)]
    assert list(report.curves_by(seeds, "success", "seconds")) == ["a_seed0"]


FILMS = {"student": np.arange(2 * 3 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 4, 3)[:1]}


class Page(HTMLParser):
    """Tags that were opened, what they point to, and whether every one was closed in order."""

    VOID = frozenset({"meta", "img", "source", "link", "br"})

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.tags, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    rng = np.random.default_rng(0)
    models = {"student": rng.uniform(-1, 1, (2, 4, 4, 3)), "teacher <b>": rng.integers(0, 255, (2, 4, 4, 3), np.uint8)}
    path = report.write_report(
        tmp_path_factory.mktemp("report") / "report.html",
        title="Two teachers & one <student>",
        command="python experiments/main.py --config=configs/flow_opd.py:tiny",
        tables={"Result": ROWS},
        curves={"loss": {"sft": (range(200), rng.normal(size=200)), "distill": ([0], [1.0])}},
        images=[Samples("Samples", ["a red circle", 'say "opd"'], models), Samples("Films", ["push"], FILMS)],
        heat_maps={"Disagreement": [HeatMap("before", np.array([[0.0, np.nan], [2.0, 1.0]]), "episode", "decision")]},
        timings={"sample": 61.0, "update": 30.5},
        versions={"jax": "0.10.2", "commit": None, "command": "main.py"},
        notes=["Means over 64 prompts."],
    )
    return path.read_text()


def test_report_is_self_contained_and_well_formed(page):
    parsed = Page(page)
    assert parsed.open == [] and not {"script", "link", "iframe"} & set(parsed.tags)
    assert parsed.links and all(re.match("data:image/(png|gif);base64,", link) for link in parsed.links)
    assert not re.search(r"https?://|url\(|@import", page)
    for link in parsed.links:
        Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2]))).verify()


def test_report_shows_what_it_was_given(page):
    text = Page(page).text
    for expected in [
        "Two teachers & one <student>",
        "Means over 64 prompts.",
        "--config=configs/flow_opd.py:tiny",
        "0.901 ± 0.011",
        "a red circle",
        "teacher <b>",
        "1 min 01 s",
        "1 min 32 s",  # total
        "jax 0.10.2",
    ]:
        assert expected in text, expected
    assert '<td class="number best">0.901 ± 0.011</td>' in page and "None" not in text
    assert "image-rendering: pixelated" in page and "prefers-color-scheme: dark" in page
    assert 'style="width:50.0%"' in page  # the bar of `update`
    assert page.index("0.901 ± 0.011") < page.index("Means over 64 prompts.") < page.index("a red circle")


def test_sample_pixels_are_exact(page):
    first = next(link for link in Page(page).links)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(first.partition(",")[2]))))
    images = np.random.default_rng(0).uniform(-1, 1, (2, 4, 4, 3))
    np.testing.assert_array_equal(pixels, report.to_uint8(images)[0])


def test_a_film_has_every_frame_and_stays_on_the_last(page):
    data = next(link for link in Page(page).links if "gif" in link).partition(",")[2]
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert shown.n_frames == 3 and shown.info["loop"] == 0
    frames, durations = [], []
    for index in range(3):
        shown.seek(index)
        frames.append(np.asarray(shown.convert("RGB")))
        durations.append(shown.info["duration"])
    np.testing.assert_array_equal(frames, FILMS["student"][0])
    assert durations == [80, 80, 2000]


def test_empty_parts_are_left_out(tmp_path):
    text = report.write_report(tmp_path / "report.html", title="t", command="c").read_text()
    assert Page(text).tags.count("h2") == 1 and "<img" not in text  # only how to reproduce it


def test_write_summary(tmp_path):
    path = report.write_summary(tmp_path / "summary.json", {"accuracy": Estimate(0.5, 0.1), "n": np.int64(3)})
    assert json.loads(path.read_text()) == {"accuracy": [0.5, 0.1], "n": 3}
