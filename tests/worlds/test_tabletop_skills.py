"""Practice on the table: what is named is there and alone, and doing what the chunks say gets it done."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.worlds import tabletop, tabletop_physics, tabletop_skills
from opd_jax.worlds.tabletop_bodies import COLORS, KINDS
from opd_jax.worlds.tabletop_render import LOOKS, locate

COUNT, STEPS = 64, 70


@pytest.fixture(scope="module")
def moments():
    return jax.jit(jax.vmap(tabletop_skills.moment))(jax.random.split(jax.random.key(0), COUNT))


@pytest.fixture(scope="module")
def after(moments):
    """Every moment, its first actions taken again and again, without disturbances."""

    def act(moment, _):
        action = tabletop_skills.chunk(moment, 1)[0]
        moment = moment._replace(state=tabletop.step(moment.state, action))
        return moment, (moment.state.held == moment.subject)

    calm = moments._replace(state=moments.state._replace(disturbance=jnp.zeros(COUNT)))
    return jax.jit(jax.vmap(functools.partial(jax.lax.scan, act, length=STEPS, xs=None)))(calm)


def test_what_is_named_is_there_once_and_no_task_is_practised(moments):
    instructions = {task.instruction for task in tabletop.TASKS}
    for i in range(COUNT):
        state = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), moments.state._replace(key=None))
        words = tabletop.decode(np.asarray(moments.instruction[i]))
        assert words not in instructions
        aim = int(moments.subject[i] if moments.place[i] < 0 else moments.place[i])
        kind, color = KINDS[state.kind[aim]], COLORS[state.color[aim]]
        assert words == f"pick up the {color} {kind}" or words in (f"place it in the {kind}", f"place it on the {kind}")
        assert ((state.kind == state.kind[aim]) & (state.color == state.color[aim])).sum() == 1
        assert state.held == (moments.subject[i] if words.startswith("place") else -1)
    assert 0.2 < float((moments.place >= 0).mean()) < 0.6


def test_it_is_picked_up(moments, after):
    end, _ = after
    picked = np.asarray(end.state.held == end.subject)[np.asarray(moments.place < 0)]
    assert picked.mean() > 0.9


def test_it_is_put_where_it_belongs(moments, after):
    end, _ = after
    rests = jax.jit(jax.vmap(tabletop_physics.resting_on))(end.state)
    on = np.asarray(jnp.take_along_axis(rests, end.subject[:, None], 1)[:, 0] == end.place)
    assert on[np.asarray(moments.place >= 0)].mean() > 0.8
    assert not np.asarray(end.state.held == end.subject)[np.asarray(moments.place >= 0)].any()


def test_a_chunk_is_a_plan(moments):
    """Its second action is the first one from where the first leads."""
    one = jax.tree.map(lambda leaf: leaf[0], moments)
    plan = tabletop_skills.chunk(one, 2)
    moved = one._replace(state=tabletop.step(one.state, plan[0]))
    np.testing.assert_allclose(plan[1], tabletop_skills.chunk(moved, 1)[0], atol=1e-5)


def test_the_aim_is_where_the_named_thing_is_drawn(moments):
    """Straight from above its top is seen where it is pointed at, if the hand is elsewhere and nothing covers it."""
    aims = np.asarray(jax.jit(jax.vmap(tabletop_skills.aim))(moments))
    images = np.asarray(jax.jit(jax.vmap(tabletop.render))(moments.state))
    assert (np.abs(aims[:, 0]) < 1).all()
    shown = []
    for i in range(COUNT):
        named = int(moments.subject[i] if moments.place[i] < 0 else moments.place[i])
        kind, color = int(moments.state.kind[i, named]), int(moments.state.color[i, named])
        if np.abs(np.asarray(moments.state.gripper[i] - moments.state.position[i, named]))[:2].max() < 0.4:
            continue
        looks = LOOKS[kind, color]  # side, top and spot
        row, column = np.clip(((aims[i, 0] + 1) / 2 * tabletop.IMAGE_SIZE).astype(int), 0, tabletop.IMAGE_SIZE - 1)
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
