"""What a user gives for Flow-OPD on a Stable Diffusion 3 directory: files of prompts, and all that can be wrong."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opd_jax.config import ConfigError
from opd_jax.models import attention, remat
from opd_jax.models.hf import autoencoder_of, load_lora, load_shift, mmdit_of, text_embeddings, text_encoders
from opd_jax.models.hf import mmdit as hf_mmdit
from opd_jax.models.hf.tensor_files import TensorFiles, read_json

DTYPES = ("float32", "bfloat16")
CLIP_FOLDERS = ("text_encoder", "text_encoder_2")


class Prompts(NamedTuple):
    """The prompts of all tasks, without doubles, and where those of each are among them."""

    texts: list[str]
    metadata: list[dict | None]  # what a judge needs beside the text
    rows: dict[str, dict[str, np.ndarray]]  # of a task's "train" and "test"


def read_prompts(config) -> Prompts:
    """Of all files of `pipeline.prompts`; a prompt's row is where it stands first. Raises: ConfigError, of a file."""
    rows: dict[str, int] = {}
    metadata: list[dict | None] = []
    found = {}
    for task, files in config.pipeline.prompts.items():
        found[task] = {}
        for split in ("train", "test"):
            for line, (text, about) in enumerate(read_file(files[split]) if files[split] else [], 1):
                if rows.setdefault(text, len(rows)) == len(metadata):
                    metadata.append(about)
                elif about is not None and metadata[rows[text]] not in (None, about):
                    raise ConfigError(f"{files[split]}: prompt {line}, {text!r}, has other metadata before; keep one")
                elif about is not None:
                    metadata[rows[text]] = about
                found[task].setdefault(split, []).append(rows[text])
            found[task][split] = np.array(found[task].get(split, []), np.int32)
    return Prompts(list(rows), metadata, found)


def read_file(path: str) -> list[tuple[str, dict | None]]:
    """A prompt a line; of `.jsonl` the key "prompt", with the line as metadata. Empty lines count for nothing.

    Raises:
        ConfigError: no such file, no prompt in it, or a line that has none.
    """
    file = Path(path).expanduser()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give a text file of prompts") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        about = None
        if file.suffix == ".jsonl":
            try:
                about = json.loads(line)
                line = about["prompt"].strip()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f'{path}, line {number}: no JSON object with a text "prompt"') from error
            about = about if about.keys() > {"prompt"} else None
        prompts.append((line.strip(), about))
    if not prompts:
        raise ConfigError(f"{path}: holds no prompts; give one a line")
    return prompts


def judged_on(config) -> dict[str, list[str]]:
    """The tasks that each reward is of, as the teachers have them."""
    found: dict[str, list[str]] = {}
    for part in config.teachers.values():
        for task, name in zip(part.prompts, part.rewards):
            if name and task not in found.setdefault(name, []):
                found[name].append(task)
    return found


def judged_tasks(config) -> set[str]:
    return {task for tasks in judged_on(config).values() for task in tasks}


def mistakes(config) -> list[str]:
    """What is wrong with directory, prompts and adapters, a line each; no weights are read but the adapters'."""
    part, path, lines = config.pipeline, Path(config.pipeline.path).expanduser(), []

    def attempt(read) -> Any:
        """What it reads, or None and a line."""
        try:
            return read()
        except ValueError as error:  # of configs and of files
            lines.append(str(error).splitlines()[0])

    if config.shipped:
        lines.append("shipped=True: its weights are of the scenes world; set False")
    encoders = part.encoders
    for name, value, known in (
        ("dtype", part.dtype, DTYPES),
        ("encoders.dtype", encoders.dtype, text_embeddings.DTYPES),
        ("encoders.stored", encoders.stored, text_embeddings.DTYPES),
    ):
        if value not in known:
            lines.append(f"pipeline.{name}={value!r}: choose one of {', '.join(known)}")
    if wrong := remat.mistake(part.remat):
        lines.append(f"pipeline.{wrong}")
    if part.dtype in DTYPES and (wrong := attention.mistake(part.attention, part.dtype)):
        lines.append(f"pipeline.{wrong}")
    if not 1 <= part.max_sequence_length <= (longest := text_encoders.LONGEST):
        lines.append(f"pipeline.max_sequence_length={part.max_sequence_length}: choose 1 to {longest}")
    if part.pictures < 1:
        lines.append(f"pipeline.pictures={part.pictures}: give at least 1")
    for name, own in {**config.teachers, "grpo_mix": config.grpo_mix}.items():
        if own.get("warm_start", config.grpo.warm_start).steps:
            lines.append(f"{name}.warm_start.steps: a pipeline's prompts have no clean pictures; set 0")
    prompts = _mistakes_of_prompts(config, lines, attempt)
    if not (path / "model_index.json").is_file():
        where = f"pipeline.path={part.path!r}: no model_index.json there"
        return [*lines, f"{where}; give a diffusers directory of Stable Diffusion 3 or 3.5"]
    attempt(lambda: text_encoders.encoder_folders(path))
    model, autoencoder = attempt(lambda: mmdit_of(path / "transformer")), attempt(lambda: autoencoder_of(path / "vae"))
    for folder in ("transformer", "vae"):
        attempt(lambda folder=folder: TensorFiles(path / folder, hf_mmdit.WEIGHTS))
    shift = attempt(lambda: load_shift(path / "scheduler"))
    for name in ("sampler", "eval") if shift is not None else ():
        own = config[name]
        if own.shift != shift or not own.double_shift:
            given = f"{name}.shift={own.shift}, {name}.double_shift={own.double_shift}"
            lines.append(f"{given}: the scheduler of {path} has {shift}, True; give those")
    if model and autoencoder:
        lines += _mistakes_of_sizes(part, model, autoencoder, path)
    if model:
        for name, own in config.teachers.items():
            if own.get("path"):
                _mistakes_of_adapter(name, own.path, config, model, lines, attempt)
    stored = list(Path(part.embeddings).expanduser().glob("shard-*"))
    if prompts and not stored and not importlib.util.find_spec("torch"):
        lines.append(f"pipeline.embeddings={part.embeddings!r}: holds none, and torch writes them; pip install torch")
    return list(dict.fromkeys(lines))


def _mistakes_of_prompts(config, lines: list[str], attempt) -> Prompts | None:
    wanted = {task for part in config.teachers.values() for task in part.prompts} | set(config.tasks)
    trained = {task for part in config.teachers.values() if not part.get("path") for task in part.prompts}
    trained |= set(config.tasks) | (set(config.grpo_mix.prompts) if config.grpo_mix.steps else set())
    for task, files in config.pipeline.prompts.items():
        given = [split for split in ("train", "test") if files[split]]
        if given and task not in wanted:
            lines.append(f"pipeline.prompts.{task}: no teacher has these prompts; name them in a teacher, or leave out")
        for split in ("train", "test"):
            if split not in given and task in (trained if split == "train" else judged_tasks(config)):
                lines.append(f"pipeline.prompts.{task}.{split}='': give a file of prompts")
    before = len(lines)
    prompts = attempt(lambda: read_prompts(config))
    if len(lines) > before:
        return None
    same = lambda row: " ".join(prompts.texts[row].split()).casefold()
    train = {same(row) for rows in prompts.rows.values() for row in rows["train"]}
    for task, rows in prompts.rows.items():
        if both := [row for row in rows["test"] if same(row) in train]:
            example = prompts.texts[both[0]]
            lines.append(f"pipeline.prompts.{task}.test: {len(both)} are trained on, such as {example!r}; remove them")
    return prompts


def _mistakes_of_sizes(part, model, autoencoder, path: Path) -> list[str]:
    lines, unit = [], autoencoder.downscale * model.patch_size
    largest = unit * model.pos_embed_max_size
    if part.resolution % unit or not 0 < part.resolution <= largest:
        lines.append(f"pipeline.resolution={part.resolution}: give a multiple of {unit}, at most {largest}")
    if not model.in_channels == model.out_channels == autoencoder.latent_channels:
        channels = f"{model.in_channels} and {model.out_channels} channels, vae {autoencoder.latent_channels}"
        lines.append(f"{path}: transformer has {channels}; take parts that belong together")
    try:
        width = text_encoders.context_width(path)
        pooled = sum(read_json(path / folder / "config.json")["projection_dim"] for folder in CLIP_FOLDERS)
    except ValueError as error:
        return [*lines, str(error)]
    for what, own, wanted in (
        ("a context", width, model.joint_attention_dim),
        ("a pooled context", pooled, model.pooled_projection_dim),
    ):
        if own != wanted:
            lines.append(f"{path}: text encoders give {what} of {own}, transformer takes {wanted}")
    return lines


def _mistakes_of_adapter(name: str, given: str, config, model, lines: list[str], attempt) -> None:
    before = len(lines)
    adapter = attempt(lambda: load_lora(Path(given).expanduser(), model, config.lora.scale))
    lines[before:] = [f"teachers.{name}.path: {line}" for line in lines[before:]]
    if adapter is None:
        return
    pattern = config.lora.pattern
    wanted = {path for path in hf_mmdit.shapes_of(model) if re.search(pattern, path)}
    if odd := sorted(adapter.keys() ^ wanted):
        lines.append(
            f"teachers.{name}.path: adapts {len(adapter)} matrices, lora.pattern={pattern!r} finds {len(wanted)}, and "
            f"only one of them {odd[0]}; set lora.pattern to the teachers', which are merged"
        )
