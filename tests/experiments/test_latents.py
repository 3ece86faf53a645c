"""Flow-OPD on a diffusers directory: a small random Stable Diffusion 3, judges behind a server, teachers from files."""

import contextlib
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "models"))

from tiny_sd3 import make_pipeline

from configs import flow_opd
from experiments import export, flow_methods, latents, stages
from experiments import flow_opd as experiment
from opd_jax import config as config_lib
from opd_jax import rng
from opd_jax.config import ConfigError
from opd_jax.metrics import read_metrics
from opd_jax.models import lora
from opd_jax.models.hf import load_lora, load_mmdit, mmdit_of, save_lora
from opd_jax.rewards import remote, serve

ROOT = Path(__file__).parents[2]
TRAIN = {"geneval": "a red cat", "ocr": 'a sign "cat"', "pickscore": "blurred cats"}
TRAINED = {f"{TRAIN['geneval']}, {letter}." for letter in "abcd"}  # of the one teacher that is trained
PATTERN = r"attn/(to|add)_\w+/kernel"


def mesh_of(devices=2):
    return jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("data",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The pipeline, prompts of three tasks, and adapters of two teachers."""
    folder = tmp_path_factory.mktemp("sd3")
    peer = make_pipeline(folder / "pipeline")
    module, params = load_mmdit(folder / "pipeline" / "transformer")
    for seed, name in enumerate(("ocr", "quality")):
        adapter = lora.init(rng.stream(seed, name), params, PATTERN, 2)
        adapter = jax.tree.map(lambda x, seed=seed: x + 0.1 * (seed + 1), adapter)
        save_lora(module, adapter, 2.0, folder / name)
    (folder / "ocr" / "adapter_model.safetensors").unlink()  # diffusers' file alone
    for task, text in TRAIN.items():
        for split, letters in (("train", "abcd"), ("test", "xyz")):
            lines = [f"{text}, {letter}." for letter in letters]
            if task == "geneval":
                lines = [json.dumps({"prompt": line, "tag": task}) for line in lines]
            (folder / f"{task}_{split}.{'jsonl' if task == 'geneval' else 'txt'}").write_text("\n".join(lines) + "\n\n")
    return folder, peer


def paper(folder, url="http://127.0.0.1:1", **teachers):
    """The config of the paper at this size, with two teachers given, or those of `teachers`."""
    config = flow_opd.get_config("paper").unlock()
    config.pipeline.update({"path": str(folder / "pipeline"), "embeddings": str(folder / "embeddings")})
    config.pipeline.update({"resolution": 24, "max_sequence_length": 12, "dtype": "float32", "pictures": 2})
    config.pipeline.encoders.stored = "float32"
    for task, files in config.pipeline.prompts.items():
        kind = "jsonl" if task == "geneval" else "txt"
        files.update({split: str(folder / f"{task}_{split}.{kind}") for split in ("train", "test")})
    for name, path in (teachers or {"ocr": folder / "ocr", "quality": folder / "quality"}).items():
        config.teachers[name].path = str(path)
    server = {"kind": "http", "url": url, "batch_size": 64, "patience": 0, "attempts": 1}
    for name, parts in (("geneval", "g"), ("ocr", "o"), ("quality", "dp")):
        config.judges[name] = {"weights": dict.fromkeys(parts, 0.5), "rewards": dict.fromkeys(parts, server)}
    config.lora.rank = 2
    config.sampler.steps = 4
    config.grpo.update({"steps": 2, "prompts": 2, "group": 2, "micro_batches": 1, "warmup": 0})
    config.grpo.flow_grpo.window = 3
    config.opd.update({"steps": 2, "prompts": 2, "group": 2, "micro_batches": 2, "warmup": 0})
    config.eval.update({"prompts": 2, "steps": 3})
    config.update({"save_every": 1, "compile_quickly": True})
    config_lib.keep_arms(config)
    return config.lock()


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """The folder of a whole run, what its server was asked, which likes bright pictures, and what was printed.

    The server dies at the first picture of training, in the middle of an update, and comes back.
    """
    folder, workdir, asked, said = folder[0], tmp_path_factory.mktemp("runs") / "run", [], io.StringIO()
    servers, dies = [], threading.Event()

    def scorer(images, prompts, metadata):
        if not dies.is_set() and TRAINED & set(prompts):
            dies.set()
            threading.Thread(target=come_back, daemon=True).start()
        if len(servers) == 1 and dies.is_set():
            raise RuntimeError("dying")
        asked.extend(zip(prompts, metadata, [image.shape for image in images]))
        return [float(image.mean() / 255) for image in images]

    def serve_at(port):
        servers.append(serve.Server(scorer, ("127.0.0.1", port), name="bright", version="1"))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return servers[-1].server_port

    def come_back():
        servers[0].shutdown()
        servers[0].server_close()
        time.sleep(0.5)
        serve_at(servers[0].server_port)

    config, mesh = paper(folder, f"http://127.0.0.1:{serve_at(0)}").unlock(), mesh_of()
    for judge in config.judges.values():
        for part in judge.rewards.values():
            part.patience = 60
    config.pipeline.update({"dtype": "bfloat16", "embeddings": str(folder / "in_bfloat16")})
    config.pipeline.encoders.stored = "bfloat16"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        experiment.validate(config, mesh)
        config_lib.prepare_workdir(workdir, config, resume=False)
        with contextlib.redirect_stdout(said):
            experiment.run(config, workdir, mesh)
    servers[-1].shutdown()
    servers[-1].server_close()
    return workdir, asked, said.getvalue()


def test_the_whole_method(finished):
    """A teacher by Flow-GRPO, two from files, their merge, a student, the table."""
    workdir, asked, _ = finished
    summary = json.loads((workdir / "summary.json").read_text())
    rows = {row["model"]: row for row in summary["table"]}
    teachers = [f"teacher: {name}" for name in ("geneval", "ocr", "quality")]
    assert list(rows) == ["base", *teachers, "cold start (merge)", "flow_opd"]
    assert {"geneval ↑", "ocr ↑", "quality ↑", "average ↑", "quality: d ↑", "quality: p ↑"} <= rows["base"].keys()
    assert len({row["average ↑"] for row in rows.values()}) == len(rows), "every model draws other pictures"
    for row in rows.values():
        parts = row["quality: d ↑"] + row["quality: p ↑"]  # of weight 0.5 each
        np.testing.assert_allclose(parts, 2 * row["quality ↑"], rtol=1e-5)
        rewards = [row[f"{name} ↑"] for name in ("geneval", "ocr", "quality")]
        np.testing.assert_allclose(row["average ↑"], np.mean(rewards), rtol=1e-5)
    for stage in ("grpo_geneval", "flow_opd_seed0"):
        lines = read_metrics(workdir, stage)
        assert len(lines) == 2
        assert all(np.isfinite(value) for line in lines for value in line.values() if not isinstance(value, str))
    assert len(read_metrics(workdir)) == 4, "given teachers are not trained"
    assert "data:image/png" in (workdir / "report.html").read_text()

    texts = {text for text, *_ in asked} - {remote.SQUARE.prompt}
    judged = {"geneval": "abcdxyz", "ocr": "xyz", "pickscore": "xyz"}  # one teacher alone was trained by rewards
    assert texts <= {f"{TRAIN[task]}, {letter}." for task, letters in judged.items() for letter in letters}
    assert {shape for text, _, shape in asked if text in texts} == {(24, 24, 3)}
    tags = {text: about and about["tag"] for text, about, _ in asked if text in texts}
    assert all(tag == ("geneval" if text.startswith("a red cat") else None) for text, tag in tags.items())


def test_a_run_waits_for_a_server_that_dies_and_loses_nothing(finished):
    workdir, asked, said = finished
    assert "down since" in said and "up again after" in said
    assert not any((workdir / "unscored").rglob("*.npz")), "what was kept meanwhile is scored"
    trained = [text for text, *_ in asked if text in TRAINED]
    recipe = config_lib.load(workdir / "config.json").grpo
    assert len(trained) == recipe.steps * recipe.prompts * recipe.group, "every picture once"


def test_a_student_is_exported_as_an_adapter_of_the_pipeline(finished, folder, tmp_path):
    workdir, *_ = finished
    student = export.export(workdir, tmp_path / "out")
    assert student == "flow_opd_seed0"
    assert not (tmp_path / "out" / "transformer").exists(), "it is the user's own"
    made = stages.load(export.finished(workdir)[student])
    again = load_lora(tmp_path / "out", mmdit_of(folder[0] / "pipeline" / "transformer"), 2.0)
    jax.tree.map(np.testing.assert_array_equal, again, dict(made.params))


@pytest.mark.slow
def test_a_stage_draws_prompts_of_the_files(finished):
    workdir, *_ = finished
    command = [sys.executable, "experiments/sample.py", str(workdir), "--count=2", "--steps=2"]
    draw = lambda prompt: subprocess.run([*command, prompt], cwd=ROOT, capture_output=True, text=True)
    done = draw("a red cat, x.")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (workdir / "samples" / "flow_opd_seed0.png").read_bytes().startswith(b"\x89PNG")
    done = draw("a green cat")
    assert done.returncode == 2
    assert "prompt 'a green cat': its embedding is not stored" in done.stderr


def test_pictures_of_the_base_are_those_of_diffusers(folder):
    folder, peer = folder
    config = paper(folder)
    world = latents.Pipeline(config, None, mesh_of(), {})
    texts = ["a red cat, a.", 'a sign "cat", x.', "blurred cats, y."]
    found = world.pictures({}, texts, **experiment.sampler(config) | {"steps": 40})
    keys = rng.per_record(rng.stream(config.eval.seed, "pictures"), 4)
    noise = np.asarray(jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), (6, 6, 4)))(keys))
    sizes = {"height": 24, "width": 24, "num_inference_steps": 40, "max_sequence_length": 12, "guidance_scale": 4.5}
    starts = torch.tensor(noise[:3]).permute(0, 3, 1, 2)
    expected = peer(texts, latents=starts, output_type="np", **sizes).images
    assert found.dtype == np.uint8
    np.testing.assert_allclose(found, 255 * expected, rtol=0, atol=0.5 + 0.255)  # of rounding, and 1e-3
    assert expected.std() > 0.05
    rows = world.condition([world._row[text] for text in [*texts, texts[-1]]])
    rows = jax.tree.map(jnp.asarray, rows)
    flowed = latents._latents(world.shape, 40, 3.0, True, world.velocity, {}, rows, keys)
    pictures = np.asarray(world.decode(flowed))[:3] / 2 + 0.5
    np.testing.assert_allclose(pictures, expected, rtol=0, atol=1e-3)


def test_teachers_are_guided_as_the_student(folder):
    """A record by the adapter of its task is the record by that adapter alone, guidance included."""
    folder, _ = folder
    world = latents.Pipeline(paper(folder), None, mesh_of(), {})
    adapters = [load_lora(folder / name, world.model, 2.0) for name in ("ocr", "quality")]
    condition = jax.tree.map(jnp.asarray, world.condition([0, 1, 2, 5]))
    task, t = jnp.array([1, 0, 0, 1]), jnp.array([0.2, 0.5, 0.7, 0.9])
    x = jax.random.normal(jax.random.key(0), (4, *world.shape))
    both, alone, apply = map(jax.jit, (world.routed, world.velocity, world.model.apply))
    routed = both(adapters, x, t, (condition, task))
    for index, adapter in enumerate(adapters):
        mine = np.flatnonzero(task == index)
        np.testing.assert_allclose(routed[mine], alone(adapter, x, t, condition)[mine], atol=2e-5)
    base = alone({}, x, t, condition)
    assert np.abs(routed - base).max() > 1e-2
    merged = lora.merge(world.base.params, adapters[0], 2.0)
    halves = [apply({"params": merged}, x, t, *rows) for rows in ((condition[1:]), null_of(world, 4))]
    np.testing.assert_allclose(
        alone(adapters[0], x, t, condition), halves[1] + 4.5 * (halves[0] - halves[1]), atol=1e-4
    )


def null_of(world, count):
    return [jnp.repeat(leaf, count, axis=0) for leaf in world._stored.null]


def test_teachers_are_trained_as_published():
    """All steps are stochastic and the first nine are trained; in the fast recipe a window of steps is both."""
    world = types.SimpleNamespace(shape=(64, 64, 16), velocity=None)
    how = lambda config: flow_methods.grpo_method(world, ("ocr",), None, config, config.grpo, None).sample.args[0]
    sampling = how(flow_opd.get_config("paper"))
    assert sampling == flow_methods.Sampling("sde", 10, 3.0, True, 0.7, world.shape, 24, parts=144)
    config = flow_opd.get_config().unlock()
    config.grpo.method = "flow_grpo"
    assert how(config).window == config.grpo.flow_grpo.window == 3


def test_batches_hold_the_prompts_of_their_tasks(folder):
    world = latents.Pipeline(paper(folder[0]), None, mesh_of(), {})
    batch = next(world.prompts(("ocr", "geneval"), 8, 0))
    texts = world.texts(batch["condition"])
    assert all(text.startswith(TRAIN[("ocr", "geneval")[task]]) for text, task in zip(texts, batch["task"]))
    assert all(text[-2] in "abcd" for text in texts)
    expected = world.condition([world._row[text] for text in texts])
    jax.tree.map(np.testing.assert_array_equal, batch["condition"], expected)


def refusal(config):
    with pytest.raises(ConfigError) as error:
        experiment.validate(config, mesh_of())
    return str(error.value).splitlines()


def test_the_paper_says_what_is_to_be_given():
    lines = "\n".join(refusal(flow_opd.get_config("paper")))
    for part in (
        "pipeline.path='': no model_index.json there",
        "pipeline.prompts.geneval.train='': give a file",
        "pipeline.prompts.pickscore.test='': give a file",
        "PickScore_v1",
    ):
        assert part in lines


REFUSED = [
    ({"sampler.shift": 2.0}, "sampler.shift=2.0, sampler.double_shift=True: the scheduler of .* has 3.0, True"),
    ({"eval.double_shift": False}, "eval.shift=3.0, eval.double_shift=False: the scheduler"),
    ({"pipeline.resolution": 20}, "pipeline.resolution=20: give a multiple of 8, at most 64"),
    ({"pipeline.resolution": 72}, "pipeline.resolution=72: give a multiple of 8, at most 64"),
    ({"pipeline.dtype": "int8"}, "pipeline.dtype='int8': choose one of float32, bfloat16"),
    ({"pipeline.encoders.stored": "int8"}, "pipeline.encoders.stored='int8': choose one of"),
    ({"pipeline.max_sequence_length": 513}, "pipeline.max_sequence_length=513: choose 1 to 512"),
    ({"pipeline.pictures": 0}, "pipeline.pictures=0: give at least 1"),
    ({"shipped": True}, "shipped=True: its weights are of the scenes world"),
    ({"tasks": ("geneval", "nobody")}, "tasks: 'nobody' has no teacher"),
    ({"teachers.ocr.path": "/nowhere"}, "teachers.ocr.path: /nowhere: holds no adapter"),
    ({"lora.pattern": "attn/to_q/kernel"}, "teachers.quality.path: adapts .* set lora.pattern to the teachers'"),
    ({"pipeline.prompts.ocr.test": ""}, "pipeline.prompts.ocr.test='': give a file of prompts"),
    ({"pipeline.prompts.ocr.train": "/nowhere.txt"}, "/nowhere.txt: cannot be read"),
    ({"teachers.geneval.prompts": ("posters",)}, r"geneval.prompts=\('posters',\): choose of"),
    ({"teachers.geneval.rewards": ("",)}, r"geneval.rewards=\(''?,\): choose of"),
    ({"grpo.warm_start.steps": 5}, "geneval.warm_start.steps: a pipeline's prompts have no clean pictures"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[" ".join(change) for change, _ in REFUSED])
def test_what_is_wrong_is_one_line(folder, change, message):
    config = paper(folder[0]).copy_and_resolve_references().unlock()
    config.update_from_flattened_dict(change)
    lines = refusal(config)
    assert any(re.search(message, line) for line in lines), lines


def test_a_config_without_mistakes_is_not_refused(folder):
    experiment.validate(paper(folder[0]), mesh_of())


def test_prompts_that_cannot_be_used_are_refused(folder, tmp_path):
    folder = folder[0]
    config = paper(folder).copy_and_resolve_references().unlock()
    file = tmp_path / "prompts.jsonl"
    config.pipeline.prompts.pickscore.test = str(file)
    for content, message in (
        ("\n\n", "holds no prompts"),
        ('{"prompt": "a cat"}\n{"text": "a dog"}\n', 'line 2: no JSON object with a text "prompt"'),
        ('{"prompt": "A  sign \\"cat\\", b. "}\n', r"pickscore.test: 1 are trained on, such as 'A  sign"),
        ('{"prompt": "a red cat, a.", "tag": "other"}\n', "has other metadata before"),
    ):
        file.write_text(content)
        lines = refusal(config)
        assert any(re.search(message, line) for line in lines), lines
    config = paper(folder).copy_and_resolve_references().unlock()
    config.pipeline.prompts.more = {"train": str(folder / "ocr_train.txt"), "test": ""}
    assert any("pipeline.prompts.more: no teacher has these prompts" in line for line in refusal(config))


def test_directories_that_do_not_fit_are_refused(folder, tmp_path, monkeypatch):
    """Files that are absent, parts of another model, no torch."""
    folder = folder[0]
    config = paper(folder).copy_and_resolve_references().unlock()
    copy = tmp_path / "pipeline"
    latents_of = lambda name: json.loads((folder / "pipeline" / name).read_text())

    def fresh():
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder / "pipeline", copy)

    config.pipeline.path, config.pipeline.embeddings = str(copy), str(tmp_path / "none")
    for name, change, message in (
        ("model_index.json", {"_class_name": "FluxPipeline"}, "give a Stable Diffusion 3 or 3.5 pipeline"),
        ("transformer/config.json", {"in_channels": 8}, "8 and 4 channels, vae 4; take parts that belong together"),
        ("transformer/config.json", {"joint_attention_dim": 48}, "give a context of 40, transformer takes 48"),
        ("transformer/config.json", {"pooled_projection_dim": 8}, "give a pooled context of 20, transformer takes 8"),
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "use_dynamic_shifting=True"),
        ("vae/config.json", {"act_fn": "relu"}, "act_fn='relu'"),
    ):
        fresh()
        (copy / name).write_text(json.dumps(latents_of(name) | change))
        lines = refusal(config)
        assert any(message in line for line in lines), lines
    for name in ("transformer", "vae"):
        fresh()
        (copy / name / "diffusion_pytorch_model.safetensors").unlink()
        assert any("diffusion_pytorch_model.safetensors is absent" in line for line in refusal(config))
    fresh()
    experiment.validate(config, mesh_of())
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    assert any("holds none, and torch writes them; pip install torch" in line for line in refusal(config))
