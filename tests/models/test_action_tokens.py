"""Action tokens: OpenVLA's bins by its own formulas, round trips, percentiles, files, mismatches and experts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_jax.models import action_tokens
from opd_jax.models.action_tokens import CENTRES, NUM_BINS, Statistics

HALF_BIN = 1 / 255 + 1e-6  # and float32 rounding
BASE = Statistics(np.array([-0.5, 0.0, 3.0]), np.array([0.25, 2.0, 3.0]), np.array([True, True, True]))


def _openvla_token(action, used_vocab_size=32_000):
    """Its tokenizer, in float64."""
    return used_vocab_size - np.digitize(np.clip(action, -1, 1), np.linspace(-1, 1, 256))


def _openvla_action(token, used_vocab_size=32_000):
    bins = np.linspace(-1, 1, 256)
    return ((bins[:-1] + bins[1:]) / 2)[np.clip(used_vocab_size - token - 1, 0, 254)]


def test_bins_are_those_of_openvla():
    actions = np.concatenate([np.random.default_rng(0).uniform(-1.1, 1.1, 2000), [-1, 1, -3, 3, 0]]).astype(np.float32)
    bins = action_tokens.encode(jnp.asarray(actions))
    assert bins.dtype == jnp.int32
    np.testing.assert_array_equal(32_000 - 1 - bins, _openvla_token(actions))
    every = jnp.arange(NUM_BINS)
    np.testing.assert_allclose(action_tokens.decode(every), _openvla_action(32_000 - 1 - np.arange(256)), atol=1e-7)
    np.testing.assert_array_equal(action_tokens.encode(action_tokens.decode(every)), np.minimum(every, 254))


def test_bins_by_hand():
    """Of width 2/255: 0 is in the middle of bin 127, whose centre it is."""
    actions = jnp.array([-1.0, -1 + 1.9 / 255, -1 + 2.1 / 255, 0.0, 1 - 0.1 / 255, 1.0, -9.0, 9.0, jnp.nan])
    np.testing.assert_array_equal(action_tokens.encode(actions), [0, 0, 1, 127, 254, 255, 0, 255, -1])
    np.testing.assert_allclose(
        action_tokens.decode(jnp.array([0, 127, 254, 255, -1, 999])),
        [-1 + 1 / 255, 0, 1 - 1 / 255, 1 - 1 / 255, -1 + 1 / 255, 1 - 1 / 255],
        atol=1e-7,
    )


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1, 1, width=32), min_size=8, max_size=8))
def test_a_round_trip_errs_by_half_a_bin_at_most(actions):
    actions = np.array(actions, np.float32)
    assert np.abs(action_tokens.decode(action_tokens.encode(jnp.asarray(actions))) - actions).max() <= HALF_BIN


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1, 1, width=32), min_size=6, max_size=6), st.floats(-5, 5), st.floats(0.01, 10))
def test_a_round_trip_through_tokens_errs_by_half_a_bin_of_the_range(actions, low, width):
    base = Statistics(np.full(3, low), np.full(3, low + width), np.array([True, True, False]))
    normalized = np.array(actions, np.float32).reshape(2, 3)
    robot = action_tokens.unnormalize(jnp.asarray(normalized), base)
    bins = action_tokens.encode(action_tokens.normalize(robot, base))
    back = action_tokens.unnormalize(action_tokens.decode(bins), base)
    scale = np.array([[width / 2, width / 2, 1]])
    assert (np.abs(back - robot) <= HALF_BIN * scale + 1e-6 * (abs(low) + width)).all()


def test_normalization_by_hand():
    base = BASE._replace(mask=np.array([True, False, True]))
    actions = jnp.array([[-0.5, 7.0, 3.0], [0.25, -7.0, 3.0], [-0.125, 1.0, 3.0], [9.0, 0.0, 9.0]])
    expected = [[-1, 7, -1], [1, -7, -1], [0, 1, -1], [1, 0, 1]]  # the third dimension never moved
    normalized = action_tokens.normalize(actions, base)
    np.testing.assert_allclose(normalized, expected, atol=1e-6)
    back = action_tokens.unnormalize(normalized, base)
    np.testing.assert_allclose(back[:3], actions[:3], atol=1e-6)
    np.testing.assert_allclose(back[3], [0.25, 0, 3], atol=1e-6)
    chunk = actions.reshape(2, 2, 3)
    np.testing.assert_array_equal(action_tokens.normalize(chunk, base), normalized.reshape(2, 2, 3))


def test_statistics_are_percentiles_over_all_steps():
    steps = np.random.default_rng(0).standard_normal((1000, 2))
    base = action_tokens.statistics([steps[:10], steps[10:]], [True, False])
    ordered = np.sort(steps, axis=0)
    for value, rank in ((base.q01, 9.99), (base.q99, 989.01)):  # linear between order statistics
        below = int(rank)
        np.testing.assert_allclose(value, ordered[below] + (rank - below) * (ordered[below + 1] - ordered[below]))
    share = np.mean(np.abs(action_tokens.normalize(jnp.asarray(steps, jnp.float32), base)[:, 0]) == 1)
    assert share == pytest.approx(0.02, abs=1e-3) and base.mask.tolist() == [True, False]


def test_files_have_the_layout_of_openvla():
    text = action_tokens.to_json({"libero": BASE, "bridge": BASE._replace(q01=BASE.q01 / 3)})
    assert json.loads(text)["libero"]["action"] == {
        "q01": [-0.5, 0.0, 3.0],
        "q99": [0.25, 2.0, 3.0],
        "mask": [True, True, True],
    }
    back = action_tokens.from_json(text, "bridge")
    action_tokens.check_same(back, BASE._replace(q01=BASE.q01 / 3))  # bit for bit
    more = {"libero": {"action": {"mean": [0], "q01": [-1, 0], "q99": [1, 2]}, "proprio": {}, "num_transitions": 5}}
    read = action_tokens.from_json(json.dumps(more), "libero")
    assert read.mask.tolist() == [True, True] and read.q99.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("q01", np.array([-0.5, 0.1, 3.0]), r"q01 of the student is \[-0.5, 0.0, 3.0\], of the teacher \[-0.5, 0.1, 3"),
        ("q99", np.array([0.25, 2.0]), r"q99 of the student is \[0.25, 2.0, 3.0\], of the teacher \[0.25, 2.0\]: "),
        ("mask", np.array([True, True, False]), r"mask of .*give the student the statistics \(unnorm_key\) of its tea"),
    ],
)
def test_different_statistics_are_refused(key, value, message):
    action_tokens.check_same(BASE, Statistics(*(leaf.copy() for leaf in BASE)))
    with pytest.raises(ValueError, match=message) as error:
        action_tokens.check_same(BASE, BASE._replace(**{key: value}))
    assert "\n" not in str(error.value)


def test_an_experts_distribution_is_a_gaussian_about_its_action():
    actions = jnp.asarray(np.random.default_rng(0).uniform(-0.8, 0.8, (2, 3, 4)), jnp.float32)
    logits = action_tokens.expert_logits(actions, 0.05)
    assert logits.shape == (2, 3, 4, NUM_BINS) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[1, 2, 3, 17], -((CENTRES[17] - actions[1, 2, 3]) ** 2) / 0.005, rtol=1e-5)
    np.testing.assert_array_equal(logits.argmax(-1), action_tokens.encode(actions))
    probability, values = jax.nn.softmax(logits), action_tokens.decode(jnp.arange(NUM_BINS))[None, None, None]
    mean = (probability * values).sum(-1)
    np.testing.assert_allclose(mean, actions, atol=1e-3)
    spread = jnp.sqrt((probability * jnp.square(values - mean[..., None])).sum(-1))
    np.testing.assert_allclose(spread, 0.05, rtol=0.02)


@pytest.mark.parametrize("sigma", [1, 1e-3])
def test_an_experts_distribution_at_the_ends_is_finite_and_counts_no_bin_twice(sigma):
    logits = action_tokens.expert_logits(jnp.array([-1.0, 1.0, 40.0]), sigma)
    assert np.isfinite(logits).all()
    assert logits[0].argmax() == 0 and logits[1].argmax() >= 254
    np.testing.assert_array_equal(logits[1], logits[2])
    assert logits[0, 255] < logits[0, 254]
    np.testing.assert_allclose(logits[1, 254], logits[1, 255], rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: action_tokens.statistics([], [True]), "statistics of no actions"),
        (lambda: action_tokens.statistics([np.ones((2, 3))], [True]), "mask has 1 dimensions, the actions 3"),
        (lambda: action_tokens.statistics([np.array([[np.nan, 1.0]])], [True] * 2), "1 values of the actions are not"),
        (lambda: action_tokens.from_json('{"a": {}, "b": {}}', "c"), "no statistics of 'c'; choose one of a, b"),
        (lambda: action_tokens.from_json('{"a": {"action": {"q01": [1]}}}', "a"), "the actions of 'a' have no q99"),
        (lambda: action_tokens.from_json('{"a": {"action": {"q01": [1], "q99": []}}}', "a"), "1 q01, 0 q99 and 1 mask"),
        (lambda: action_tokens.expert_logits(jnp.zeros(1), 0), "sigma=0; give a positive one"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_with_a_floor_no_mistake_costs_more_than_the_floor_says():
    actions = jnp.array([-1.0, 0.3])
    plain, floored = (np.asarray(action_tokens.expert_logits(actions, 0.1, floor), np.float64) for floor in (0, 0.01))
    expected = 0.99 * np.exp(plain) / np.exp(plain).sum(-1, keepdims=True) + 0.01 / action_tokens.NUM_BINS
    np.testing.assert_allclose(np.exp(floored), expected, rtol=1e-4)
    np.testing.assert_allclose(floored.min(), np.log(0.01 / 256), rtol=1e-5)
    with pytest.raises(ValueError, match="floor=1"):
        action_tokens.expert_logits(actions, 0.1, 1)
