"""The tabletop world: what contacts do, what counts as solved, what the pictures show, and what the expert can do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.worlds import tabletop
from opd_jax.worlds import tabletop_bodies as bodies
from opd_jax.worlds import tabletop_physics as physics
from opd_jax.worlds import tabletop_tasks as tasks
from opd_jax.worlds.tabletop_bodies import (
    BASKET,
    BASKET_AT,
    BOWL,
    BOX,
    CAN,
    CUBE,
    GAP_MAX,
    HANDLE,
    HANDLE_AT,
    HEIGHT,
    PLATE,
    RADIUS,
    SEAT,
    STOVE,
    STOVE_AT,
    WELL,
    N,
)

TASKS, EACH, STEPS, RANDOM = len(tabletop.TASKS), 4, 170, 20
TASK = np.tile(np.arange(TASKS), EACH)  # the task of each episode of a batch
SUITE = TASK // 10
FIRST_HALF = np.arange(len(TASK)) < len(TASK) // 2
HORIZON = np.array([tabletop.horizon(task) for task in TASK])


def _play(state, actions, given):
    """The expert, but the given actions where `given [T, B]` is True: states, success and actions of every step."""

    def advance(state, xs):
        action = jnp.where(xs[1], xs[0], tabletop.expert(state))
        state = tabletop.step(state, action)
        return state, (state, tabletop.success(state), action)

    return jax.lax.scan(jax.vmap(advance, in_axes=(0, (0, 0))), state, (actions, given))[1]


play = jax.jit(_play)
run = jax.jit(lambda state, actions: jax.lax.scan(lambda s, a: (tabletop.step(s, a),) * 2, state, actions)[1])
resets = {
    split: jax.jit(jax.vmap(lambda key, task, strength, s=split: tabletop.reset(key, task, s, strength), (0, 0, None)))
    for split in ("train", "test")
}
observe = jax.jit(jax.vmap(tabletop.observe))
success = jax.jit(jax.vmap(tabletop.success))


def one(states, episode):
    """One episode's state of a batch."""
    return jax.tree.map(lambda leaf: leaf[episode], states)


def begin(split, seed, strength=1.0):
    return resets[split](jax.random.split(jax.random.key(seed), len(TASK)), jnp.asarray(TASK), strength)


def solved(done, spare=0):
    """Which of the B episodes succeed within their horizon and `spare` steps; from `done [T, B]`."""
    return (np.asarray(done) & (np.arange(STEPS)[:, None] < HORIZON + spare)).any(0)


@pytest.fixture(scope="module")
def expert_runs():
    """The expert's episodes from both splits, each (first states, (states, success, actions))."""
    starts = {split: begin(split, seed) for seed, split in enumerate(("train", "test"))}
    nothing = jnp.zeros((STEPS, len(TASK), 4)), jnp.zeros((STEPS, len(TASK)), bool)
    return {split: (start, play(start, *nothing)) for split, start in starts.items()}


@pytest.fixture(scope="module")
def disturbed_runs():
    """Random actions: throughout in the first half of the batch, in the other until the expert takes over.

    In every second episode they push on for ten steps and stay low, where things are.
    """
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (STEPS, len(TASK), 4))
    slow = np.repeat(rng.uniform(-1.5, 1.5, (STEPS // 10, len(TASK), 4)), 10, 0) - [0, 0, 0.4, 0]
    actions[:, ::2] = slow[:, ::2]
    given = (np.arange(STEPS)[:, None] < RANDOM) | FIRST_HALF
    return play(begin("test", 7), jnp.asarray(actions, jnp.float32), jnp.asarray(given))


# ---- contacts, on tables laid by hand ----


def table(*things, hand=(0.0, 0.0, 0.5), gap=GAP_MAX, opening=0.0, strength=0.0):
    """A state with `things` (kind, x, y, z); fixtures take their own places, others the first that are free."""
    places = {BASKET: BASKET_AT, STOVE: STOVE_AT, HANDLE: HANDLE_AT}
    kind, position = np.zeros(N, np.int32), np.stack([4 + np.arange(N), np.full(N, 4), np.zeros(N)], 1)
    free = 0
    for what, *where in things:
        place = places.get(what, free)
        free += what not in places
        kind[place], position[place] = what, where
    if kind[HANDLE_AT]:
        position[HANDLE_AT, 1] = bodies.CABINET_FRONT - bodies.HANDLE_REACH - opening
    return one(begin("train", 0), 0)._replace(
        gripper=jnp.array(hand),
        gap=jnp.asarray(gap),
        disturbance=jnp.asarray(strength),
        kind=jnp.asarray(kind),
        color=jnp.zeros(N, jnp.int32),
        position=jnp.asarray(position, jnp.float32),
    )


def act(state, *phases, steps=24):
    """The states after each of `steps`; phases are (how many steps, dx, dy, dz, fingers), the last one goes on."""
    actions = [action for count, *action in phases for _ in range(count)]
    actions += [phases[-1][1:]] * (steps - len(actions))
    return run(state, jnp.array(actions[:steps], jnp.float32))


GRASP = ((8, 0, 0, -1, -1), (5, 0, 0, 0, 1), (11, 0, 0, 1, 1))


@pytest.mark.parametrize("kind", [CUBE, CAN, BOWL])
@pytest.mark.parametrize("offset", [(0.0, 0.0), (0.04, 0.03), (-0.04, -0.03)])
def test_what_the_fingers_enclose_is_grasped_centred_and_lifted(kind, offset):
    after = act(table((kind, *offset, 0.0)), *GRASP)
    assert after.held[-1] == 0
    assert after.position[-1, 0, 2] > 0.4
    np.testing.assert_allclose(after.position[-1, 0, 0], after.gripper[-1, 0], atol=0.01)
    np.testing.assert_allclose(after.gap[-1], RADIUS[kind], atol=1e-3)


@pytest.mark.parametrize(
    ("offset", "phases"),
    [
        ((0.0, 0.09), GRASP),  # beside the fingers' line
        ((0.35, 0.0), GRASP),  # out of reach
        ((0.0, 0.0), ((3, 0, 0, -1, -1), (5, 0, 0, 0, 1), (16, 0, 0, 1, 1))),  # too high
        ((0.0, 0.0), ((8, 0, 0, -1, -1), (16, 0, 0, 1, -1))),  # never closed
    ],
)
def test_what_is_not_enclosed_is_not_grasped(offset, phases):
    after = act(table((CUBE, *offset, 0.0)), *phases)
    assert (after.held == -1).all()
    assert after.position[-1, 0, 2] == 0


def test_plates_are_too_wide_to_grasp():
    assert (act(table((PLATE, 0.0, 0.0, 0.0)), *GRASP).held == -1).all()


def test_fingers_closing_beside_a_thing_push_it_away():
    after = act(table((CUBE, 0.0, 0.09, 0.0)), *GRASP)
    assert np.linalg.norm(after.position[-1, 0, :2] - np.array([0.0, 0.09])) > 0.01


def test_a_finger_that_comes_down_on_a_thing_stops_there():
    after = act(table((CUBE, 0.23, 0.0, 0.0)), (24, 0, 0, -1, -1))
    np.testing.assert_allclose(after.gripper[-1, 2], HEIGHT[CUBE], atol=1e-5)


def test_closed_fingers_push_things_into_one_another_without_overlap():
    state = table((CAN, 0.2, 0.0, 0.0), (CUBE, 0.45, 0.01, 0.0), hand=(-0.1, 0.0, 0.02), gap=0.02)
    after = act(state, (6, 1, 0, 0, 1), (18, 0, 0, 0, 1))
    assert after.position[-1, 0, 0] > 0.4
    assert after.position[-1, 1, 0] > 0.55
    assert overlap(after).max() < 0.03


def test_fixtures_and_the_rim_do_not_give_way():
    state = table((STOVE, 0.4, 0.0, 0.0), hand=(-0.2, 0.0, 0.02), gap=0.02)
    after = act(state, (24, 1, 0, 0, 1))
    assert after.position[-1, STOVE_AT, 0] == state.position[STOVE_AT, 0]
    assert after.gripper[-1, 0] < 0.4 - RADIUS[STOVE]
    after = act(table((CAN, 0.5, 0.0, 0.0), hand=(0.2, 0.0, 0.02), gap=0.02), (24, 1, 0, 0, 1))
    np.testing.assert_allclose(after.position[-1, 0, 0], 1 - RADIUS[CAN], atol=1e-3)
    assert after.gripper[-1, 0] < 1 - 2 * RADIUS[CAN]


@pytest.mark.parametrize(
    ("kind", "below", "offset", "height"),
    [
        (CUBE, None, 0.0, 0.0),
        (CUBE, CUBE, 0.03, HEIGHT[CUBE]),
        (CUBE, BOWL, 0.05, SEAT[BOWL]),
        (BOWL, PLATE, 0.05, HEIGHT[PLATE]),
        (CAN, STOVE, 0.05, HEIGHT[STOVE]),
        (CAN, BASKET, 0.1, SEAT[BASKET]),
        (CUBE, CAN, 0.08, 0.0),  # badly centred: it topples off
        (CUBE, BASKET, 0.25, 0.0),  # on the edge
    ],
)
def test_things_fall_on_what_is_below_and_topple_off_when_not_centred(kind, below, offset, height):
    things = [(kind, offset, 0.0, 0.5)] + ([(below, 0.0, 0.0, 0.0)] if below is not None else [])
    after = act(table(*things, hand=(-0.7, 0.0, 0.5)), (24, 0, 0, 0, -1))
    assert after.position[0, 0, 2] > 0.35, "it falls, it does not jump"
    np.testing.assert_allclose(after.position[-1, 0, 2], height, atol=1e-5)
    np.testing.assert_allclose(after.position[-1], after.position[-2], atol=1e-5)
    assert overlap(after)[-1].max() < 0.02
    if height == SEAT[BOWL]:
        assert np.linalg.norm(after.position[-1, 0, :2] - after.position[-1, 1, :2]) <= WELL[BOWL] - RADIUS[CUBE] + 0.01


def test_what_lies_in_a_bowl_is_carried_along():
    after = act(
        table((BOWL, 0.0, 0.0, 0.0), (CUBE, 0.0, 0.0, SEAT[BOWL])), *GRASP[:2], (4, 0, 0, 1, 1), (7, 1, 0, 0, 1)
    )
    bowl, cube = after.position[-1, 0], after.position[-1, 1]
    assert bowl[2] > 0.2
    assert bowl[0] > 0.4
    np.testing.assert_allclose(cube - bowl, [0, 0, SEAT[BOWL]], atol=0.03)


def test_the_drawer_follows_its_handle_with_what_is_in_it_and_nothing_else_moves_it():
    handle = (HANDLE, -0.6, 0.0, 0.0)
    state = table(handle, (CUBE, -0.6, 0.42, bodies.DRAWER_SEAT), hand=(-0.6, 0.23, 0.3), opening=0.3)
    after = act(state, (6, 0, 0, -1, -1), (4, 0, 0, 0, 1), (10, 0, 1, 0, 1))
    assert after.held[-1] == HANDLE_AT
    opening = bodies.drawer_opening(one(after, -1))
    np.testing.assert_allclose(opening, 0, atol=1e-5)
    np.testing.assert_allclose(after.position[-1, 0] - state.position[0], [0, 0.3, 0], atol=0.01)
    back = act(one(after, -1), (24, 0, -1, 0, 1))
    opening = bodies.drawer_opening(one(back, -1))
    np.testing.assert_allclose(opening, bodies.DRAWER_MAX, atol=1e-5)
    pushed = act(state._replace(gripper=jnp.array([-0.6, -0.2, 0.02]), gap=jnp.asarray(0.02)), (24, 0, 1, 0, 1))
    np.testing.assert_allclose(pushed.position[-1, HANDLE_AT], state.position[HANDLE_AT])


# ---- invariants, under the wildest actions ----


def overlap(states):
    """How deep each pair of bodies that are on one level is in one another: [..., N, N]; what is in a hollow is not."""
    position, kind = np.asarray(states.position), np.asarray(states.kind)
    radius, height, well = RADIUS[kind], HEIGHT[kind], WELL[kind]
    apart = np.linalg.norm(position[..., :, None, :2] - position[..., None, :, :2], axis=-1)
    low = position[..., 2]
    level = np.minimum((low + height)[..., :, None], (low + height)[..., None, :])
    level = level - np.maximum(low[..., :, None], low[..., None, :]) > 0.02
    hollow = (radius[..., :, None] < well[..., None, :]) & (apart < well[..., None, :])
    hollow = hollow | np.swapaxes(hollow, -1, -2) | np.eye(N, dtype=bool)
    there = (kind[..., :, None] > 0) & (kind[..., None, :] > 0)
    depth = radius[..., :, None] + radius[..., None, :] - apart
    return np.where(level & ~hollow & there, depth, 0)


def test_nothing_breaks_under_random_actions_nor_when_the_expert_mends_it(disturbed_runs):
    states, _, _ = disturbed_runs
    for leaf in (states.position, states.gripper, states.velocity, states.gap, states.grip):
        assert np.isfinite(leaf).all()
    kind, position = np.asarray(states.kind), np.asarray(states.position)
    movable = (np.arange(N) < bodies.MOVABLE) & (kind > 0)
    assert (np.abs(position[..., :2]).max(-1) + RADIUS[kind])[movable].max() <= 1 + 0.05, "it left the table"
    assert position[..., 2].min() >= -1e-6
    assert np.abs(states.gripper).max() <= 1.05
    assert (states.gripper[..., 2] >= -1e-6).all()
    depth = overlap(states)
    assert np.quantile(depth.max((-1, -2)), 0.99) < 0.03
    assert depth.max() < 0.12
    opening = bodies.CABINET_FRONT - bodies.HANDLE_REACH - position[:, kind[0, :, HANDLE_AT] > 0, HANDLE_AT, 1]
    assert opening.min() >= -1e-5
    assert opening.max() <= bodies.DRAWER_MAX + 1e-5
    far = np.linalg.norm(np.diff(position, axis=0), axis=-1)
    assert far.max() < 0.45, "it jumped"
    assert (np.asarray(states.held) >= 0).any(), "something was grasped by chance"


# ---- tasks ----


def test_suites_tasks_and_words():
    assert tabletop.SUITES == ("spatial", "object", "goal", "long")
    assert [task.suite for task in tabletop.TASKS] == [suite for suite in tabletop.SUITES for _ in range(10)]
    told = [tabletop.instruction(task) for task in range(TASKS)]
    assert len(set(told)) == TASKS
    assert len({task.name for task in tabletop.TASKS}) == TASKS
    for text in told:
        tokens = tabletop.encode(text)
        assert tokens.shape == (tabletop.INSTRUCTION_LENGTH,)
        assert tokens.max() < len(tabletop.VOCABULARY)
        assert tabletop.decode(tokens) == text
    with pytest.raises(ValueError, match="spoon"):
        tabletop.encode("put the spoon on the plate")
    with pytest.raises(ValueError, match="more than"):
        tabletop.encode("the " * 40)


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_episode_begins_settled_and_unsolved(split):
    start = begin(split, 3, 0.0)
    assert not success(start).any()
    assert overlap(start).max() < 1e-3
    for task in range(TASKS):
        first = one(start, task)
        there = np.asarray(first.kind) > 0
        after = act(first, (24, 0, 0, 0, -1)).position
        np.testing.assert_allclose(after[-1][there], first.position[there], atol=0.05)
        np.testing.assert_allclose(after[-1][there], after[-2][there], atol=1e-4)


def test_no_test_episode_begins_where_a_training_episode_can():
    """Every movable body lies on a node of its split's half of the lattice, well inside the half's cell."""
    for split, parity in (("train", 0), ("test", 1)):
        for seed in range(4):
            start = begin(split, seed)
            movable = (np.arange(N) < bodies.MOVABLE) & (np.asarray(start.kind) > 0)
            node = np.asarray(start.position)[movable][:, :2] / tasks.LATTICE
            assert np.abs(node - np.round(node)).max() < 0.42
            assert (np.round(node).astype(int).sum(-1) % 2 == parity).all()


def test_bodies_lie_elsewhere_in_each_episode_and_the_pictures_do_not_tell_the_task():
    start = begin("train", 5)
    position = np.asarray(start.position).reshape(EACH, TASKS, N, 3)
    assert (np.abs(np.diff(position[..., : bodies.MOVABLE, :2], axis=0)).max((-1, -2)) > 0.02).all()
    goal = np.asarray(start.kind)[SUITE == 2]
    assert (goal == goal[:1]).all(), "one scene for ten goals"
    colors, kinds = np.asarray(start.color)[SUITE == 1], np.asarray(start.kind)[SUITE == 1]
    things = (10 * kinds + colors)[:, : bodies.MOVABLE]
    assert all(len(set(row)) == bodies.MOVABLE for row in things), "one thing fits the words"
    spatial = np.asarray(start.kind)[SUITE == 0]
    assert ((spatial == BOWL).sum(1) == 2).all()


def at(state, body, place, height):
    """The state with a body at rest on another one."""
    where = state.position[place].at[2].set(height)
    return state._replace(position=state.position.at[body].set(where))


def test_only_what_the_instruction_names_counts():
    start = begin("train", 9, 0.0)
    named = one(start, 10)  # object/0
    judged = jax.jit(tabletop.success)
    right, wrong = at(named, 0, BASKET_AT, SEAT[BASKET]), at(named, 1, BASKET_AT, SEAT[BASKET])
    assert judged(right)
    assert not judged(wrong)
    assert not judged(right._replace(held=jnp.asarray(0))), "what is held has not been placed"
    assert not judged(at(named, 0, BASKET_AT, 0.3)), "it is still falling"
    bowls = one(start, 0)  # spatial/0
    assert judged(at(bowls, 0, 5, HEIGHT[PLATE]))
    assert not judged(at(bowls, 1, 5, HEIGHT[PLATE]))
    both = one(start, 30)  # long/0
    half = at(both, 3, BASKET_AT, SEAT[BASKET])
    assert not judged(half), "half of the task"
    assert judged(at(half, 2, BASKET_AT, SEAT[BASKET] + HEIGHT[CUBE])), "one on the other is in the basket too"


# ---- pictures ----


def test_observations_have_the_documented_shapes_and_ranges():
    seen = observe(begin("train", 1))
    assert seen.images.shape == (len(TASK), tabletop.CAMERAS, tabletop.IMAGE_SIZE, tabletop.IMAGE_SIZE, 3)
    assert seen.images.dtype == jnp.uint8
    assert seen.proprioception.shape == (len(TASK), tabletop.PROPRIOCEPTION_DIMS)
    assert np.abs(seen.proprioception).max() <= 1


def pictures(states):
    """Pictures of up to a batch of states `[n, C, H, W, 3]`, as integers."""
    padded = [*states, *[states[0]] * (len(TASK) - len(states))]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *padded)
    return np.asarray(observe(stacked).images)[: len(states)].astype(int)


def test_pictures_show_what_matters():
    cube, bowl, handle = (CUBE, 0.3, -0.2, 0.0), (BOWL, -0.3, -0.2, 0.0), (HANDLE, -0.6, 0.0, 0.0)
    base = table(cube, bowl, handle)
    changed = {
        "the cube moved": table((CUBE, 0.4, -0.2, 0.0), bowl, handle),
        "the bowl is above the table": table(cube, (BOWL, -0.3, -0.2, 0.2), handle),
        "the hand is lower": base._replace(gripper=base.gripper.at[2].set(0.3)),
        "the hand is elsewhere": base._replace(gripper=base.gripper.at[0].set(0.2)),
        "the fingers are closed": base._replace(gap=jnp.asarray(0.05)),
        "the drawer is open": table(cube, bowl, handle, opening=0.3),
        "the cube is in the bowl": table((CUBE, -0.3, -0.2, SEAT[BOWL]), bowl, handle),
        "the cube has another colour": base._replace(color=base.color.at[0].set(2)),
        "another kind": table((CAN, 0.3, -0.2, 0.0), bowl, handle),
    }
    same, *others = pictures([base, *changed.values()])
    for what, picture in zip(changed, others):
        for camera in range(tabletop.CAMERAS):
            differs = (np.abs(picture[camera] - same[camera]).max(-1) > 20).sum()
            assert differs >= 4, f"{what}, camera {camera}"


def test_every_good_looks_different_and_a_hand_over_it_shows_how_high_it_is():
    shown = [
        table((kind, 0.0, 0.0, 0.0), hand=(0.1, 0.3, 0.5))._replace(color=jnp.full(N, color, jnp.int32))
        for _, kind, color in tasks.GOODS
    ] + [table((CAN, 0.0, 0.0, 0.0), (BOX, 0.5, 0.5, 0.0), hand=(0.0, 0.0, z)) for z in np.arange(0.0, 0.6, 0.06)]
    seen, count = pictures(shown), len(tasks.GOODS)
    for group in (seen[:count, 0], seen[:count, 1], seen[count:, 1]):
        differs = (np.abs(group[:, None] - group[None]).max(-1) > 20).sum((-1, -2))
        assert differs[~np.eye(len(group), dtype=bool)].min() >= 4


# ---- randomness ----


def test_an_episode_is_a_function_of_its_key_and_actions():
    actions = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (24, 4)), jnp.float32)
    state = table((CUBE, 0.0, 0.0, 0.0), (CAN, 0.3, 0.0, 0.0), strength=1.0)
    first, again = run(state, actions), run(state, actions)
    other = run(state._replace(key=jax.random.key(5)), actions)
    np.testing.assert_array_equal(first.position, again.position)
    assert np.abs(first.gripper - other.gripper).max() > 0.02
    still = state._replace(disturbance=jnp.asarray(0.0))
    calm, calmer = run(still, actions), run(still._replace(key=jax.random.key(5)), actions)
    np.testing.assert_array_equal(calm.position, calmer.position)


def test_disturbances_come_as_often_as_documented():
    state = table((CUBE, 0.0, 0.0, 0.0), (CAN, 0.3, 0.0, 0.0), strength=1.0)
    n = 20000
    keys = jax.random.split(jax.random.key(0), n)
    draw = jax.jit(jax.vmap(lambda key, s: physics.draw_disturbance(s._replace(key=key)), (0, None)))
    drawn = draw(keys, state._replace(grip=jnp.array([0.0, physics.PAD / 2, 0.0])))
    slip, shove = 2 * physics.SLIP, physics.SHOVE * 2 / bodies.MOVABLE  # two of six places are taken
    np.testing.assert_allclose(drawn.slip.mean(), slip, atol=4 * np.sqrt(slip / n))
    far = np.linalg.norm(drawn.shove, axis=-1)
    np.testing.assert_allclose((far > 0).any(-1).mean(), shove, atol=4 * np.sqrt(shove / n))
    assert physics.SHOVE_RANGE[0] - 1e-6 <= far[far > 0].min() <= far.max() <= physics.SHOVE_RANGE[1] + 1e-6
    np.testing.assert_allclose(np.std(drawn.noise), physics.NOISE, rtol=0.05)
    calm = draw(keys, state._replace(disturbance=jnp.asarray(0.0)))
    assert not calm.slip.any()
    assert not calm.noise.any()
    assert not calm.shove.any()


# ---- the expert ----


def by_suite(what, among=True):
    return np.array([what[(suite == SUITE) & among].mean() for suite in range(4)])


def test_the_expert_solves_every_suite_from_both_splits(expert_runs):
    rates = {split: by_suite(solved(done)) for split, (_, (_, done, _)) in expert_runs.items()}
    for split in ("train", "test"):  # 40 episodes of each suite
        assert (rates[split] >= 0.95).all(), rates
    for _, (_, _, actions) in expert_runs.values():
        assert np.abs(actions).max() <= 1


def test_the_expert_recovers_from_whatever_somebody_else_did(disturbed_runs):
    rates = by_suite(solved(disturbed_runs[1], RANDOM), ~FIRST_HALF)
    assert (rates >= 0.9).all(), rates


def test_errors_compound_so_feedback_is_needed(expert_runs):
    """The expert's own actions from the same first state under other disturbances, and another episode's actions."""
    start, (_, done, actions) = expert_runs["train"]
    other = start._replace(key=jax.random.split(jax.random.key(99), len(TASK)))
    given = jnp.where(jnp.asarray(FIRST_HALF)[None, :, None], actions, jnp.roll(actions, TASKS, 1))
    replayed = solved(play(other, given, jnp.ones((STEPS, len(TASK)), bool))[1])
    assert (by_suite(replayed, FIRST_HALF) < by_suite(solved(done)) - 0.25).all(), by_suite(replayed, FIRST_HALF)
    blind = by_suite(replayed, ~FIRST_HALF)
    assert (blind < 0.35).all(), blind
    assert blind.mean() < 0.2, blind
