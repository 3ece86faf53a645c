"""A finished run's model as a directory that transformers, diffusers or PEFT load, with a card that says what it is.

    python experiments/export.py WORKDIR OUT [--stage=uni_opd_multi_seed0]

| experiment | OUT |
| --- | --- |
| `reasoning`, `uni_opd`, `dp` | a Hugging Face model with its tokenizer; what a student learnt as LoRA is merged |
| `flow_opd`, `scenes_base` | `transformer`, as of a diffusers pipeline; beside it a student's adapter, for both |
| `flow_opd` on a pipeline | the student's adapter alone, for that pipeline |
| `vla` on a directory of OpenVLA | such a directory, with its tokenizer and statistics |

Nothing is trained and nothing of a run is changed; OUT appears whole or not at all. No parameter goes to a device: each
is read from its file, merged and written on the host, one at a time.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from configs import domains_models, dp_models
from experiments import domains, reasoning_models, reasoning_stores, scenes, stages
from experiments.recipes import arm_recipe
from opd_jax import config as config_lib
from opd_jax.checkpoint import open_params
from opd_jax.config import ConfigError, write_atomic
from opd_jax.models import lora
from opd_jax.models.decoder import Decoder
from opd_jax.models.hf import (
    load_decoder,
    load_gpt2,
    load_openvla,
    load_vlm,
    mmdit_of,
    save_decoder,
    save_gpt2,
    save_lora,
    save_mmdit,
    save_openvla,
    save_vlm,
)
from opd_jax.models.vlm import Marks
from opd_jax.worlds import domains as domains_world
from opd_jax.worlds import functions as functions_world
from opd_jax.worlds import reasoning as reasoning_world

_STAGE = flags.DEFINE_string("stage", None, "Stage to export; default the run's main student.")


class Source(NamedTuple):
    """A kind of model, and how it is written."""

    module: Any
    base: Callable[[], Any]  # the parameters that an adapter belongs to
    save: Callable[..., Any]  # (module, params, directory, like=)
    like: str = ""  # a directory with the tokenizer
    save_tokenizer: Callable[[Path], Any] | None = None  # where there is none


def language_source(config) -> Source:
    path = config.student.path
    return of_directory(path) if path else of_world(config)


def of_directory(path: str) -> Source:
    """A model of the kind that the student's own directory holds."""
    kind = json.loads((Path(path) / "config.json").read_text()).get("model_type")
    load, save = {"gpt2": (load_gpt2, save_gpt2), "qwen3_vl": (load_vlm, save_vlm)}.get(
        kind, (load_decoder, save_decoder)
    )
    module, params = load(path, dtype=np.float32, lazy=True)
    return Source(module, lambda: params, save, like=path)


def of_world(config) -> Source:
    """A student of an embedded world."""
    if config.experiment == "uni_opd":
        words = domains_world.WORDS
        marks = Marks(words.index("<"), words.index(">"), domains_world.IMAGE, domains_world.UNK)
        module = domains.module_of(domains_models.get_config().models.student.model).clone(marks=marks)
        return Source(module, _shipped("domains_student"), save_vlm, save_tokenizer=domains_world.save_tokenizer)
    if config.experiment == "dp":
        module = Decoder(**dp_models.get_config().models.student.model)
        return Source(
            module, _shipped("functions_student"), save_decoder, save_tokenizer=functions_world.save_tokenizer
        )
    module = reasoning_stores.world_module("student", config.student)
    base = _random if config.student.layers else _shipped("reasoning_student")
    return Source(module, base, save_decoder, save_tokenizer=reasoning_world.save_tokenizer)


def _random() -> Any:
    raise ConfigError("an adapter of a random student: its base is in no file; export a student that is trained whole")


def _shipped(name: str) -> Callable[[], Any]:
    return lambda: reasoning_models.load(stages.SHIPPED / f"{name}.safetensors").params


def write_language(config, params, out: Path, found: dict[str, Path]) -> str:
    """A Hugging Face directory; returns the library that reads it."""
    source, adapter = language_source(config), is_adapter(params)
    if adapter:
        params = lora.merge_lazily(source.base(), params, config.opd.lora_scale)
    source.save(source.module, params, out, **({"like": source.like} if source.like else {}))
    if source.save_tokenizer:
        source.save_tokenizer(out)
    return "transformers"


def write_flow(config, params, out: Path, found: dict[str, Path]) -> str:
    """A diffusers transformer, and beside it the adapter where that is what was trained."""
    if config.get("world") == "pipeline":
        path = Path(config.pipeline.path).expanduser()
        save_lora(mmdit_of(path / "transformer"), params, config.lora.scale, out, base=str(path))
        return "diffusers"
    module, adapter = scenes.module(config), is_adapter(params)
    backbone = params
    if adapter:
        backbone = reasoning_models.load(found.get("random_base", stages.SHIPPED / "scenes_base.safetensors")).params
    save_mmdit(module, backbone, out / "transformer")
    if adapter:
        save_lora(module, params, config.lora.scale, out, base="transformer")
    return "diffusers"


def write_vla(config, params, out: Path, found: dict[str, Path]) -> str:
    """A student that began with a directory of OpenVLA."""
    path = Path(config.student.path).expanduser()
    model = load_openvla(path, horizon=config.policy.horizon, ignore_head=True, dtype=np.float32, lazy=True)
    save_openvla(model._replace(params=params), out, like=path)
    return "transformers"


WRITERS = {
    "reasoning": write_language,
    "uni_opd": write_language,
    "dp": write_language,
    "flow_opd": write_flow,
    "scenes_base": write_flow,
    "vla": write_vla,
}


def check_writer(config) -> None:
    """Refuses what no other library has a form for: policies of our own."""
    own = config.experiment == "vla" and not config.get("student", {}).get("path")
    if config.experiment not in WRITERS or own:
        known = f"{', '.join(WRITERS)}, the last with a student.path"
        raise ConfigError(f"experiment={config.experiment}: no other library loads its models; of {known}")


def as_trained(config, stage: str):
    """The config with `opd` as it was for the arm of a stage."""
    name = stage.rsplit("_seed", 1)[0]
    if name not in config.get("arms", {}):
        return config
    own = config.copy_and_resolve_references()
    with own.unlocked():
        own.opd = arm_recipe(config, name)
    return own


def is_adapter(params) -> bool:
    return all(isinstance(leaf, dict) and leaf.keys() == {"a", "b"} for leaf in params.values())


def finished(workdir: Path) -> dict[str, Path]:
    """The stages of a run that are done, by name."""
    return {path.stem.rsplit("-", 1)[0]: path for path in sorted((workdir / "stages").glob("*.safetensors"))}


def main_stage(workdir: Path, found: dict[str, Path]) -> str:
    """The stage whose parameters the summary names as the run's."""
    if not (workdir / "summary.json").exists():
        raise ConfigError(f"{workdir}: has not finished; give --stage, of {', '.join(found) or 'which there are none'}")
    wanted = json.loads((workdir / "summary.json").read_text())["params_sha256"]
    for name, path in found.items():
        if open_params(path)[1].get("params_sha256") == wanted:
            return name
    raise ConfigError(f"{workdir}: its main model is no stage of its own; give --stage, of {', '.join(found)}")


def card(config, workdir: Path, stage: str, about: dict, library: str) -> str:
    """README.md of a model: where it comes from, who taught it, on what, and what was measured."""
    versions = json.loads((workdir / "versions.json").read_text())
    rows = rows_of(workdir, stage)
    settings = config.to_dict()
    taught = {key: settings[key] for key in ("student", "teachers", "teacher", "settings") if settings.get(key)}
    asked = {key: settings[key] for key in ("problems", "data", "public_data", "suites") if settings.get(key)}
    lines = [
        "---", f"library_name: {library}", "tags:", "- on-policy-distillation", "- opd_jax", "---", "",
        f"# {stage}", "",
        f"A model of the experiment `{config.experiment}` of opd_jax, made by", "",
        f"    {versions[0]['command']}", "",
        f"with jax {versions[0]['jax']} on {versions[0]['device']}.", "",
        f"* recipe `{about['recipe']}`, parameters `{about['params_sha256']}`",
        f"* {about.get('seconds', 0):.0f} seconds, {about.get('samples', 0):,} samples of its own",
    ]  # fmt: skip
    if rows:
        lines += ["", "## What was measured", ""]
        lines += [f"* {title}: " + ", ".join(f"{key} {value}" for key, value in row.items()) for title, row in rows]
    if spent := privacy_of(config, about, rows):
        lines += ["", "## Private records", "", *spent]
    for title, part in {"Teachers and start": taught, "Data": asked}.items():
        if part:
            lines += ["", f"## {title}", "", "```json", json.dumps(part, indent=2), "```"]
    lines += ["", "All settings are in `opd_jax_config.json`.", ""]
    return "\n".join(lines)


def privacy_of(config, about: dict, rows: list[tuple[str, dict]]) -> list[str]:
    """What was spent of the private records: all that an arm has, as its row says, else what its stage alone has."""
    row = next((row for _, row in rows if "epsilon" in row), about)
    epsilon, delta = row.get("epsilon"), config.privacy.delta if row is not about else about.get("delta")
    if epsilon is None:
        return []
    if epsilon == "none":
        return ["No epsilon bounds what it tells of them: it has learnt from them without noise."]
    if not epsilon:
        return ["It has not learnt from them: epsilon 0."]
    lines = [
        f"Epsilon {epsilon:g} at delta {delta:g}, by the accountant `{config.privacy.accountant}`, where no other "
        "model of them is published: epsilons add up. Held-out records, which figures come from, are not protected."
    ]
    if config.privacy.test_seed >= 0:
        lines += ["", "NOT PRIVATE: noise and batches come from `privacy.test_seed`, which anybody can read."]
    return lines


def rows_of(workdir: Path, stage: str) -> list[tuple[str, dict]]:
    """The rows of the summary's tables about a stage's arm, with the tables' names; none of a run that goes on."""
    if not (workdir / "summary.json").exists():
        return []
    tables = json.loads((workdir / "summary.json").read_text()).get("table", [])
    tables = tables if isinstance(tables, dict) else {"table": tables}
    names = {stage, stage.rsplit("_seed", 1)[0]}
    return [
        (title, {key: value for key, value in row.items() if key != "model"})
        for title, rows in tables.items()
        for row in rows
        if row.get("model") in names
    ]


def export(workdir: Path, out: Path, stage: str | None = None) -> str:
    """Writes `out` and returns the stage it holds. Raises: ConfigError."""
    if not (workdir / "config.json").exists():
        raise ConfigError(f"{workdir}: no config.json there; give the --workdir of a run")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out}: holds something already; give a new directory")
    config, found = config_lib.load(workdir / "config.json"), finished(workdir)
    check_writer(config)
    stage = stage or main_stage(workdir, found)
    if stage not in found:
        raise ConfigError(f"--stage={stage}: not made; there are {', '.join(found) or 'none'}")
    params, about = open_params(found[stage])
    if is_adapter(params):
        params = jax.tree.map(np.asarray, params)
        if stage.startswith("private_teacher"):
            raise ConfigError(
                f"--stage={stage}: an adapter of the teacher, whose base this run has not; give a student's"
            )
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        library = WRITERS[config.experiment](as_trained(config, stage), params, part, found)
    except ValueError as error:
        raise ConfigError(f"--stage={stage}: {error}; a student's can be exported") from error
    write_atomic(part / "README.md", card(config, workdir, stage, about, library))
    shutil.copyfile(workdir / "config.json", part / "opd_jax_config.json")
    if out.exists():
        out.rmdir()
    os.replace(part, out)
    return stage


def main(argv) -> None:
    if len(argv) != 3:
        raise ConfigError("usage: python experiments/export.py WORKDIR OUT [--stage=NAME]")
    stage = export(Path(argv[1]), Path(argv[2]), _STAGE.value)
    print(f"{argv[2]}: {stage}, with a card in README.md")


if __name__ == "__main__":
    config_lib.run(main)
