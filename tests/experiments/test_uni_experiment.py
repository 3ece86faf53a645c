"""Uni-OPD's experiment: what goes into a batch, what is refused, and a user's own directories, end to end."""

import json
import math
from collections import Counter

import jax
import numpy as np
import pytest
from serving import serving

from configs import domains_models, uni_opd
from experiments import domains, language, multimodal, reasoning_models, stages, uni_methods, uni_setup
from experiments import domains_models as pretraining
from experiments import uni_opd as experiment
from experiments.language import Problems
from experiments.recipes import arm_recipe
from experiments.uni_stages import Experiment
from opd_jax.config import ConfigError
from opd_jax.metrics import read_metrics
from opd_jax.models.hf import save_vlm
from opd_jax.models.vlm import Marks
from opd_jax.worlds import domains as world

MESH = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))


def config_of(variant="tiny", **changes):
    config = uni_opd.get_config(variant).copy_and_resolve_references()
    with config.unlocked():
        for key, value in changes.items():
            *path, last = key.split(".")
            part = config
            for name in path:
                part = part[name]
            part[last] = value
    return config


def test_a_batch_has_as_many_prompts_of_every_domain():
    problems = Problems([np.array([i + 1]) for i in range(7)], list(range(7)), [0] * 5 + [1] * 2)
    iterator = uni_methods.bundles(problems, [[0, 1, 2, 3, 4, 4], [5, 6]], 4, 3, 0, MESH)
    seen = Counter()
    for _ in range(3):
        batch = next(iterator)
        np.testing.assert_array_equal(np.asarray(batch["task"]), [0, 1, 0, 1])
        np.testing.assert_array_equal(batch["tokens"][:, 0], batch["index"] + 1)
        seen.update(np.asarray(batch["index"]).tolist())
    assert seen == {0: 1, 1: 1, 2: 1, 3: 1, 4: 2, 5: 3, 6: 3}  # an epoch of the larger domain


def test_a_prompt_shows_its_own_picture():
    generator = np.random.default_rng(0)
    asked = [world.draw(generator, name, 2) for name in ("mathematics", "charts", "code", "documents")]
    problems, bank = domains.as_problems(asked, first_picture=1), domains.bank_of([asked[1], *asked])
    first = len(world.WORDS) + domains.VISUAL_TOKENS * np.arange(3)
    for ids, start in ((problems.ids[1], first[1]), (problems.ids[3], first[2])):
        np.testing.assert_array_equal(ids[: domains.VISUAL_TOKENS], start + np.arange(domains.VISUAL_TOKENS))
    assert all((problems.ids[i] < len(world.WORDS)).all() for i in (0, 2))
    assert bank.patches.shape == (3, 4 * domains.VISUAL_TOKENS, 48)
    np.testing.assert_array_equal(bank.patches[0], bank.patches[1])
    assert problems.tasks == [0, 3, 1, 4]


def test_packed_rows_hold_whole_solutions_and_no_more_pictures_than_fit():
    generator = np.random.default_rng(1)
    charts = domains.draw("charts", 4, 0, (1, 2))
    row = domains.training_row(generator, 256, 2, ("charts", "logic"), ("steps",), (1, 2), {"charts": (charts, 0)})
    visual = row["tokens"] >= len(world.WORDS)
    assert visual.sum() in (0, 16, 32) and not (visual & row["response"]).any()
    for segment in range(1, row["segment_ids"].max() + 1):
        here = row["tokens"][(row["segment_ids"] == segment) & row["response"]]
        assert here[-1] == world.EOS and (here[:-1] != world.EOS).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"opd.margin": "shove"}, "margin='shove'.*choose one of shift"),
        ({"opd.batch_size": 7}, "give a multiple of its 2 domains"),
        ({"opd.batch_size": 7}, "batch_size=7: does not split over 2 devices"),
        ({"opd.group": 1}, "outcomes are compared within a prompt"),
        ({"opd.setting": "none"}, "setting='none'.*choose one of"),
        ({"settings.multi.charts": "text"}, "reads no pictures"),
        ({"settings.multi.code": "nobody"}, "choose of"),
        ({"sampler.slots": 3}, "sampler.slots"),
        ({"problems.path": "mine.jsonl"}, "student.path=''.*give a Hugging Face directory"),
        ({"balancing.shape": "w"}, "balancing.shape='w'"),
        ({"balancing.top_p": 2.0}, "balancing.top_p=2.0"),
        ({"balancing.cap": 0}, "balancing.cap=0"),
        ({"balancing.samples": 0}, "balancing.samples=0"),
        ({"problems.levels": ()}, "problems.levels="),
        ({"problems.count": 0}, "problems.count=0"),
        ({"eval.problems": 0}, "eval.problems=0"),
        ({"student.path": "/nowhere"}, "student.path=/nowhere: problems.path='' are of the embedded world"),
        ({"settings.multi": {}}, r"settings.multi=\{\}: give teachers by domain"),
        ({"opd.label_parts": 0}, "label_parts=0"),
        ({"opd.widths": ("a",)}, "widths="),
        ({"opd.steps": 0}, "steps=0 .*give 1 or more"),
        ({"opd.decay_steps": 5}, "give 5 or more, warmup"),
        ({"seeds": ()}, "seeds="),
    ],
)
def test_a_wrong_config_is_refused_with_the_remedy(changes, message):
    with pytest.raises(ConfigError, match=message):
        experiment.validate(config_of(**changes), MESH)


@pytest.mark.parametrize("variant", ("default", "full", "tiny", "seeds"))
def test_every_variant_of_the_world_is_valid(variant):
    experiment.validate(uni_opd.get_config(variant), MESH)


@pytest.mark.parametrize("variant", ("paper", "paper_vl"))
def test_the_published_settings_are_valid_with_directories(variant, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    config = config_of(variant, **{"student.path": str(tmp_path), "eval.path": "held_out.jsonl"})
    with pytest.raises(ConfigError, match=r"teachers\.mathematics\.path='': give a Hugging Face directory"):
        experiment.validate(config, MESH)
    with config.unlocked():
        for teacher in config.teachers.values():
            teacher.path = str(tmp_path)
    experiment.validate(config, MESH)


# ---- a user's directories --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A student and a teacher that read pictures, and problems of two domains, one of them with pictures."""
    folder = tmp_path_factory.mktemp("mine")
    model = domains_models.get_config("tiny").models.student.model
    module = domains.module_of(model)
    module = module.clone(marks=Marks(world.WORDS.index("<"), world.WORDS.index(">"), world.IMAGE, world.UNK))
    for seed, name in enumerate(("student", "teacher")):
        params = jax.device_get(domains.init(module, domains.bank_of([]), jax.random.key(seed)))
        save_vlm(module, params, folder / name)
        world.save_tokenizer(folder / name)
    generator, lines = np.random.default_rng(0), []
    for name in ("mathematics", "charts", "mathematics", "charts"):
        record = world.to_record(world.draw(generator, name, 1))
        lines.append(json.dumps(record | {"prompt": record["prompt"].replace("<image>", "")}))
    (folder / "problems.jsonl").write_text("\n".join(lines))
    return folder


def directories(folder, **changes):
    config = config_of(**changes)
    with config.unlocked():
        config.student.path = str(folder / "student")
        config.teachers = {"teacher": {"path": str(folder / "teacher")}}
        config.settings = {"multi": {"mathematics": "teacher", "charts": "teacher"}}
        config.verifiers = {"mathematics": "number", "charts": "number"}
        config.problems.update({"path": str(folder / "problems.jsonl"), "prompt_tokens": 40, "max_pixels": 32 * 32})
        config.eval.path = config.problems.path
        config.sampler.update({"max_new_tokens": 4, "slots": 4})
        config.opd.update({"batch_size": 2, "group": 2, "steps": 2})
        config.arms = {"uni_opd_multi": {}}
    return config


def test_own_vision_language_directories_from_problems_to_a_model(mine, tmp_path):
    config = directories(mine)
    experiment.validate(config, MESH)
    experiment.run(config, tmp_path, MESH)
    lines = read_metrics(tmp_path, "uni_opd_multi_seed0")
    assert len(lines) == 2 and all(math.isfinite(line["loss"]) for line in lines)
    assert (tmp_path / "models" / "uni_opd_multi" / "model.safetensors").exists()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [row["model"] for row in summary["table"]["multi"]] == ["student", "teacher", "uni_opd_multi"]


@pytest.mark.parametrize("divergence", ["sampled", "reverse_kl"])
def test_a_served_teacher_labels_as_the_same_one_in_this_process(mine, tmp_path, monkeypatch, divergence):
    monkeypatch.delenv("http_proxy", raising=False)
    text = [line for line in (mine / "problems.jsonl").read_text().splitlines() if "mathematics" in line]
    (tmp_path / "text.jsonl").write_text("\n".join(text))
    module, params = uni_setup.load_directory(str(mine / "teacher"), None, 0, directories(mine).compute)
    bank, losses = domains.bank_of([]), {}
    with serving(lambda tokens: module.apply({"params": params}, tokens, bank)[..., : len(world.WORDS)]) as url:
        for name, part in {"here": {"path": str(mine / "teacher")}, "served": {"path": "", "url": url}}.items():
            config = directories(mine)
            with config.unlocked():
                config.teachers = {"teacher": part}
                config.settings = {"multi": {"mathematics": "teacher"}}
                config.problems.path = config.eval.path = str(tmp_path / "text.jsonl")
                config.arms = {"sampled": {"divergence": divergence}}
            if divergence != "sampled" and name == "served":
                with pytest.raises(ConfigError, match="teacher teacher is served"):
                    experiment.validate(config, MESH)
                return
            experiment.validate(config, MESH)
            (tmp_path / name).mkdir()
            experiment.run(config, tmp_path / name, MESH)
            losses[name] = [line["loss"] for line in read_metrics(tmp_path / name, "sampled_seed0")]
    np.testing.assert_allclose(losses["served"], losses["here"], rtol=1e-4, atol=1e-5)
    table = json.loads((tmp_path / "served" / "summary.json").read_text())["table"]["multi"]
    assert [row["model"] for row in table] == ["student", "sampled"]  # a server does not answer


def test_a_served_teacher_is_not_sent_pictures():
    with pytest.raises(ConfigError, match="its domain has pictures"):
        uni_setup.served("it", uni_opd.ConfigDict({"url": "http://127.0.0.1:1"}), [np.array([3, 99])], vocab_size=90)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "x", "domain": "riddles", "answer": "1"}, "line 1: no verifier for domain 'riddles'"),
        ({"prompt": "x"}, "line 1: 'domain'"),
        ({"prompt": "x", "domain": "charts", "images": ["none.png"]}, "line 1"),
        ({"prompt": "+" * 99, "domain": "charts"}, "give 1 to 40, problems.prompt_tokens"),
    ],
)
def test_a_wrong_line_is_named(mine, tmp_path, line, message):
    (tmp_path / "wrong.jsonl").write_text(json.dumps(line))
    config = directories(mine)
    tokenizer = language.load_tokenizer(config.student.path)
    module, _ = uni_setup.load_directory(config.student.path, None, 1, config.compute)
    read = multimodal.Reader(tokenizer, module, config.problems, config.verifiers.to_dict())
    with pytest.raises(ConfigError, match=message):
        read(str(tmp_path / "wrong.jsonl"), None)


# ---- shipped models --------------------------------------------------------------------------------------------------


NAMES = tuple(name for name in domains_models.get_config().order if name != "reader")


def test_shipped_models_are_those_of_the_config():
    recipes = pretraining.recipes(domains_models.get_config())
    for name in NAMES:
        path = stages.SHIPPED / f"domains_{name}.safetensors"
        assert path.stat().st_size < 8 * 2**20
        assert reasoning_models.load(path, recipes[name]).seconds > 0


def test_stored_answers_are_labelled_by_their_own_teachers_in_whole_groups(tmp_path):
    config = config_of(**{"shard": 3, "sampler.max_new_tokens": 4, "opd.method": "offline"})
    setup = uni_setup.of_world(config, MESH)
    made = Experiment(config, setup, tmp_path, MESH)
    recipe, student = arm_recipe(config, "offline"), setup.student
    stored = made.stored("offline", recipe, made.chosen(recipe), dict.fromkeys(range(4), student), ["teachers"], 0)
    assert {record.task for record in stored} == {2, 3}  # logic, charts
    for record in stored:  # the "teacher" is the student
        np.testing.assert_allclose(record.teacher_logp, record.behavior_logp, atol=1e-4)
    batch = next(made.stored_batches(stored, recipe, 0))
    assert (np.unique(batch.group, return_counts=True)[1] == recipe.group).all()
