"""Meta-World as a world of the experiment on robot policies, and OpenVLA's directories played in it."""

import functools
import io
import json
import sys
from pathlib import Path

import drawing
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from changing import changed
from ml_collections import ConfigDict
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "models"))

from host_dying import Dying

from configs import vla_opd as configs
from experiments import (
    vla,
    vla_demos,
    vla_episodes,
    vla_host,
    vla_methods,
    vla_notes,
    vla_openvla,
    vla_pictures,
    vla_policies,
    vla_worlds,
)
from experiments.recipes import arm_recipe
from experiments.vla_methods import GIVEN
from experiments.vla_stages import Experiment
from experiments.vla_worlds import Acting
from opd_jax import config as config_lib
from opd_jax import optim, rng
from opd_jax.config import ConfigError
from opd_jax.models import action_tokens
from opd_jax.models.action_tokens import Statistics
from opd_jax.sampling import host_simulator
from opd_jax.sampling.episodes import Plan
from opd_jax.worlds import libero, metaworld

drawing.needed()

MESH = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])


def config_of(**changes):
    return changed(configs.get_config("tiny_metaworld"), **{"simulators__workers": 1} | changes)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    made = Experiment(config_of(), tmp_path_factory.mktemp("host"), MESH)
    yield made
    made.world._pool.close()


@pytest.fixture(scope="module")
def params(experiment):
    return jax.jit(experiment.module.init)(jax.random.key(0), experiment.world.example)["params"]


@pytest.fixture(scope="module")
def played(experiment, params):
    """Two decisions in two scenes, twice each; the expert is asked."""
    act = vla_methods.drawn(vla_methods.logits_fn(experiment.module))
    starts = experiment.world.starts(experiment.tasks, 0)
    return experiment.world.play(act, params, starts, jax.random.key(1), Acting(Plan(2, 3), group=2, asked=8))


def test_the_expert_labels_the_states_that_the_student_reached(experiment, played):
    labels = vla_methods.expert_labels(experiment.world, 8, 0.1)(None, played)
    assert labels.logits.shape == (4, 2, 8, metaworld.ACTION_DIMS, action_tokens.NUM_BINS)
    task, seed = (np.asarray(leaf)[1] for leaf in reversed(experiment.world.starts(experiment.tasks, 0)))
    simulator = metaworld.MetaWorld(int(task), cameras=(), horizon=64)
    simulator.reset(int(seed), "train")
    for action in np.asarray(action_tokens.decode(played.drawn.tokens))[2, 0, :3]:
        simulator.step(action)
    expected = simulator.expert()
    simulator.close()
    found = action_tokens.decode(jnp.argmax(labels.logits[2, 1, 0], -1))
    np.testing.assert_allclose(found, expected, atol=1 / 255 + 1e-6)


def test_a_policy_sees_what_the_simulator_shows(experiment, played):
    seen = played.observation
    assert seen.images.shape == (4, 2, 2, 32, 32, 3) and seen.images.dtype == jnp.uint8
    assert np.abs(np.asarray(seen.proprioception)).max() <= 1
    np.testing.assert_array_equal(seen.images[0, 0], seen.images[1, 0])  # one scene
    assert (np.asarray(seen.instruction[0, 0]) != np.asarray(seen.instruction[2, 0])).any()


def test_test_scenes_are_numbered_and_apart(experiment):
    a, b = experiment.tasks
    starts = experiment.world.starts([a, b, a, a], 5, "test")
    np.testing.assert_array_equal(starts.seed, [0, 0, 1, 2])
    assert not np.array_equal(experiment.world.starts([a, b], 5).seed, experiment.world.starts([a, b], 6).seed)


def test_demonstrations_are_successes_that_the_expert_shows(experiment):
    shown = experiment.few
    assert set(shown.task) == set(experiment.tasks) and shown.counted[:, 0].all()
    assert shown.observation.images.shape[1:] == (2, 32, 32, 3) and np.abs(shown.actions).max() <= 1
    np.testing.assert_array_equal(shown.actions[0, 1:], shown.actions[1, :-1])
    assert experiment.world.expert_success(np.repeat(experiment.tasks, 2), 0).mean() == 1


def test_students_begin_with_a_policy_that_has_practised_what_is_in_no_suite(tmp_path):
    experiment = Experiment(config_of(sft__steps=0, simulators__state=True), tmp_path, MESH)
    shown, (task,) = experiment.practice, {metaworld.NAMES.index("drawer-close-v3")}
    assert set(shown.task) == {task} and task not in experiment.tasks
    (begun,) = vla_host._scenes([task], experiment.config.practice.seed, "train").seed
    simulator = host_simulator.disturbed(functools.partial(metaworld.MetaWorld, cameras=(), state=True), task)
    simulator.reset(int(begun), "train")
    rows, steps = len(shown.task), 0
    for row in range(rows):  # all of the episode
        assert steps < 64 and not simulator.success()
        seen = experiment.world._kit.prepare(simulator.observe(), simulator.instruction)
        np.testing.assert_array_equal(shown.observation.proprioception[row], seen.proprioception)
        np.testing.assert_array_equal(shown.actions[row], host_simulator.expert_chunk(simulator._simulator, 8))
        for action in shown.actions[row]:
            if not simulator.success():
                simulator.step(action)
        steps += 8
    assert simulator.success() or steps == 64, "decisions are missing"
    simulator.close()

    base = experiment.base("bins")
    first = experiment.world.first(experiment.policies["bins"].init, rng.stream(11, "policy"))
    begins = [experiment.student(seed, "bins").params for seed in (0, 1)]
    experiment.world._pool.close()
    for leaves in zip(*map(jax.tree.leaves, (base.params, *begins))):
        for leaf in leaves[1:]:
            np.testing.assert_array_equal(leaf, leaves[0])
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(base.params)))

    again = Experiment(experiment.config, tmp_path, MESH)
    again.world.practice = None  # not asked: the stage is made
    assert again.base("bins").sha256 == base.sha256


def test_one_update_of_the_student_on_its_own_episodes(experiment, params):
    recipe = arm_recipe(experiment.config, "vla_opd")
    method, optimizer = experiment.policies["bins"].on_policy(recipe)
    batch = next(experiment.scenes(recipe, 0)) | {"decisions": 2}
    rollout = method.sample(params, batch, jax.random.key(1))
    assert rollout.success.shape == (recipe.batch_size * recipe.group,)
    labels = method.label(None, rollout)
    state, metrics = method.update(optim.init_state(params, optimizer), rollout, labels, jax.random.key(2))
    assert metrics["reverse_kl"] > 0 and metrics["environment_steps"] == rollout.length.sum()
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(params)))


def test_episodes_of_a_process_that_died_are_played_again_and_counted(tmp_path, monkeypatch):
    """Two of one process: one dies in it, the other is lost with it; in training, and in what is not."""
    mark = tmp_path / "mark"
    dying = staticmethod(lambda config, pictures=True: functools.partial(Dying, mark=str(mark), cameras=(), state=True))
    monkeypatch.setattr(vla_host.MetaWorld, "make", dying)
    experiment = Experiment(config_of(simulators__state=True, simulators__at_once=2), tmp_path, MESH)
    world = experiment.world
    params = jax.jit(experiment.module.init)(jax.random.key(0), world.example)["params"]
    act = vla_methods.greedy(vla_methods.logits_fn(experiment.module))
    starts, update = world.starts(experiment.tasks, 0), vla_episodes.counting(lambda *_: (None, {}))

    def play(dies: bool, split: str = "train"):
        mark.touch() if dies else None
        rollout = world.play(act, params, starts, jax.random.key(1), Acting(Plan(2, 2), split=split))
        counts = vla_episodes.counts(rollout, {})
        return rollout, update(None, rollout._replace(played=counts), None, None)[1]

    (well, quiet), (again, counted) = play(False), play(True)
    assert not mark.exists() and np.asarray(again.redone).sum(0).tolist() == [1, 1]
    jax.tree.map(np.testing.assert_array_equal, again._replace(redone=None), well._replace(redone=None))
    assert (quiet["redone"], quiet["redone_beside"], counted["redone"], counted["redone_beside"]) == (0, 0, 1, 1)
    lines = [{name: float(value) for name, value in line.items()} for line in (quiet, counted, {"loss": 1.0})]
    assert vla_notes.redone(experiment, lines) == {"redone": 1, "redone_beside": 1}
    play(True, "test")
    world._pool.close()
    found = vla_notes.redone(experiment, lines)
    assert found == {"redone": 2, "redone_beside": 2}
    (said,) = vla_notes.redone_note(found)
    assert "crashed, hung or raised: 2; beside one in its process: 2." in said
    assert vla_notes.redone_note({"redone": 0, "redone_beside": 0}) == []


def test_a_film_is_what_was_seen_at_decisions(experiment, played):
    frames = experiment.world.film(played, None, None, np.array([2]))
    np.testing.assert_array_equal(frames[0, 1], np.concatenate(list(played.observation.images[2, 1]), 1))


def test_a_policy_may_see_the_state_and_is_filmed_all_the_same(tmp_path):
    experiment = Experiment(config_of(simulators__state=True), tmp_path, MESH)
    world = experiment.world
    params = jax.jit(experiment.module.init)(jax.random.key(0), world.example)["params"]
    assert set(params) == {"language_model", "proprioception", "placeholders"}  # nothing that looks at pictures
    act = vla_methods.greedy(vla_methods.logits_fn(experiment.module))
    starts = world.starts(experiment.tasks, 0, "test")
    rollout = world.play(act, params, starts, jax.random.key(1), Acting(Plan(3, 2), split="test", asked=8))
    world._pool.close()
    assert rollout.observation.images.shape[2] == 0 and rollout.states.shape[2:] == (8, metaworld.ACTION_DIMS)
    assert rollout.observation.proprioception.shape[2:] == metaworld.STATE.shape[1:]
    assert np.abs(rollout.observation.proprioception).max() <= 1

    actions = vla_pictures.executed(rollout, 2)
    frames = world.film(rollout, starts, actions, np.array([1]))
    assert frames.shape == (1, 3, 32, 64, 3)
    simulator = vla_host.MetaWorld.make(experiment.config)(experiment.tasks[1])
    simulator.reset(0, "test")
    for t in range(3):
        seen = simulator.observe()
        np.testing.assert_array_equal(frames[0, t], np.concatenate(list(seen["images"]), 1))
        least, most = metaworld.STATE
        felt = np.clip(2 * (seen["proprioception"] - least) / (most - least) - 1, -1, 1)
        np.testing.assert_allclose(rollout.observation.proprioception[1, t], felt, atol=1e-6)
        for action in np.asarray(actions[1, 2 * t : 2 * t + 2]):
            simulator.step(action)
    simulator.close()


def test_words_are_told_apart():
    words = vla_policies.Words(("open the door", "shut it"))
    np.testing.assert_array_equal(words("shut it"), [4, 2, 0])
    with pytest.raises(ConfigError, match="instruction 'shut the door': is of no task"):
        words("shut the door")


# ---- demonstrations from files ---------------------------------------------------------------------------------------


def write_data_set(folder, episodes, side=32, scale=1.0):
    """LeRobot's v2.1 with pictures in the columns: `episodes` are instructions; returns the actions of each."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cameras, texts = ("observation.images.a", "observation.images.b"), sorted(set(episodes))
    (folder / "meta").mkdir(parents=True)
    (folder / "data").mkdir()
    features = {name: {"dtype": "image", "shape": [side, side, 3]} for name in cameras}
    features |= {name: {"dtype": "float32"} for name in ("action", "observation.state")}
    info = {"codebase_version": "v2.1", "fps": 80, "features": features, "data_path": "data/{episode_index}.parquet"}
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    lines = lambda rows: "\n".join(map(json.dumps, rows))
    (folder / "meta" / "tasks.jsonl").write_text(lines({"task_index": i, "task": t} for i, t in enumerate(texts)))
    about = ({"episode_index": i, "length": 3} for i in range(len(episodes)))
    (folder / "meta" / "episodes.jsonl").write_text(lines(about))
    png, actions = io.BytesIO(), np.random.default_rng(0).uniform(-1, 1, (len(episodes), 3, 4)).astype(np.float32)
    actions[-1, 1, 2] *= scale
    Image.fromarray(np.full((side, side, 3), 9, np.uint8)).save(png, "PNG")
    for i, text in enumerate(episodes):
        hand = np.tile(metaworld.HAND[1], (3, 1)).tolist()
        columns = {"action": actions[i].tolist(), "observation.state": hand, "task_index": [texts.index(text)] * 3}
        columns |= {"frame_index": [0, 1, 2], "episode_index": [i] * 3}
        columns |= {name: [{"bytes": png.getvalue(), "path": ""}] * 3 for name in cameras}
        pq.write_table(pa.table(columns), folder / "data" / f"{i}.parquet")
    return actions


def test_demonstrations_of_a_data_set_are_those_of_its_tasks(experiment, tmp_path):
    world, (a, b) = experiment.world, experiment.tasks
    text = lambda task: world.tasks[task].instruction
    actions = write_data_set(tmp_path / "set", [text(b), "sing", text(a), text(a)])
    read = functools.partial(vla_demos.read, kit=world._kit, robot=world.robot(experiment.config))
    found = read(str(tmp_path / "set"), numbers={text(a): a, text(b): b}, count=1)
    np.testing.assert_array_equal(found.task, [b] * 3 + [a] * 3)
    np.testing.assert_array_equal(found.actions[:3, 0], actions[0])
    np.testing.assert_array_equal(found.actions[3, :3], actions[2])
    assert found.counted.sum(1).tolist() == [3, 2, 1] * 2 and found.actions.shape == (6, 8, 4)
    np.testing.assert_allclose(found.observation.proprioception, 1, atol=1e-6)
    assert (found.observation.images == 9).all()
    with pytest.raises(ConfigError, match=r"2 episodes of each task are asked for; of .* 1 are there"):
        read(str(tmp_path / "set"), numbers={text(b): b}, count=2)
    write_data_set(tmp_path / "wild", [text(b), text(a)], scale=1e3)  # in the second episode
    with pytest.raises(
        ConfigError, match=r"action 2 is as large as \d+, and a policy without .* \[-1, 1\]; scale or clip"
    ):
        read(str(tmp_path / "wild"), numbers={text(a): a, text(b): b}, count=1)
    write_data_set(tmp_path / "large", [text(b)], side=16)
    with pytest.raises(ConfigError, match="height 16, not 32, width 16, not 32; give demonstrations of this world"):
        read(str(tmp_path / "large"), numbers={text(b): b}, count=1)


def test_a_run_learns_from_the_demonstrations_of_a_data_set(experiment, tmp_path):
    """`demos` in place of the expert's; a student is trained on them, and another data set is another student."""
    words = [experiment.world.tasks[task].instruction for task in experiment.tasks]
    actions = write_data_set(tmp_path / "set", [*words, *words])
    config = config_of(demos=str(tmp_path / "set"), base="", demonstrations__few=1, demonstrations__many=2)
    vla.validate(config, MESH)
    own = Experiment(config, tmp_path / "run", MESH)
    np.testing.assert_array_equal(own.few.actions[:3, 0], actions[0])
    assert len(own.many.task) == 12 and own.world.identity["demos"]
    assert own.student(0, "bins").samples > 0
    own.world._pool.close()


def test_a_horizon_in_which_the_expert_never_succeeds_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(vla_worlds, "PATIENCE", 2)
    own = Experiment(config_of(simulators__horizon=3), tmp_path, MESH)
    with pytest.raises(ConfigError, match=r"v3: its expert fails in all of 2 episodes of 3 steps and shows"):
        own.few  # noqa: B018
    own.world._pool.close()


# ---- directories -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A random OpenVLA of tiny sizes for Meta-World's robot."""
    from test_hf_openvla import _tokenizer
    from tiny_openvla import OpenVla

    folder = tmp_path_factory.mktemp("openvla") / "student"
    action = {"q01": [-1.0, -0.5, -1.0, -1.0], "q99": [1.0, 0.5, 1.0, 1.0], "mask": [True, True, True, False]}
    statistics = {"mt": {"action": action, "num_transitions": 9, "num_trajectories": 2}}
    OpenVla(fused=False, proprioception=False).save(folder, statistics=statistics)
    _tokenizer(folder)
    return folder


def of_directory(directory, **changes):
    paths = {"student__path": str(directory), "teacher__path": str(directory), "opd__teacher": GIVEN, "base": ""}
    return config_of(**paths | {"policy__horizon": 2, "policy__executed": 2, "sft__steps": 0} | changes)


def test_a_directory_s_policy_acts_and_is_labelled_by_another(directory, tmp_path):
    """The code path of LIBERO's `paper` variant, in a simulator that runs here; the teacher is the student itself."""
    config = of_directory(directory)
    del config.arms["sft_many"]
    vla.validate(config, MESH)
    experiment = Experiment(config, tmp_path, MESH)
    recipe = arm_recipe(config, "vla_opd")
    method, optimizer = experiment.policies["bins"].on_policy(recipe)
    student, teacher = experiment.student(0, "bins"), experiment.teacher(GIVEN, 0)
    batch = next(experiment.scenes(recipe, 0)) | {"decisions": 2}
    rollout = method.sample(student.params, batch, jax.random.key(1))
    assert rollout.states is None and rollout.observation.images.shape[2:] == (1, 12, 12, 3)
    assert (np.asarray(rollout.length) == 4).all()
    labels = method.label(teacher.params, rollout)
    _, metrics = method.update(optim.init_state(student.params, optimizer), rollout, labels, jax.random.key(2))
    assert abs(float(metrics["reverse_kl"])) < 1e-5 and metrics["agreement"] == 1
    experiment.world._pool.close()


@pytest.mark.parametrize(
    ("file", "keys", "value", "says"),
    [
        ("config.json", ("norm_stats", "mt", "action", "q99", 1), 0.6, r"q99 of the student is .*unnorm_key"),
        ("config.json", ("text_config", "rope_theta"), 7e3, r"differs from the student in language_model.rope;"),
        ("config.json", ("pad_to_multiple_of",), 32, r"differs from the student in used_vocab_size;"),
        ("preprocessor_config.json", ("means", 0, 1), 0.25, r"takes pictures of|differs from the student in towers"),
    ],
)
def test_a_teacher_to_whom_the_same_means_something_else_is_refused(directory, tmp_path, file, keys, value, says):
    """Its parameters would run in the student's module: a valid number, and not its answer."""
    other = tmp_path / "teacher"
    other.mkdir()
    for one in directory.iterdir():
        (other / one.name).write_bytes(one.read_bytes())
    whole = inner = json.loads((other / file).read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (other / file).write_text(json.dumps(whole))
    with pytest.raises(ConfigError, match=says) as error:
        vla_host.MetaWorld(of_directory(directory, teacher__path=str(other)), MESH)
    assert "\n" not in str(error.value)


def test_actions_become_the_robot_s_and_come_back():
    robot = vla_policies.Robot(2, 8, 7, np.zeros((2, 8)), ("go",), libero.SCALE, libero.SHIFT)
    low, high = np.array([-0.5] * 6 + [0.0]), np.array([0.5] * 6 + [1.0])
    statistics = Statistics(low, high, np.array([True] * 6 + [False]))
    to_robot, from_robot = vla_openvla.conversions(robot, statistics)
    actions = jnp.array([[[1.0, -1, 0, 0.5, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0]]])
    found = to_robot(actions)
    np.testing.assert_allclose(found[0, 0], [0.5, -0.5, 0, 0.25, 0, 0, -1], atol=1e-6)  # 1 in the data: the hand open
    assert found[0, 1, 6] == 1
    np.testing.assert_allclose(from_robot(found), actions, atol=1e-6)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"suites": ("spatial",)}, "there is no 'spatial'; choose of two, ten, mt10, mt50"),
        ({"held_out": ("assembly-v3",)}, "'assembly-v3' is of no suite in ('two',)"),
        ({"held_out": ("reach-v3", "plate-slide-v3")}, "has all of two"),
        ({"simulators__workers": 0}, "simulators.workers=0"),
        ({"demos": "/nowhere"}, "demos=/nowhere: no such folder"),
        ({"demos": "/", "simulators__state": True}, "demos=/: is about pictures"),
        ({"student__path": "/", "simulators__state": True}, "student.path=/: is about pictures"),
        ({"simulators__timeout": 0.0}, "simulators.timeout=0.0"),
        ({"simulators__cameras": ("front",)}, "simulators.cameras=('front',)"),
        ({"student__path": "/nowhere"}, "student.path=/nowhere: no such folder"),
        ({"teacher__path": "/"}, "give student.path too"),
        ({"student__crop": 0.0}, "student.crop=0.0"),
        ({"opd__teacher": GIVEN}, "needs a policy of a directory; give teacher.path"),
        ({"base": "shipped"}, "base='shipped': is of the tabletop; give 'practised'"),
        ({"student__path": "/"}, "base='practised': of policies of our own"),
        ({"practice__tasks": ("close-door",)}, "practice.tasks: there is no 'close-door'; choose of assembly-v3,"),
        ({"practice__tasks": ("reach-v3",)}, "practice.tasks: 'reach-v3' is of two, which students learn"),
        ({"practice__tasks": (), "suites": ("mt50",)}, "leave no task to practise; set base=''"),
        ({"practice__episodes": 0}, "practice.episodes=0"),
        ({"practice__batch_size": 9, "practice__micro_batches": 2}, "practice: 9 records do not divide into 2"),
        ({"simulators__size": 30}, "simulators.size=30: give a multiple of 4"),
        ({"simulators__size": 36, "policy__points": 0}, "simulators.size=36: give a multiple of 8"),
        ({"policy__width": 100}, "policy.width=100: give a multiple of 8"),
        (
            {"opd__decay_steps": 2, "opd__warmup": 1},
            "steps=2: give 3 or more, warmup + decay_steps, or lower these (arm",
        ),
        ({"practice__warmup": 2}, "steps=2: give 3 or more, warmup + decay_steps, or lower these (practice)"),
    ],
)
def test_what_is_refused_before_anything(changes, says):
    with pytest.raises(ConfigError) as error:
        vla.validate(config_of(**changes), MESH)
    assert says in str(error.value)


def test_libero_without_its_package_is_one_line(monkeypatch):
    monkeypatch.setattr(libero, "_package", functools.partial(_absent, libero.INSTALL))
    config = configs.get_config("paper")
    with pytest.raises(ConfigError, match="LIBERO is not installed: pip install") as error:
        vla.validate(config, MESH)
    assert "\n" not in str(error.value)


def _absent(remedy):
    raise ConfigError(f"LIBERO is not installed: {remedy}")


@pytest.mark.slow
def test_a_run_from_demonstrations_to_report(tmp_path):
    vla.run(config_of(), tmp_path, MESH)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {"expert", "base", "student, before", "vla_opd"} <= {row["model"] for row in summary["table"]}
    assert "Base: has practised" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_a_run_of_a_policy_with_a_flow_head_from_practice_to_report(tmp_path):
    config = config_of(simulators__state=True)
    steps = config.arms.vla_opd.to_dict() | {"head": "flow"}
    config.arms = ConfigDict({"flow": steps})
    vla.run(config, tmp_path, MESH)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [row["model"] for row in summary["table"]] == ["expert", "base flow", "flow student, before", "flow"]
    assert len(list((tmp_path / "stages").glob("base_flow-*.safetensors"))) == 1
    page = (tmp_path / "report.html").read_text()
    assert "Episodes from the same first states" in page and "Reverse KL from the expert along" not in page


@pytest.mark.slow
def test_a_finished_run_asks_for_no_demonstration_again(tmp_path, monkeypatch):
    config = config_of(only=("sft_many",))
    config_lib.keep_arms(config)
    first = Experiment(config, tmp_path, MESH)
    first.arm("sft_many", 0)
    spent = first.shown_to_students(), first.spent("sft_many", 0)
    assert spent[0]["environment_steps"] > 0 and spent[1]["environment_steps"] > spent[0]["environment_steps"]
    for name in ("demonstrations", "practice"):
        monkeypatch.setattr(vla_host.MetaWorld, name, None)
    again = Experiment(config, tmp_path, MESH)
    again.arm("sft_many", 0)
    assert (again.shown_to_students(), again.spent("sft_many", 0)) == spent


def test_another_data_set_in_the_place_of_one_is_noticed(tmp_path):
    file = tmp_path / "meta" / "episodes.jsonl"
    file.parent.mkdir()
    file.write_text("{}\n")
    before = vla_demos.digest(str(tmp_path))
    assert vla_demos.digest(str(tmp_path)) == before
    file.write_text("{}\n{}\n")
    assert vla_demos.digest(str(tmp_path)) != before
