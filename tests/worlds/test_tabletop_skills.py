"""Practice on the table: what is named is there and alone, and doing what the chunks say gets it done."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.worlds import tabletop, tabletop_skills
from opd_jax.worlds.tabletop_bodies import COLORS, GAP_MAX, GAP_MIN, KINDS
from opd_jax.worlds.tabletop_render import LOOKS, locate

COUNT, STEPS = 96, 75


@pytest.fixture(scope="module")
def moments():
    return jax.jit(jax.vmap(tabletop_skills.moment))(jax.random.split(jax.random.key(0), COUNT))


@pytest.fixture(scope="module")
def after(moments):
    """Whether each moment is done at some step, its first action taken again and again, without disturbances."""

    def act(moment, _):
        state = tabletop.step(moment.state, tabletop_skills.chunk(moment, 1)[0])
        return moment._replace(state=state), tabletop_skills.done(state, moment.subject, moment.place)

    calm = moments._replace(state=moments.state._replace(disturbance=jnp.zeros(COUNT)))
    return np.asarray(jax.jit(jax.vmap(functools.partial(jax.lax.scan, act, length=STEPS, xs=None)))(calm)[1]).any(1)


@pytest.fixture(scope="module")
def kinds(moments):
    """Of which kind each moment is."""
    somewhere, held = np.asarray(moments.place >= 0), np.asarray(moments.state.held >= 0)
    return {"pick": ~somewhere, "put": held, "carry": somewhere & ~held}


def test_what_is_named_is_there_once_and_no_task_is_practised(moments):
    instructions = {task.instruction for task in tabletop.TASKS}
    for i in range(COUNT):
        state = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), moments.state._replace(key=None))
        words = tabletop.decode(np.asarray(moments.instruction[i]))
        assert words not in instructions
        assert state.held in (-1, moments.subject[i])
        kind, color = (field[moments.subject[i]] for field in (state.kind, state.color))
        thing = [f"the {KINDS[kind]}", f"the {COLORS[color]} {KINDS[kind]}"]
        alone = [(state.kind == kind).sum() == 1, ((state.kind == kind) & (state.color == color)).sum() == 1]
        where = "it" if moments.place[i] < 0 else f"the {KINDS[state.kind[moments.place[i]]]}"
        assert bool(moments.named[i]) == (not words.startswith("place it"))
        assert not moments.named[i] or any(name in words and once for name, once in zip(thing, alone))
        assert moments.place[i] < 0 or words.endswith(where)
        assert moments.place[i] < 0 or (state.kind == state.kind[moments.place[i]]).sum() == 1


@pytest.mark.parametrize(("kind", "least"), [("pick", 0.9), ("put", 0.85), ("carry", 0.8)])
def test_doing_what_the_chunks_say_gets_it_done(after, kinds, kind, least):
    assert kinds[kind].sum() > 8
    assert after[kinds[kind]].mean() >= least


def test_fingers_of_empty_hands_may_be_closed(moments):
    """Where asked, all of them, half of these entirely; nothing else is another."""
    draw = jax.jit(jax.vmap(tabletop_skills.moment, (0, None)))
    missed = draw(jax.random.split(jax.random.key(0), COUNT), 1.0)
    empty = np.asarray(moments.state.held < 0)
    assert (np.asarray(moments.state.gap)[empty] == GAP_MAX).all()
    assert (np.asarray(missed.state.gap)[empty] < GAP_MAX).all()
    assert 0.25 < (np.asarray(missed.state.gap)[empty] == np.float32(GAP_MIN)).mean() < 0.75
    np.testing.assert_array_equal(missed.state.gap[~empty], moments.state.gap[~empty])
    np.testing.assert_array_equal(missed.instruction, moments.instruction)
    np.testing.assert_array_equal(missed.state.position, moments.state.position)


def test_a_chunk_is_a_plan(moments):
    """Its second action is the first one from where the first leads, if nothing goes wrong."""
    one = jax.tree.map(lambda leaf: leaf[0], moments)
    plan = tabletop_skills.chunk(one, 2)
    moved = one._replace(state=tabletop.step(tabletop.undisturbed(one.state), plan[0]))
    np.testing.assert_allclose(plan[1], tabletop_skills.chunk(moved, 1)[0], atol=1e-5)


def test_the_aim_is_where_the_named_thing_is_drawn(moments):
    """Straight from above its top is seen where it is pointed at, if the hand is elsewhere and nothing covers it."""
    aims = np.asarray(jax.jit(jax.vmap(tabletop_skills.aim))(moments))
    images = np.asarray(jax.jit(jax.vmap(tabletop.render))(moments.state))
    shown = []
    for i in range(COUNT):
        named = [(0, moments.subject[i], moments.named[i]), (1, moments.place[i], moments.place[i] >= 0)]
        for point, body, told in named:
            assert bool((np.abs(aims[i, 0, point]) < 1).all()) == bool(told)
            away = np.abs(np.asarray(moments.state.gripper[i] - moments.state.position[i, body]))[:2].max() > 0.4
            if told and away:
                looks = LOOKS[int(moments.state.kind[i, body]), int(moments.state.color[i, body])]  # side, top, spot
                row, column = ((aims[i, 0, point] + 1) / 2 * tabletop.IMAGE_SIZE).astype(int)
                red, green, blue = (int(channel) for channel in images[i, 0, row, column])
                shown.append((red << 16 | green << 8 | blue) in looks[1:])
    assert len(shown) > 10 and np.mean(shown) > 0.8


def test_places_in_pictures_by_hand(moments):
    state = jax.tree.map(lambda leaf: leaf[0], moments.state._replace(key=None))._replace(
        gripper=jnp.array([0.3, -0.2, 0.4])
    )
    top, _ = locate(state, jnp.array([0.51, 0.204, 0.1]))
    np.testing.assert_allclose(top, [-0.2, 0.5], atol=1e-5)  # the picture is 2.04 wide and high, y upwards
    _, close = locate(state, jnp.array([0.3 + 0.31, -0.2, 0.24 / 0.7]))
    np.testing.assert_allclose(close, [0.0, 0.5], atol=1e-5)  # 1.24 wide, and follows the hand
