"""The experiment on robot policies: demonstrations, labels, costs, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from changing import changed

from configs import vla_base as base_configs
from configs import vla_opd as configs
from experiments import (
    stages,
    vla,
    vla_base,
    vla_episodes,
    vla_methods,
    vla_notes,
    vla_pictures,
    vla_tabletop,
    vla_worlds,
)
from experiments.recipes import arm_recipe
from experiments.vla_stages import Experiment
from experiments.vla_worlds import Acting, Starts
from opd_jax import optim
from opd_jax.checkpoint import params_sha256
from opd_jax.config import ConfigError
from opd_jax.losses import vla_opd
from opd_jax.models import action_tokens
from opd_jax.sampling.episodes import Plan
from opd_jax.types import EpisodeRollout
from opd_jax.worlds import tabletop, tabletop_skills

MESH = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def config_of(**changes):
    return changed(configs.get_config("tiny"), **{"sft__batch_size": 8, "opd__batch_size": 8} | changes)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return Experiment(config_of(), tmp_path_factory.mktemp("vla"), MESH)


@pytest.fixture(scope="module")
def params(experiment):
    example = vla_tabletop.first_observation()
    return jax.jit(experiment.module.init)(jax.random.key(0), example)["params"]


@pytest.fixture(scope="module")
def played(experiment, params):
    """Two decisions of a random policy in eight scenes."""
    act = vla_methods.drawn(vla_methods.logits_fn(experiment.module))
    starts = experiment.world.starts(experiment.tasks[:8], 0)
    return experiment.world.play(act, params, starts, jax.random.key(1), Acting(Plan(2, 3)))


def test_demonstrated_chunks_are_what_the_expert_went_on_to_do():
    """Two episodes of four steps by hand; the second fails and is left out, the first ends after three."""
    actions = np.arange(8.0).reshape(2, 4, 1)
    live = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool)
    seen = {"step": np.arange(8).reshape(2, 4)}
    index = np.arange(2)
    rollout = EpisodeRollout(
        (seen, actions), actions, live[:, :, None], np.array([1.0, 0]), live.sum(1), index, index + 5
    )
    found = vla_worlds.as_demonstrations(rollout, 2)
    np.testing.assert_array_equal(found.observation["step"], [0, 1, 2])
    np.testing.assert_array_equal(found.actions[:, :, 0], [[0, 1], [1, 2], [2, 3]])
    np.testing.assert_array_equal(found.counted, [[True, True], [True, True], [True, False]])
    np.testing.assert_array_equal(found.task, [5, 5, 5])


def test_a_scene_is_the_same_for_every_episode_of_its_group_and_what_disturbs_it_is_not(experiment, params):
    act = vla_methods.drawn(vla_methods.logits_fn(experiment.module))
    starts = experiment.world.starts(experiment.tasks[:4], 0, pad=True)
    rollout = experiment.world.play(act, params, starts, jax.random.key(1), Acting(Plan(1, 2), group=2))
    position = np.asarray(rollout.states.position)[:, 0].reshape(-1, 2, *rollout.states.position.shape[2:])
    np.testing.assert_array_equal(position[:, 0], position[:, 1])
    keys = jax.random.key_data(rollout.states.key)[:, 0]
    assert len(np.unique(np.asarray(keys), axis=0)) == len(keys)
    np.testing.assert_array_equal(rollout.group, np.repeat(np.arange(len(rollout.group) // 2), 2))


def test_the_expert_labels_the_states_that_the_student_reached(experiment, played):
    labels = vla_methods.expert_labels(experiment.world, 2, 0.1)(None, played)
    state = jax.tree.map(lambda leaf: leaf[3, 1], played.states)
    action = action_tokens.decode(jnp.argmax(labels.logits[3, 1, 0], -1))
    np.testing.assert_allclose(action, tabletop.expert(state), atol=1 / 255 + 1e-6)


def test_neither_labels_nor_practice_foresee_what_will_disturb_the_episode(experiment, played):
    """Chunks from one state, by the keys of its disturbances."""
    states = jax.tree.map(lambda leaf: jnp.repeat(leaf[3:4, 1:2], 8, axis=0), played.states)
    keys = jax.random.split(jax.random.key(5), 8)
    states = states._replace(key=keys[:, None])
    chunks = experiment.world.chunks(states, 8)
    np.testing.assert_array_equal(chunks, jnp.repeat(chunks[:1], 8, axis=0))
    alone = jax.tree.map(lambda leaf: leaf[:, 0], states)
    disturbed = jax.vmap(lambda state: tabletop.step(state, chunks[0, 0, 0]).gripper)(alone)
    assert len(np.unique(np.asarray(disturbed), axis=0)) == 8, "the states were disturbed in the same way"
    practised = tabletop_skills.moment(jax.random.key(3))
    other = practised._replace(state=practised.state._replace(key=jax.random.key(99)))
    np.testing.assert_array_equal(*(tabletop_skills.chunk(one, 8) for one in (practised, other)))


def test_a_teacher_that_is_the_student_teaches_nothing(experiment, params, played):
    labels = vla_methods.network_labels(vla_methods.logits_fn(experiment.module))(params, played)
    result = jax.jit(vla_opd.supervise(vla_methods.logits_fn(experiment.module)))(params, played, labels, None)
    assert float(jnp.abs(result.total).max()) < 1e-4 and float(result.weight.min()) > 0


def test_what_was_sampled_is_what_the_loss_scores(experiment, params, played):
    advantage = vla_methods.RewardLabels(jnp.ones(8))
    metrics = jax.jit(vla_opd.grpo(vla_methods.logits_fn(experiment.module)))(params, played, advantage, None).metrics
    np.testing.assert_allclose(metrics["ratio"], 1.0, rtol=1e-4)


def test_a_chunk_of_a_flow_is_drawn_labelled_and_learnt_from(experiment):
    """One update, of one decision in each of eight scenes."""
    flow, recipe = experiment.policies["flow"], arm_recipe(experiment.config, "vla_opd")
    method, optimizer = flow.on_policy(recipe)
    params = jax.jit(flow.init)(jax.random.key(0), vla_tabletop.first_observation())
    batch = experiment.world.starts(experiment.tasks[:8], 0)._asdict() | {"decisions": 1}
    rollout = method.sample(params, batch, jax.random.key(1))
    labels = method.label(None, rollout)
    chunk = rollout.drawn.states[:, 0, -1]
    assert chunk.shape == labels.velocity.shape[:1] + labels.velocity.shape[3:] and bool(jnp.isfinite(chunk).all())
    _, metrics = method.update(optim.init_state(params, optimizer), rollout, labels, jax.random.key(2))
    assert metrics["reverse_kl"] > 0 and metrics["success"] == rollout.success.mean()


def test_demonstrated_chunks_are_noised_each_to_a_time_of_its_own(experiment):
    method, _ = experiment.policies["flow"].imitation(experiment.config.sft)
    batch = jax.tree.map(lambda *rows: jnp.stack(rows), *map(experiment.few.row, range(8)))
    rollout = method.sample(None, batch, jax.random.key(0))
    t = rollout.t[:, None, None, None]
    np.testing.assert_allclose(rollout.x - t * rollout.velocity, batch["actions"][..., None], atol=1e-5)
    assert len(np.unique(rollout.t)) == 8


def test_a_film_begins_where_the_episode_began_and_stands_still_after_its_end(played):
    rollout = played._replace(length=jnp.full(8, 3))
    frames = vla_tabletop.film(rollout, vla_pictures.executed(rollout, 3), np.array([2, 5]))
    first = np.asarray(played.observation.images)[[2, 5], 0]
    np.testing.assert_array_equal(frames[:, 0], np.concatenate([first[:, 0], first[:, 1]], 2))
    second = np.asarray(played.observation.images)[[2, 5], 1]
    np.testing.assert_array_equal(frames[:, 1], np.concatenate([second[:, 0], second[:, 1]], 2))
    np.testing.assert_array_equal(frames[:, 2], frames[:, 1])


def test_disagreement_is_that_of_the_loss_decision_by_decision(experiment, params, played):
    policy_fn = vla_methods.logits_fn(experiment.module)
    played = played._replace(counted=played.counted.at[0, 1].set(False))
    labels = vla_methods.expert_labels(experiment.world, 8, 0.1)(None, played)
    each = vla_pictures.disagreement(policy_fn, params, played, labels)
    whole = jax.jit(vla_opd.supervise(policy_fn))(params, played, labels, None)
    assert each.shape == (8, 2) and bool(jnp.isnan(each[0, 1])) and int(jnp.isnan(each).sum()) == 1
    np.testing.assert_allclose(jnp.nanmean(each, 1), whole.metrics["reverse_kl"], rtol=1e-4)


def test_a_policy_that_has_practised_is_begun_with_whatever_the_head(experiment, params, tmp_path):
    path = tmp_path / "base.safetensors"
    stages.save(path, stages.Made(params, "recipe", params_sha256(params), 1.0, 8), {})
    base = vla_tabletop.load(str(path), experiment.config.policy)
    flow = jax.jit(experiment.policies["flow"].init)(jax.random.key(9), vla_tabletop.first_observation())
    begun = vla_tabletop.begin(flow, base.params)
    assert jax.tree.structure(begun) == jax.tree.structure(flow)
    np.testing.assert_array_equal(begun["projector"]["fc1"]["kernel"], params["projector"]["fc1"]["kernel"])
    np.testing.assert_array_equal(begun["action_in_proj"]["kernel"], flow["action_in_proj"]["kernel"])
    with pytest.raises(ConfigError, match="no such file"):
        vla_tabletop.load(str(tmp_path / "nothing"), experiment.config.policy)
    with pytest.raises(ConfigError, match="is not a policy of width=64"):
        vla_tabletop.load(str(path), configs.get_config().policy)


def test_practice_is_what_the_hand_does_next(experiment):
    rollout = vla_base.practise(np.arange(8, dtype=np.uint32), steps=2)
    moment = tabletop_skills.moment(jax.random.key(np.uint32(3)))
    np.testing.assert_array_equal(rollout.observation.instruction[3, 0], moment.instruction)
    np.testing.assert_allclose(rollout.states.actions[3, 0], tabletop_skills.chunk(moment, 2), atol=1e-5)
    np.testing.assert_allclose(rollout.states.aim[3, 0], tabletop_skills.aim(moment), atol=1e-5)


def test_practice_also_points_at_what_is_named(experiment, params):
    config = base_configs.get_config("tiny").unlock()
    config.policy = experiment.config.policy
    method, _ = vla_base.method_of(config, experiment.module, config.practice)
    rollout = method.sample(None, {"seed": np.arange(8, dtype=np.uint32)}, None)
    labels = method.label(None, rollout)
    own = vla_opd.supervise(vla_methods.logits_fn(experiment.module), "forward_kl")
    plain = jax.jit(own)(params, rollout, labels.actions, None)
    both = jax.jit(lambda p: vla_base.pointing(experiment.module, 2.0, own, p, rollout, labels, None))(params)
    expected = plain.total + 2.0 * both.metrics["missed"] * plain.weight
    np.testing.assert_allclose(both.total, expected, rtol=1e-5)
    assert (both.metrics["missed"] > 0).all() and (
        (both.metrics["pointed"] >= 0) & (both.metrics["pointed"] <= 1)
    ).all()


def test_a_cost_is_counted(played):
    count = lambda rollout: {name: value.sum() for name, value in vla_episodes.counts(rollout, {}).items()}
    cost = count(played)
    assert cost["environment_steps"] == played.length.sum() == 8 * 6
    assert (cost["episodes"], cost["decisions"]) == (8, 16) and "redone" not in cost
    again = count(played._replace(redone=jnp.tile(jnp.array([1, 2]), (8, 1))))
    assert (again["redone"], again["redone_beside"]) == (8, 16)


def test_groups_that_teach_nothing_give_way_and_are_counted(experiment, params):
    """GRPO of eight scenes, two episodes each: all fail, then one group of each refill is told to be of two kinds."""
    recipe = arm_recipe(experiment.config, "opd_then_grpo")
    recipe.unlock()
    recipe.update({"refills": 2, "updates": 2})
    method, optimizer = experiment.policies["bins"].on_policy(recipe)
    batch = next(experiment.scenes(recipe, 0)) | {"decisions": 1}
    assert [starts.task.shape for starts in batch["more"]] == [(8,), (8,)]
    alone = {name: value for name, value in batch.items() if name != "more"}
    plain, good, asked, play = method.sample(params, alone, jax.random.key(1)), (16, 14, 2), [], experiment.world.play

    def told(act, params, starts, key, acting):
        rollout = play(act, params, starts, key, acting)
        asked.append(starts)
        success = jnp.zeros(16).at[good[len(asked) - 1]].set(1.0)
        return rollout._replace(success=jax.device_put(success, rollout.success.sharding))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment.world, "play", told)
        rollout = method.sample(params, batch, jax.random.key(1))
    assert len(asked) == 3  # all there are
    assert rollout.success.tolist() == [1, 0, 1, 0] + [0] * 12
    np.testing.assert_array_equal(rollout.task[::2], [asked[1].task[7], asked[2].task[1], *asked[0].task[:6]])
    kept = lambda rollout, rows: jax.tree.map(lambda leaf: np.asarray(leaf)[rows], (rollout.drawn, rollout.observation))
    same = kept(rollout, slice(4, None)), kept(plain, slice(12))
    jax.tree.map(np.testing.assert_array_equal, *same)  # the first are those of no refills

    labels = method.label(None, rollout)
    assert (labels.advantage != 0).tolist() == [True] * 4 + [False] * 12
    _, metrics = method.update(optim.init_state(params, optimizer), rollout, labels, jax.random.key(2))
    assert metrics["episodes"] == 48 and metrics["success"] == np.float32(2 / 48)
    assert metrics["environment_steps"] == 3 * plain.length.sum()


def test_the_demonstrations_of_a_config_are_successes_of_its_tasks(experiment):
    shown = experiment.few
    assert set(shown.task) == set(experiment.tasks)
    assert shown.counted[:, 0].all() and np.abs(shown.actions).max() <= 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"world": "kitchen"}, "world='kitchen': choose one of tabletop, metaworld"),
        ({"suites": ("kitchen",)}, "there is no 'kitchen'"),
        ({"held_out": ("object/99",)}, "there is no task 'object/99'"),
        ({"held_out": ("goal/1",)}, "'goal/1' is of no suite"),
        ({"held_out": tuple(f"object/{i}" for i in range(10))}, "has all of object"),
        ({"policy__executed": 9}, "policy.executed=9"),
        ({"policy__width": 36}, "policy.width=36"),
        ({"policy__points": -1}, "policy.points=-1"),
        ({"policy__layers": 0}, "policy.layers=0"),
        ({"seeds": ()}, "seeds=()"),
        ({"flow__steps": 1, "arms__vla_opd__head": "flow"}, "flow.steps=1"),
        ({"flow__noise_level": 0.0, "arms__vla_opd__head": "flow"}, "flow.noise_level=0.0"),
        ({"sft__decay_steps": 4}, "steps=3: give 4 or more, warmup + decay_steps, or lower these (sft)"),
        (
            {"arms__opd_then_grpo__warmup": 3},
            "steps=2: give 4 or more, warmup + decay_steps, or lower these (arm opd_then_grpo)",
        ),
        ({"save_every": 0}, "save_every=0: give 1 or more"),
        ({"opd__learning_rate": -1.0}, "learning_rate=-1.0 (arms sft_many, vla_opd)"),
        ({"opd__ema_decay": 1.0}, "ema_decay=1.0 (arms "),
        ({"arms__vla_opd": {"learning_rte": 1.0}}, "arms.vla_opd.learning_rte: opd has no such setting; did you mean"),
        ({"student__path": "/nowhere"}, "student.path=/nowhere: is of simulators"),
        ({"opd__steps": 0}, "steps=0 (arms opd_then_grpo, sft_many, vla_opd): give 1 or more"),
        ({"sigma": 0.0}, "sigma=0.0"),
        ({"demos": "somewhere"}, "demos=somewhere: the tabletop's expert demonstrates"),
        ({"base": "practised"}, "base='practised': is of simulators"),
        ({"eval__episodes": 0}, "eval.episodes=0"),
        ({"demonstrations__few": 0}, "few=0"),
        ({"opd__objective": "kl"}, "objective='kl'"),
        ({"opd__method": "ppo"}, "method='ppo'"),
        ({"opd__head": "regression"}, "head='regression'"),
        ({"arms__opd_then_grpo__head": "flow"}, "method='grpo' (arm opd_then_grpo)"),
        ({"opd__start": "nobody"}, "start='nobody'"),
        ({"opd__teacher": "nobody"}, "teacher='nobody'"),
        ({"arms__vla_opd__teacher": "vla_opd"}, "teacher='vla_opd' (arm vla_opd)"),
        ({"opd__temperature": 0.0}, "temperature=0.0"),
        (
            {"arms__vla_opd__objective": "sampled"},
            "acting_temperature=0.3, temperature=1.0 (arm vla_opd): objective='sampled' scores what was drawn",
        ),
        ({"opd__batch_size": 7}, "arms opd_then_grpo, vla_opd: batch_size=7: does not split"),
        ({"opd__micro_batches": 5}, "micro_batches=5"),
        ({"arms__opd_then_grpo__group": 1}, "group=1 (arm opd_then_grpo)"),
        ({"opd__updates": 0}, "updates=0 (arms opd_then_grpo, vla_opd): give 1 or more"),
        ({"opd__updates": 3}, "16 episodes do not divide into updates=3"),
        ({"opd__updates": 4}, "arms opd_then_grpo, vla_opd: records=4: does not split over 8 devices"),
        (
            {"arms__vla_opd": {"objective": "sampled", "acting_temperature": 1.0, "updates": 2}},
            "updates=2 (arm vla_opd): objective='sampled' is of the policy that drew; set 1",
        ),
        ({"arms__opd_then_grpo__refills": -1}, "refills=-1 (arm opd_then_grpo)"),
        ({"arms__vla_opd__refills": 1}, "refills=1 (arm vla_opd): are of method='grpo'; set 0"),
        ({"opd__kept": (0.9, 0.1)}, "kept=(0.9, 0.1) (arms opd_then_grpo, sft_many, vla_opd): give two shares"),
        ({"opd__kept": (0.5,)}, "kept=(0.5,)"),
    ],
)
def test_what_is_refused_before_anything(changes, says):
    with pytest.raises(ConfigError) as error:
        vla.validate(config_of(**changes), MESH)
    assert says in str(error.value)


def test_an_arm_whose_start_is_left_out_says_what_to_do():
    config = config_of()
    del config.arms["vla_opd"]
    with pytest.raises(ConfigError, match=r"start='vla_opd' \(arm opd_then_grpo\): is no .* name it in `only`, too"):
        vla.validate(config, MESH)


def test_an_arm_that_asks_no_teacher_needs_none(tmp_path):
    """Though `opd.teacher` says that one is given: GRPO goes by success alone."""
    config = config_of(opd__teacher="given", opd__method="grpo", opd__group=8, opd__batch_size=8)
    del config.arms["opd_then_grpo"], config.arms["sft_many"]
    own, found = Experiment(config, tmp_path, MESH), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "trained", lambda stage, *_, **run: found.setdefault(stage, run) and None)
        patch.setattr(own, "student", lambda *_: stages.Made({}, "", "sha", 0.0, 0))
        own.arm("vla_opd", 0)
    assert found["vla_opd_seed0"]["teacher_params"] is None


def test_stages_of_the_tabletop_are_those_of_before_there_were_worlds(tmp_path):
    """Their recipes name no world, so that what has been made stays valid: this one is of an earlier version."""
    found = {}

    def trained(stage, workdir, recipe, *rest, **run):
        found[stage] = recipe
        return stages.Made({}, recipe, "sha", 0.0, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "trained", trained)
        fresh = Experiment(configs.get_config("tiny"), tmp_path, MESH)
        fresh.arm("vla_opd", 0)
    assert found["vla_opd_seed0"].startswith("6f4eff833beb")


def test_the_report_says_how_noisy_sampled_tokens_are(experiment):
    line = {"stage": "vla_opd_seed0", "exact_gradient_square": 0.5, "sampled_gradient_variance": 4.0}
    others = [line | {"stage": "vla_opd_seed1"}, {"stage": "opd_then_grpo_seed0"}, line | {"stage": "sft_many_seed0"}]
    made = dict.fromkeys(("vla_opd", "sft_many", "opd_then_grpo"))
    (said,) = vla_notes.noise(experiment, [line, line | {"sampled_gradient_variance": 6.0}, *others], made)
    assert said.endswith("means of all updates: vla_opd 10.0.")
    assert vla_notes.noise(experiment, others[1:], made) == []


def test_a_task_without_success_is_told_of_with_its_causes(experiment):
    """One task of one seed, where the average is not zero; the expert fails in it, too."""
    a, b, c = experiment.tasks[:3]
    names = [experiment.world.tasks[task].name for task in (a, b, c)]
    known = {a: 1.0, b: 0.0, c: 1.0}
    student, arm = [{a: 1.0, b: 0.0, c: 0.5}], [{a: 1.0, b: 0.2, c: 0.0}]
    say = lambda name, *rest: vla_notes.zeros(experiment, name, *rest)
    which, beyond, why = say("student, before", student, known)
    assert which == f"student, before: none of 1 episodes succeeds in {names[1]}, which may be chance."
    assert beyond.startswith(f"The expert never succeeds in {names[1]} (") and "horizon is too short" in beyond
    assert "raise demonstrations.few, now 1, or sft.steps, now 3" in why

    line = lambda step, kl: {"stage": "vla_opd_seed0", "step": step, "reverse_kl": kl}
    which, why = say("vla_opd", arm, known, [line(0, 2.0), line(1, 0.5), line(0, 9.0) | {"stage": "other"}])
    assert which == f"vla_opd, seed 0: none of 1 episodes succeeds in {names[2]}, which may be chance."
    assert "reverse_kl falls, 2 to 0.5, while success stays 0" in why
    assert "does not fall, 0.5 to 2" in say("vla_opd", arm, known, [line(0, 0.5), line(1, 2.0)])[1]
    own = experiment.config.arms.vla_opd
    own.objective, hard = "hard_cross_entropy", [line(0, 0.5) | {"loss": 3.0}, line(1, 2.0) | {"loss": 1.0}]
    assert "Its loss falls, 3 to 1" in say("vla_opd", arm, known, hard)[1], "its reverse KL may well rise"
    del own.objective
    assert "GRPO has no reward" in say("opd_then_grpo", arm, known)[1]
    assert "demonstrations.many, now 2" in say("sft_many", arm, known)[1]
    assert "no use" in say("expert", [known], known)[-1] and len(say("expert", [known], known)) == 2
    assert say("vla_opd", [{a: 0.1, b: 0.1, c: 0.1}], known) == []


def test_zeros_of_every_seed_are_told_apart(tmp_path):
    experiment = Experiment(config_of(seeds=(4, 5), eval__episodes=16), tmp_path, MESH)
    tasks = experiment.tasks
    lines = vla_notes.zeros(experiment, "student, before", [dict.fromkeys(tasks, 0.0), dict.fromkeys(tasks, 0.0)])
    assert [line.split(":")[0] for line in lines[:2]] == ["student, before, seed 4", "student, before, seed 5"]
    assert lines[0].endswith(f"and {len(tasks) - vla_notes.SHOWN} more.") and "none of 16" in lines[0]


def success_lines(stage: str, values, steps: int = 10) -> list[dict]:
    return [{"stage": stage, "step": i, "success": s, "environment_steps": steps} for i, s in enumerate(values)]


def test_steps_to_a_mark_are_by_the_running_mean_of_twenty_updates():
    assert vla_notes.WINDOW == 20
    rising = success_lines("a", [0.0] * 20 + [1.0] * 20)
    assert vla_notes.steps_to(rising, 0.5) == (300.0, 0.5)  # ten of twenty, after thirty updates
    assert vla_notes.steps_to(rising) == (400.0, 1.0)
    assert vla_notes.steps_to(rising, 1.01) is None and vla_notes.steps_to(rising[:19], 0.0) is None
    assert vla_notes.steps_to(success_lines("a", [0.5] * 40))[0] == 200.0  # the first of equals


def test_how_soon_an_arm_is_as_good_as_grpo_ever_is():
    config = changed(configs.get_config("seeds"), seeds=(0, 1))
    lines = success_lines("grpo_seed0", [0.2] * 20 + [0.4] * 20) + success_lines("grpo_seed1", [0.3] * 25)
    lines += success_lines("vla_opd_seed0", [0.4] * 20, 5) + success_lines("vla_opd_seed1", [0.2] * 30)
    lines += success_lines("opd_then_grpo_seed0", [0.9] * 20) + success_lines("sampled_seed0", [0.9] * 20)
    found = vla_notes.sooner(config, lines)
    assert found == {
        "grpo": {
            "success": [pytest.approx(0.4), pytest.approx(0.3)],
            "steps": {"grpo": [400.0, 200.0], "vla_opd": [100.0, None]},
        }
    }  # nothing of arms that begin elsewhere, act at another temperature, or have not been run
    (said,) = vla_notes.sooner_note(found)
    assert "0.40, 0.30: grpo 400, 200; vla_opd 100 (0.25 times that), never." in said
    assert vla_notes.sooner(config, lines[:5]) == {} and vla_notes.sooner_note({}) == []


def test_success_is_shown_against_queries_of_those_that_ask(experiment):
    line = lambda stage: {"stage": stage, "step": 0, "seconds": 1.0, "success": 0.5, "environment_steps": 9}
    lines = [line(f"{name}_seed0") | {"decisions": 3.0} for name in ("vla_opd", "opd_then_grpo")]
    lines.append(lines[0] | {"step": 1, "success": 0.6})
    found = vla.by_costs(experiment, [*lines, {"stage": "sft_many_seed0", "step": 0, "seconds": 1.0, "success": 1.0}])
    assert found["success by teacher_queries"] == {"vla_opd_seed0": ([3.0, 6.0], [0.5, 0.6])}
    acted = {"vla_opd_seed0", "opd_then_grpo_seed0"}
    assert set(found["success by environment_steps"]) == set(found["success by seconds"]) == acted


def test_success_of_every_suite_is_counted_and_shown_apart(tmp_path, played):
    """Of an update without an episode of a suite the costs are spent all the same."""
    experiment = Experiment(config_of(suites=("object", "goal")), tmp_path, MESH)
    world, suites = experiment.world, experiment.config.suites
    goal = next(i for i, task in enumerate(world.tasks) if task.suite == "goal")
    mixed = played._replace(task=jnp.array([goal] * 3 + [experiment.tasks[0]] * 5), success=jnp.arange(8.0) % 2)
    counts = vla_episodes.counts(mixed, vla_episodes.of_suites(world, suites))
    counts = {name: float(value.sum()) for name, value in counts.items() if name.split("_")[-1] in suites}
    assert counts == {"episodes_object": 5, "succeeded_object": 3, "episodes_goal": 3, "succeeded_goal": 1}
    assert vla_episodes.of_suites(world, ("object",)) == {}
    line = {"stage": "vla_opd_seed0", "seconds": 1.0, "success": 0.5, "environment_steps": 9, "decisions": 3.0}
    none = {"episodes_object": 8.0, "succeeded_object": 2.0, "episodes_goal": 0.0, "succeeded_goal": 0.0}
    lines = [line | none, line | counts]
    found = vla.by_costs(experiment, lines)
    assert found["goal by environment_steps"] == {"vla_opd_seed0": ([18], [pytest.approx(1 / 3)])}
    assert found["object by environment_steps"] == {"vla_opd_seed0": ([9, 18], [0.25, 0.6])}


def test_the_students_row_has_the_cost_of_its_demonstrations(experiment):
    spent = experiment.shown_to_students()
    assert spent == {"environment_steps": len(experiment.few.task), "teacher_queries": len(experiment.few.task)}
    made = [stages.Made({}, "", "", seconds, 0) for seconds in (1.0, 2.2)]
    assert vla.costs(spent, made) == {
        "environment steps": len(experiment.few.task), "teacher queries": len(experiment.few.task), "seconds": 2
    }  # fmt: skip


def test_starts_are_scenes_of_the_tasks_that_are_asked_for(experiment):
    starts = experiment.world.starts([3, 4, 5], 0, pad=True)
    assert isinstance(starts, Starts) and len(starts.task) == 8
    np.testing.assert_array_equal(starts.task, [3, 4, 5, 3, 4, 5, 3, 4])
