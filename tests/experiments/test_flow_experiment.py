"""The experiment's pieces: shipped weights, stages, routing, judges."""

import functools
import json
import re
import threading
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from changing import changed
from flow_pieces import one, pieces

from configs import common, flow_opd, scenes_base
from experiments import flow_methods, scenes, stages
from experiments import flow_opd as experiment
from experiments import scenes_base as pretraining
from opd_jax import hosts, optim, rng, sharding
from opd_jax.checkpoint import load_params
from opd_jax.config import ConfigError
from opd_jax.metrics import read_metrics
from opd_jax.rewards import combination, serve
from opd_jax.rewards.remote import Scores

MESH = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
NAMES = ("base", *experiment.grpo_parts(flow_opd.get_config()))


def about(name):
    return load_params(stages.SHIPPED / f"scenes_{name}.safetensors")[1]


@pytest.mark.parametrize("name", NAMES)
def test_shipped_weights_are_small_whole_and_say_how_they_were_made(name):
    path = stages.SHIPPED / f"scenes_{name}.safetensors"
    assert path.stat().st_size < 8 * 2**20
    made = stages.load(path)
    assert made.sha256 == about(name)["params_sha256"]
    assert made.seconds > 0
    assert name == "base" or made.samples > 0


def test_shipped_recipes_are_those_of_the_configs():
    """What `default` starts from is what `full` would make: the hashes of the recipes agree."""
    config = flow_opd.get_config()
    base = stages.load(scenes.SHIPPED_BASE)
    assert base.recipe == list(pretraining.recipes(scenes_base.get_config()).values())[-1]
    for name, part in experiment.grpo_parts(config).items():
        recipe = stages.recipe_of(experiment.grpo_settings(config, part), base.sha256)
        assert stages.load(experiment.shipped(name)).recipe == recipe, name


FIRST_LOSSES_OF_DRAW = (1.2148068, 1.2206746, 1.2178242)  # of the run whose later phases made the shipped base


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_first_steps_of_a_shipped_stage_made_again_have_its_losses(name, tmp_path):
    """The real settings from the real start, for as many steps as the shipped file remembers."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    stage, expected = name, about(name)["first_losses"]
    if name == "base":
        stage, expected = "draw", FIRST_LOSSES_OF_DRAW
        config = scenes_base.get_config()
        pretraining.pretrain(config, stage, None, tmp_path, tmp_path / "checkpoints", mesh, stages.FIRST)
    else:
        config = flow_opd.get_config("full")
        part = experiment.grpo_parts(config)[name]
        warm = stages.FIRST if experiment.grpo_recipe(config, part).warm_start.steps else 0
        stage, steps = (f"{name}_sft", 0) if warm else (name, stages.FIRST)  # what comes first is remembered
        experiment.Experiment(config, tmp_path, mesh).train_grpo(name, part, tmp_path / "checkpoints", warm, steps)
    losses = [line["loss"] for line in read_metrics(tmp_path, stage)]
    np.testing.assert_allclose(losses, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"world": "foo"}, "world='foo': choose one of scenes, pipeline"),
        ({"tasks": ()}, "tasks=(): choose of"),
        ({"seeds": ()}, "seeds=()"),
        ({"eval__prompts": 0}, "eval.prompts=0"),
        ({"lora__rank": 0}, "lora.rank=0"),
        ({"lora__pattern": "(["}, "lora.pattern='(['"),
        ({"grpo__updates": 0}, "grpo.updates=0 (ocr): give 1 or more"),
        (
            {"grpo__warm_start__decay_steps": 9},
            "steps=2: give 9 or more, warmup + decay_steps, or lower",
        ),
        ({"opd__ema_decay": 2.0}, "ema_decay=2.0"),
        ({"opd__learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"opd__init": "nobody"}, "init='nobody'"),
        ({"teachers__ocr__goup": 3}, "ocr.goup: neither path, prompts, rewards nor a setting of grpo"),
    ],
)
def test_what_is_refused_before_anything(changes, says):
    with pytest.raises(ConfigError) as error:
        experiment.validate(changed(flow_opd.get_config("tiny"), **changes), MESH)
    assert says in str(error.value)


def test_a_teacher_changes_whatever_grpo_has():
    """Also what lies deeper; the others keep theirs. `prompts` of a teacher are tasks, of `grpo` a number."""
    config = flow_opd.get_config("paper")
    of = lambda name: experiment.grpo_recipe(config, config.teachers[name])
    assert of("quality").flow_grpo.beta == 0.01 and of("ocr").flow_grpo.beta == 0.04
    assert of("quality").flow_grpo.window == 9 and of("quality").prompts == config.grpo.prompts
    own = changed(flow_opd.get_config("tiny"), teachers__ocr__group=24)
    assert experiment.grpo_recipe(own, own.teachers.ocr).group == 24


def test_another_recipe_is_refused(tmp_path):
    path = experiment.shipped("grpo_ocr")
    with pytest.raises(ConfigError, match="full"):
        stages.load(path, "0" * 64)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"damaged\.safetensors"):
        stages.load(damaged)


def test_a_stage_of_several_parts_has_the_seconds_of_all_and_the_first_losses_of_the_first(tmp_path):
    lines = [
        {"stage": stage, "step": step, "seconds": 2.0 * (step + 1), "loss": loss + step}
        for stage, loss in (("x_sft", 1.0), ("x", 7.0))
        for step in range(4)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = stages.once("x", tmp_path, "a" * 64, lambda _: ({"w": np.zeros(1)}, 5), {}, ("x_sft", "x"))
    assert made.seconds == 16
    about = load_params(stages.path_of("x", tmp_path, "a" * 64))[1]
    assert about["first_losses"] == [1.0, 2.0, 3.0]
    assert about["samples"] == 5


def test_a_later_phase_of_the_base_needs_no_earlier_one(tmp_path):
    config = scenes_base.get_config("tiny")
    mesh = sharding.make_mesh({"data": 8})
    pretraining.run(config, tmp_path, mesh)
    recipes = pretraining.recipes(config)
    first, *_, last = (stages.path_of(name, tmp_path, recipe) for name, recipe in recipes.items())
    before = stages.load(last).sha256
    for path in (first, last):
        path.unlink()
    pretraining.run(config, tmp_path, mesh)
    assert stages.load(last).sha256 == before
    assert not first.exists()


def test_a_stage_is_made_once(tmp_path):
    calls = []

    def make(checkpoint_dir):
        calls.append(checkpoint_dir)
        return {"w": np.arange(3.0)}, 5

    first, second = (stages.once("x", tmp_path, "a" * 64, make, {}) for _ in range(2))
    assert len(calls) == 1
    assert first.sha256 == second.sha256
    stages.once("x", tmp_path, "b" * 64, make, {})
    assert len(set(calls)) == 2, "another recipe has checkpoints of its own"


class Judges:
    """`flow_opd.Experiment` as far as it asks a judge."""

    def __init__(self):
        self.times, self.config = 0, flow_opd.get_config("tiny").copy_and_resolve_references().unlock()
        self.config.judges.mean = {"weights": {"a": 1.0, "b": 1.0}, "rewards": {}}

    def judged_here(self, name, images, texts):
        self.times += 1
        a = np.array([0.25, np.nan], np.float32)
        one = lambda score: Scores(score, np.isfinite(score), {})
        return combination.Combined(2 * a, np.isfinite(a), {"b": one(a), "a": one(a + 1)})


def test_of_several_processes_the_first_asks_a_judge_for_all(monkeypatch):
    """What it hands to the others is taken by them as if they had asked."""
    sent = []
    monkeypatch.setattr(hosts, "several", lambda: True)
    monkeypatch.setattr(hosts, "agreed", lambda tree: sent.append(tree) or tree)
    first, other = Judges(), Judges()
    said = experiment.Experiment.judged(first, "mean", None, ["x", "y"])
    assert first.times == 1 and len(sent) == 2  # whether there was a mistake, and the scores

    given = iter(sent)
    monkeypatch.setattr(hosts, "first", lambda: False)
    monkeypatch.setattr(hosts, "agreed", lambda tree: next(given))
    taken = experiment.Experiment.judged(other, "mean", None, ["x", "y"])
    assert other.times == 0
    for found in (said, taken):
        np.testing.assert_array_equal(found.score, [0.5, np.nan])
        np.testing.assert_array_equal(found.known, [True, False])
        np.testing.assert_array_equal(found.parts["a"].score, [1.25, np.nan])
        np.testing.assert_array_equal(found.parts["b"].score, [0.25, np.nan])


def test_every_record_is_labelled_by_its_own_teacher():
    method, state, batch, (teachers, anchor), world = pieces(one())
    velocity = world.velocity
    rollout = method.sample(state.params, batch, rng.stream(0, "sample"))
    labels = method.label((teachers, anchor), rollout)
    x, t = rollout.states[:, 1], rollout.times[:, 1]
    for task, adapter in enumerate(teachers):
        mine = np.flatnonzero(np.asarray(rollout.task) == task)
        alone = velocity(adapter, x, t, rollout.condition)
        np.testing.assert_allclose(labels.teacher_velocity[mine, 1], alone[mine], atol=2e-5)
    alone = velocity(anchor, x, t, rollout.condition)
    np.testing.assert_allclose(labels.anchor_velocity[:, 1], alone, atol=2e-5)


def test_the_position_embedding_and_backbone_stay_frozen():
    method, state, batch, teachers, world = pieces(one())
    before = jax.device_get(world.velocity.args)
    rollout = method.sample(state.params, batch, rng.stream(0, "sample"))
    method.update(state, rollout, method.label(teachers, rollout), rng.stream(0, "update"))
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(world.velocity.args))


@pytest.mark.parametrize("form", ["awm", "flow_grpo"])
def test_a_specialist_is_held_to_where_it_started(form):
    """At the first update the student is its reference, as far as 0 from it; another student is not."""
    _, _, batch, (teachers, _), world = pieces(one())
    config = flow_opd.get_config("tiny").copy_and_resolve_references()
    with config.unlocked():
        config.grpo.method, config.sampler.steps = form, 5  # two more than the window
    recipe = experiment.grpo_recipe(config, config.teachers.ocr)
    update, optimizer = flow_methods.grpo_update(world.velocity, recipe)
    judge = lambda *what: flow_methods.Own(world.reward, what)
    method = flow_methods.grpo_method(world, ("quality", "quality"), update, config, recipe, judge)
    distances = []
    for adapter in teachers:
        rollout = method.sample(adapter, batch, rng.stream(0, "sample"))
        labels = method.label(teachers[0], rollout)
        state = optim.init_state(adapter, optimizer)
        _, metrics = method.update(state, rollout, labels, rng.stream(0, "update"))
        distances.append(float(metrics["reference_error" if form == "awm" else "reverse_kl"]))
        if form == "flow_grpo":
            assert labels.reference_velocity.shape[1] == recipe.flow_grpo.window
            np.testing.assert_allclose(metrics["ratio"], 1, atol=1e-5)
            start = np.asarray(rollout.states[:, 0]).reshape(-1, recipe.group, *rollout.states.shape[2:])
            assert (start == start[:, :1]).all(), "a group begins at one noise"
            assert len(np.unique(start[:, 0, 0, 0, 0])) == len(start), "another group at another"
    assert distances[0] < 1e-3 * distances[1]


def test_a_specialist_may_be_judged_by_a_server(monkeypatch, tmp_path):
    """Its rewards are those that the server gives; an unknown one has no advantage and leaves the metrics finite."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    asked = []

    def scorer(images, prompts, metadata):
        asked.extend(prompts)
        return ["unknown" if i == 0 and len(images) > 1 else float(image.mean()) for i, image in enumerate(images)]

    server = serve.Server(scorer, name="mean", version="1")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    _, _, batch, (teachers, _), world = pieces(one())
    config = flow_opd.get_config("tiny").copy_and_resolve_references()
    part = {"kind": "http", "url": f"http://127.0.0.1:{server.server_port}", "batch_size": 64, "patience": 0}
    with config.unlocked():
        config.judges.mean = {"weights": {"a": 1.0, "b": 1.0}, "rewards": {"a": part, "b": part}}
        config.teachers.ocr.rewards = ("mean",)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    experiment.validate(config, mesh)
    part = config.teachers.ocr
    settings = experiment.grpo_settings(config, part)
    assert settings["judges"]["mean"]["weights"] == {"a": 1.0, "b": 1.0}
    assert "judges" not in experiment.grpo_settings(config, config.teachers.composition)
    recipe = experiment.grpo_recipe(config, part)
    update, optimizer = flow_methods.grpo_update(world.velocity, recipe)
    stub = object.__new__(experiment.Experiment)
    stub.workdir, stub.world = tmp_path, world
    stub.judges = {"mean": combination.Rewards(**config.judges.mean.to_dict())}
    order = []

    def judge(*what):
        pending = stub.judge(*what)
        order.append("at work")
        return types.SimpleNamespace(collect=lambda: order.append("awaited") or pending.collect(), keep=pending.keep)

    method = flow_methods.grpo_method(world, ("mean", "mean"), update, config, recipe, judge)
    rollout = method.sample(teachers[0], batch, rng.stream(0, "sample"))
    labels = method.label(teachers[0], rollout)
    server.shutdown()
    server.server_close()
    assert order == 2 * ["at work"] + 2 * ["awaited"], "the judges of two tasks work side by side"
    state = optim.init_state(teachers[0], optimizer)
    _, metrics = method.update(state, rollout, labels, rng.stream(0, "update"))
    assert np.isfinite(jax.device_get(list(metrics.values()))).all()
    pictures = combination.to_uint8(np.asarray(rollout.image))
    task = np.asarray(rollout.task)
    known = np.array([i != np.flatnonzero(task == task[i])[0] for i in range(len(task))])
    reward = 2 * pictures.mean((1, 2, 3), dtype=np.float64)
    np.testing.assert_allclose(np.asarray(labels.reward)[known], reward[known], rtol=1e-5)
    np.testing.assert_allclose(np.asarray(labels.reward)[~known], reward[known].mean(), rtol=1e-5)
    assert (np.asarray(labels.advantage)[~known] == 0).all()
    assert sorted(asked) == sorted(2 * [scenes.scenes.caption_of(tokens) for tokens in np.asarray(rollout.condition)])
    with config.unlocked():
        config.judges.mean.weights.c = 1.0
        config.judges.ocr = {"weights": {}, "rewards": {}}
        config.teachers.ocr.rewards, config.teachers.quality.rewards = ("nobody",), ("mean", "mean")
    with pytest.raises(ConfigError) as error:
        experiment.validate(config, mesh)
    for match in (
        "judges.mean: weights.c: there is no such reward",
        "judges.ocr: is a reward of the world",
        "'nobody'",
    ):
        assert match in str(error.value)


def test_an_arm_may_go_on_from_another_but_not_round_in_a_circle():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    config = flow_opd.get_config("tiny").copy_and_resolve_references()
    experiment.validate(config, mesh)
    with config.unlocked():
        config.arms.offline.init = "after_sft"
    with pytest.raises(
        ConfigError,
        match=r"init='offline' \(arm after_sft\): is no .* one of merge, base, flow_opd, or name it",
    ):
        experiment.validate(config, mesh)


def test_config_pieces_agree():
    assert flow_opd.get_config().model.to_dict() == common.scene_model().to_dict()
    with pytest.raises(ValueError, match="no_such"):
        flow_opd.get_config("no_such")


def test_the_guide_states_the_defaults():
    """Every row of the guide's table that has one key has the value of the config."""
    guide = (Path(__file__).parents[2] / "docs" / "flow_opd.md").read_text()
    stated = dict(re.findall(r"^\| `([a-z_.]+)` \| ([^|]+) \|", guide.partition("## Settings")[2], re.MULTILINE))
    config, checked = flow_opd.get_config(), 0
    for key, value in stated.items():
        actual = functools.reduce(lambda part, name: part[name], key.split("."), config)
        if isinstance(actual, (bool, int, float, str)):
            assert value == str(actual), key
            checked += 1
    assert checked > 25


def test_tiny_is_tiny_in_every_stage():
    """A specialist's own number of steps does not slip through."""
    config = flow_opd.get_config("tiny")
    recipes = [experiment.grpo_recipe(config, part) for part in experiment.grpo_parts(config).values()]
    recipes += [experiment.arm_recipe(config, name) for name in config.arms]
    assert all(recipe.steps <= 2 and recipe.get("warm_start", recipe).steps <= 2 for recipe in recipes)
