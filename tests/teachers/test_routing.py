"""Routing: every record by its own teacher, whatever the shapes."""

import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.config import ConfigError
from opd_jax.teachers.routing import check_routes, label_by_task
from opd_jax.types import TokenRollout

TASK = np.array([2, 0, 2, 2, 0])


def rollout():
    b, s = len(TASK), 3
    tokens = np.arange(b * s).reshape(b, s)
    logp, flag = np.zeros((b, s), np.float32), np.zeros((b, s), bool)
    return TokenRollout(*map(jnp.asarray, (tokens, flag, np.full(b, s), TASK, TASK, logp, logp, flag[:, 0])))


def test_every_record_goes_to_its_own_teacher_in_whole_multiples():
    seen = {}

    def teacher(name, sign):
        def label(part):
            seen[name] = np.asarray(part.task)
            return sign * part.tokens.astype(jnp.float32)

        return label

    found = label_by_task({0: teacher(0, 1.0), 2: teacher(2, -1.0), 7: teacher(7, 9.0)}, rollout(), multiple=4)
    tokens = np.arange(15).reshape(5, 3)
    np.testing.assert_array_equal(found, np.where(TASK[:, None] == 0, tokens, -tokens))
    assert {name: len(tasks) for name, tasks in seen.items()} == {0: 4, 2: 4}
    assert all((tasks == name).all() for name, tasks in seen.items())


def test_a_narrower_teacher_is_padded_with_zeros():
    states = lambda width: lambda part: jnp.ones((len(part.task), 3, width))
    found = label_by_task({0: states(2), 2: states(4)}, rollout())
    np.testing.assert_array_equal(found.sum((1, 2)), np.where(TASK == 0, 6, 12))
    np.testing.assert_array_equal(found[TASK == 0][..., 2:], 0)


def test_teachers_may_say_several_things():
    said = lambda sign: lambda part: {"a": sign * part.tokens, "b": jnp.full((len(part.task), 3, 2), sign)}
    found = label_by_task({0: said(1), 2: said(-1)}, rollout(), multiple=4)
    np.testing.assert_array_equal(found["a"], np.where(TASK[:, None] == 0, 1, -1) * np.arange(15).reshape(5, 3))
    np.testing.assert_array_equal(found["b"][:, 0, 0], np.where(TASK == 0, 1, -1))


def test_a_task_without_a_teacher_is_named():
    with pytest.raises(ConfigError, match="task 2"):
        label_by_task({0: lambda part: part.tokens}, rollout())
    with pytest.raises(ConfigError, match="'code': give one"):
        check_routes({"mathematics": 1}, {0: "mathematics", 1: "code"})
    check_routes({"mathematics": 1}, {0: "mathematics"})
