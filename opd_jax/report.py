# SPDX-License-Identifier: Apache-2.0
"""The result of a run: a self-contained `report.html`, the same table for a terminal, and `summary.json`."""

import base64
import html
import io
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from opd_jax.config import to_json, write_atomic
from opd_jax.metrics import format_seconds

Row = Mapping[str, Any]
Images = Float[np.ndarray, "N H W 3"] | UInt8[np.ndarray, "N H W 3"]
Films = UInt8[np.ndarray, "N T H W 3"]
Curves = Mapping[str, Mapping[str, tuple[Any, Any]]]  # {metric: {line: (steps, values)}}


class Estimate(NamedTuple):
    """A measured value with its spread, such as a standard deviation over seeds, shown as `0.871 ± 0.012`."""

    value: float
    error: float


def over_seeds(values: Sequence[float]) -> float | Estimate:
    """A value as it is; of several their mean, with the standard deviation."""
    return Estimate(float(np.mean(values)), float(np.std(values, ddof=1))) if len(values) > 1 else values[0]


class Samples(NamedTuple):
    """Images of several models for the same prompts: `models[name][i]` belongs to `prompts[i]`.

    Or films, `[N, T, H, W, 3]`; all of a report begin together where they are of one length.
    """

    title: str
    prompts: Sequence[str]
    models: Mapping[str, Images | Films]


class HeatMap(NamedTuple):
    """Values as colours; NaN is left blank."""

    title: str
    values: Float[np.ndarray, "rows columns"]
    rows: str  # what goes down, and what goes to the right
    columns: str


# ---- images ----------------------------------------------------------------------------------------------------------


def to_uint8(images: Images | Films) -> UInt8[np.ndarray, "..."]:
    """Images in [-1, 1] as bytes, rounded to the nearest and clipped; bytes are passed on."""
    if images.dtype == np.uint8:
        return images
    return np.clip(np.rint((np.asarray(images, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)


def image_grid(images: Images, columns: int, scale: int = 1, gap: int = 2) -> Image.Image:
    """One picture of N images in rows of `columns`, each enlarged `scale` times without smoothing, on white."""
    pixels = to_uint8(images).repeat(scale, axis=1).repeat(scale, axis=2)
    n, height, width, _ = pixels.shape
    rows = math.ceil(n / columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, image in enumerate(pixels):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas)


def film(frames: UInt8[np.ndarray, "T H W 3"], milliseconds: int = 80) -> bytes:
    """The frames as a GIF that repeats, the last of them shown for two seconds."""
    first, *rest = (Image.fromarray(frame).quantize(64, dither=Image.Dither.NONE) for frame in frames)
    buffer = io.BytesIO()
    durations = [milliseconds] * len(rest) + [2000]
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=durations, loop=0)
    return buffer.getvalue()


def _data_uri(image: Image.Image | bytes, kind: str = "png") -> str:
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        image = buffer.getvalue()
    return f"data:image/{kind};base64," + base64.b64encode(image).decode()


# ---- tables ----------------------------------------------------------------------------------------------------------


def format_table(rows: Sequence[Row]) -> str:
    """Rows as an aligned Markdown table; the best of a column is bold where its name ends in `↑` or `↓`.

    Values are strings, numbers, `Estimate`s, or None for what was not measured. Columns come in the order in which the
    rows first name them; the first is the row's label.
    """
    columns, cells, best = _layout(rows)
    text = [[f"**{cell}**" if (i, j) in best else cell for j, cell in enumerate(row)] for i, row in enumerate(cells)]
    widths = [max(3, *(len(row[j]) for row in [columns, *text])) for j in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        padded = [cell.rjust(width) if j else cell.ljust(width) for j, (cell, width) in enumerate(zip(row, widths))]
        return f"| {' | '.join(padded)} |"

    rule = [":" + "-" * (width - 1) if j == 0 else "-" * (width - 1) + ":" for j, width in enumerate(widths)]
    return "\n".join([line(columns), line(rule), *map(line, text)])


def _layout(rows: Sequence[Row]) -> tuple[list[str], list[list[str]], set[tuple[int, int]]]:
    """Column names, the text of every cell, and the (row, column) pairs that are the best of their column."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [["" for _ in columns] for _ in rows]
    best = set()
    for j, name in enumerate(columns):
        values = [row.get(name) for row in rows]
        numbers = [_number(value) for value in values]
        finite = [x for x in numbers if x is not None and math.isfinite(x)]
        digits = _decimals(values, finite)
        for i, value in enumerate(values):
            cells[i][j] = _show(value, digits)
        if finite and len(rows) > 1 and name.endswith(("↑", "↓")):
            top = _show(max(finite) if name.endswith("↑") else min(finite), digits)
            best |= {
                (i, j) for i, x in enumerate(numbers) if x is not None and _show(x, digits) == top
            }  # ties as shown
    return columns, cells, best


def _number(value: Any) -> float | None:
    value = value.value if isinstance(value, Estimate) else value
    return float(value) if isinstance(value, int | float | np.number) and not isinstance(value, bool) else None


def _decimals(values: Iterable[Any], finite: Sequence[float]) -> int:
    """Decimals of a column: three significant digits of its largest value, none for whole numbers."""
    whole = all(isinstance(value, int | np.integer | str | None) for value in values)
    largest = max(map(abs, finite), default=0.0)
    if whole or largest == 0:
        return 0 if whole else 1
    return int(min(6, max(0, 2 - math.floor(math.log10(largest)))))


def _show(value: Any, digits: int) -> str:
    if value is None:
        return "–"
    if isinstance(value, Estimate):
        return f"{value.value:,.{digits}f} ± {value.error:,.{digits}f}"
    if _number(value) is not None:
        return f"{float(value):,.{digits}f}"
    return str(value)


# ---- curves ----------------------------------------------------------------------------------------------------------

COLORS = ("#3b82c4", "#e07b39", "#2e9e78", "#c46aa6", "#c9a227", "#8a6fd1", "#6b7280")
DASHES = ("solid", "dashed", "dotted")  # where there are more lines than colors
FEW = len(COLORS)
THEMES = {"light": ("#3d4148", "#d9dce1"), "dark": ("#c3c7ce", "#3a3f47")}  # text, grid


def curves_from(rows: Sequence[Row], metrics: Sequence[str]) -> dict[str, dict[str, tuple[list, list]]]:
    """Curves of the lines of `metrics.jsonl`: `{metric: {stage: (steps, values)}}`, for the metrics that occur.

    Of stages that differ by their seed alone, `NAME_seed0` and so on, the first seed's: more cannot be told apart.
    """
    curves: dict[str, dict[str, tuple[list, list]]] = {}
    shown = _first_seeds({row["stage"] for row in rows})
    for metric in metrics:
        for row in (row for row in rows if row["stage"] in shown):
            if metric in row:
                steps, values = curves.setdefault(metric, {}).setdefault(row["stage"], ([], []))
                steps.append(row["step"])
                values.append(row[metric])
    return curves


def _first_seeds(stages: set[str]) -> set[str]:
    first: dict[str, tuple[int, str]] = {}
    for stage in stages:
        seeded = re.fullmatch(r"(.+)_seed(\d+)", stage)
        name, seed = (seeded[1], int(seeded[2])) if seeded else (stage, 0)
        first[name] = min(first.get(name, (seed, stage)), (seed, stage))
    return {stage for _, stage in first.values()}


def curves_by(rows: Sequence[Row], metric: str, cost: str) -> dict[str, tuple[list, list]]:
    """One metric against what its stage has spent until then: `{stage: (running sums of cost, values)}`.

    `seconds` of a line are a running sum already; a line without the metric has its cost all the same. Of stages that
    differ by their seed alone, the first seed's.
    """
    lines: dict[str, tuple[list, list]] = {}
    total: dict[str, float] = {}
    shown = _first_seeds({row["stage"] for row in rows})
    for row in (row for row in rows if row["stage"] in shown and cost in row):
        stage, before = row["stage"], 0 if cost == "seconds" else total.get(row["stage"], 0)
        total[stage] = before + row[cost]
        if metric in row:
            spent, values = lines.setdefault(stage, ([], []))
            spent.append(total[stage])
            values.append(row[metric])
    return lines


class Stroke(NamedTuple):
    color: str
    dash: str


def strokes(names: Sequence[str]) -> dict[str, Stroke]:
    """How each line is drawn, in every plot alike."""
    return {name: Stroke(COLORS[i % FEW], DASHES[i // FEW % len(DASHES)]) for i, name in enumerate(names)}


def _plot(
    title: str, along: str, lines: Mapping[str, tuple[Any, Any]], drawn: Mapping[str, Stroke], theme: str
) -> bytes:
    """One metric as a PNG with a transparent ground: running means of long curves, the smoother the more there are,
    and faintly below them what they are means of, where there are few."""
    text, grid = THEMES[theme]
    figure = Figure(figsize=(3.6, 2.4), layout="constrained")
    axes = figure.subplots()
    for name, (steps, values) in lines.items():
        steps, values = np.asarray(steps), np.asarray(values, np.float64)
        color, dash = drawn[name]
        window = len(values) // max(8, 40 - 4 * len(lines))
        if window > 1:
            if len(lines) <= FEW:
                axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            values = np.convolve(values, np.full(window, 1 / window), "valid")
            steps = steps[window // 2 :][: len(values)]
        point = "o" if len(values) < 5 else None
        axes.plot(steps, values, color=color, linestyle=dash, linewidth=1.8, marker=point)
    axes.set_title(title, fontsize=10, color=text, loc="left")
    axes.set_xlabel(along, fontsize=8, color=text)
    axes.tick_params(colors=text, labelsize=8, length=0)
    axes.grid(color=grid, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=190, transparent=True)
    return buffer.getvalue()


# ---- the page --------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --ground: #fdfdfc; --text: #23262b; --soft: #676d76; --line: #e3e5e9; --tint: #f3f4f6;
  --accent: #3b82c4; }
@media (prefers-color-scheme: dark) { :root { --ground: #16181c; --text: #e2e4e8; --soft: #979da8; --line: #2d3138;
  --tint: #1f2228; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.1rem 4rem; max-width: 62rem; background: var(--ground); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .8rem; letter-spacing: -.01em; }
h2 { font-size: 1.08rem; margin: 2.6rem 0 .8rem; padding-bottom: .35rem; border-bottom: 1px solid var(--line); }
p, ul { margin: .5rem 0; } ul { padding-left: 1.2rem; } li { margin: .25rem 0; }
pre { margin: 0; padding: .7rem .9rem; background: var(--tint); border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; font: .84rem/1.5 ui-monospace, "SF Mono", Consolas, "DejaVu Sans Mono", monospace; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93rem; }
th, td { padding: .38rem .9rem .38rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--soft); font-size: .85rem; }
th.number, td.number { text-align: right; padding: .38rem 0 .38rem 1.4rem; white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
td.best { font-weight: 700; }
.soft { color: var(--soft); font-size: .86rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 1rem; }
.plots img { width: 100%; height: auto; max-width: 30rem; display: block; }
.legend span { margin-right: 1.2rem; white-space: nowrap; }
.legend i { display: inline-block; width: 1.4rem; vertical-align: middle; margin-right: .4rem; }
.samples { table-layout: fixed; width: max-content; }
.samples th, .samples td { border: 0; padding: 2px; }
.samples thead th { font-weight: 400; font-size: .76rem; line-height: 1.25; vertical-align: bottom; width: 5.75rem;
  padding: 0 .5rem .4rem 2px; overflow-wrap: break-word; }
.samples tbody th { position: sticky; left: 0; background: var(--ground); padding-right: .8rem; vertical-align: middle;
  color: var(--text); }
.samples thead th:first-child { width: 7.5rem; }
.samples img { width: 5.5rem; display: block; image-rendering: pixelated; border-radius: 2px; }
.samples.films thead th { width: 16rem; } .samples.films img { width: 16rem; }
.time td:last-child { width: 45%; min-width: 7rem; vertical-align: middle; padding-left: 1.4rem; }
.time { width: 100%; max-width: 38rem; } .bar { height: .7rem; background: var(--accent); border-radius: 2px; }
.facts span { display: inline-block; margin-right: 1.1rem; overflow-wrap: anywhere; }
.facts b { font-weight: 500; color: var(--text); }
"""


def write_report(
    path: str | os.PathLike,
    *,
    title: str,
    command: str,
    tables: Mapping[str, Sequence[Row]] = {},
    curves: Curves = {},  # noqa: B006
    along: Mapping[str, str] = {},
    images: Sequence[Samples] = (),
    heat_maps: Mapping[str, Sequence[HeatMap]] = {},
    timings: Mapping[str, float | int] = {},
    versions: Mapping[str, Any] = {},
    notes: Sequence[str] = (),
) -> Path:
    """Writes one HTML page that holds everything it shows and asks the network for nothing. Empty parts are left out.

    Args:
        title: the heading.
        command: what was typed to get this result.
        tables: caption to rows, as in `format_table`.
        curves: metric to `{stage or arm: (steps, values)}`; see `curves_from`.
        along: metric to the name of its horizontal axis, where that is not the step.
        images: samples of every model on the same prompts, or films of them.
        heat_maps: caption to maps that share a scale of colours.
        timings: seconds of wall time by stage.
        versions: as `config.versions()` returns them.
        notes: sentences, shown under the tables.
    """
    parts = [f"<h1>{_text(title)}</h1>"]
    for caption, rows in tables.items():
        parts += [f"<h2>{_text(caption)}</h2>", _table(rows)]
    if notes:
        parts.append('<ul class="soft">' + "".join(f"<li>{_text(note)}</li>" for note in notes) + "</ul>")
    parts += [_samples(samples) for samples in images]
    for caption, maps in heat_maps.items():
        parts += [f"<h2>{_text(caption)}</h2>", _heat_maps(maps)]
    if curves:
        parts += ["<h2>Curves</h2>", _curves(curves, along)]
    if timings:
        parts += ["<h2>Wall time</h2>", _timings(timings)]
    parts += ["<h2>Reproduce</h2>", f"<pre>{_text(command)}</pre>"]
    if versions:
        known = {key: value for key, value in versions.items() if value is not None and key != "command"}
        facts = "".join(f"<span>{_text(key)} <b>{_text(value)}</b></span> " for key, value in known.items())
        parts.append(f'<p class="facts soft">{facts}</p>')
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>{head}\n<title>{_text(title)}</title>\n<style>{STYLE}</style></head>'
    )
    return write_atomic(path, f"{page}\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n")


def write_summary(path: str | os.PathLike, summary: Mapping[str, Any]) -> Path:
    """Writes the numbers of a run as JSON, atomically; an `Estimate` becomes `[value, error]`."""
    return write_atomic(path, json.dumps(to_json(summary), indent=2, ensure_ascii=False) + "\n")


def _text(value: Any) -> str:
    return html.escape(str(value))


def _table(rows: Sequence[Row]) -> str:
    columns, cells, best = _layout(rows)

    def kind(i: int, j: int) -> str:
        names = " ".join(["number"] * (j > 0) + ["best"] * ((i, j) in best))
        return f' class="{names}"' if names else ""

    head = "".join(f"<th{kind(-1, j)}>{_text(name)}</th>" for j, name in enumerate(columns))
    lines = ["".join(f"<td{kind(i, j)}>{_text(c)}</td>" for j, c in enumerate(row)) for i, row in enumerate(cells)]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _samples(samples: Samples) -> str:
    head = "".join(f"<th>{_text(prompt)}</th>" for prompt in samples.prompts)
    body = ""
    for model, images in samples.models.items():
        pixels = to_uint8(np.asarray(images))[: len(samples.prompts)]
        alt = [_text(f"{model}: {prompt}") for prompt in samples.prompts]
        uris = [_data_uri(film(one), "gif") if one.ndim == 4 else _data_uri(Image.fromarray(one)) for one in pixels]
        cells = "".join(f'<td><img alt="{name}" src="{uri}"></td>' for name, uri in zip(alt, uris))
        body += f"<tr><th>{_text(model)}</th>{cells}</tr>"
    films = any(np.ndim(images) == 5 for images in samples.models.values())
    kind = "samples films" if films else "samples"
    table = f'<table class="{kind}"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<h2>{_text(samples.title)}</h2><div class="scroll">{table}</div>'


def _curves(curves: Curves, along: Mapping[str, str]) -> str:
    names = list(dict.fromkeys(name for lines in curves.values() for name in lines))
    drawn = strokes(names)
    border = lambda stroke: f"border-top:3px {stroke.dash} {stroke.color}"
    legend = "".join(f'<span><i style="{border(drawn[name])}"></i>{_text(name)}</span>' for name in names)
    plots = ""
    for metric, lines in curves.items():
        axis = along.get(metric, "step")
        light, dark = (_data_uri(_plot(metric, axis, lines, drawn, theme)) for theme in THEMES)
        source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        plots += f'<picture>{source}<img alt="{_text(metric)} by {_text(axis)}" src="{light}"></picture>'
    return f'<p class="legend soft">{legend}</p><div class="plots">{plots}</div>'


def _heat_maps(maps: Sequence[HeatMap]) -> str:
    """Side by side, on one scale of colours."""
    finite = np.concatenate([one.values[np.isfinite(one.values)] for one in maps])
    scale = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    plots = ""
    for one in maps:
        light, dark = (_data_uri(_heat_map(one, scale, theme)) for theme in THEMES)
        source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        plots += f'<picture>{source}<img alt="{_text(one.title)}" src="{light}"></picture>'
    return f'<div class="plots">{plots}</div>'


def _heat_map(one: HeatMap, scale: tuple[float, float], theme: str) -> bytes:
    text, _ = THEMES[theme]
    figure = Figure(figsize=(3.6, 2.4), layout="constrained")
    axes = figure.subplots()
    values = np.ma.masked_invalid(one.values)
    image = axes.imshow(values, aspect="auto", vmin=scale[0], vmax=scale[1], cmap="viridis", interpolation="nearest")
    axes.set_title(one.title, fontsize=10, color=text, loc="left")
    axes.set_xlabel(one.columns, fontsize=8, color=text)
    axes.set_ylabel(one.rows, fontsize=8, color=text)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    bar = figure.colorbar(image)
    bar.outline.set_visible(False)
    for part in (axes, bar.ax):
        part.tick_params(colors=text, labelsize=8, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    return _png(figure)


def _timings(timings: Mapping[str, float | int]) -> str:
    longest, total = max(timings.values()) or 1.0, sum(timings.values())
    rows = "".join(
        f'<tr><td>{_text(stage)}</td><td class="number">{format_seconds(seconds)}</td>'
        f'<td><div class="bar" style="width:{100 * seconds / longest:.1f}%"></div></td></tr>'
        for stage, seconds in timings.items()
    )
    rows += f'<tr><td>total</td><td class="number">{format_seconds(total)}</td><td></td></tr>'
    return f'<table class="time">{rows}</table>'
