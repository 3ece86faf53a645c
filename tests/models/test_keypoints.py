"""Points that words name: places by hand, what is seen of an instruction, and a target that is learnt."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opd_jax.models import vla
from opd_jax.models.keypoints import Keypoints, Points, pointing_loss
from opd_jax.models.vla import Observation

TOWER = Keypoints(points=2, channels=16, num_layers=1, patch_size=4, image_size=24)
SEEN = jnp.array([[True, True, False]])


def params_of(tower=TOWER, cameras=1):
    images, words = jnp.zeros((cameras, 24, 24, 3), jnp.uint8), jnp.zeros((cameras, 3, 8))
    return tower.init(jax.random.key(0), images, words, jnp.repeat(SEEN, cameras, 0), cameras)["params"]


def look(params, images, words, seen=SEEN, cameras=1):
    seen = jnp.broadcast_to(seen, words.shape[:2])
    return TOWER.apply({"params": params}, images, words, seen, cameras)


def drawn(seed, n=1):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, 256, (n, 24, 24, 3)), jnp.uint8), jnp.asarray(rng.standard_normal((n, 3, 8)))


def test_a_place_is_the_mean_under_the_softmax():
    params, (images, words) = params_of(), drawn(0)
    params = params | {"within": jax.tree.map(jnp.zeros_like, params["within"])}  # cells stay in their middles
    found = look(params, images, words)
    weights = np.exp(np.asarray(found.logits, np.float64))
    weights /= weights.sum(-1, keepdims=True)
    rows, columns = np.divmod(np.arange(36), 6)
    np.testing.assert_allclose(found.place[0, :, 0], weights[0] @ ((rows + 0.5) / 3 - 1), atol=1e-5)
    np.testing.assert_allclose(found.place[0, :, 1], weights[0] @ ((columns + 0.5) / 3 - 1), atol=1e-5)
    assert found.tokens.shape == (1, 2, TOWER.width)


def test_words_and_their_order_matter_and_padding_does_not():
    params, (images, words) = params_of(), drawn(1)
    logits = look(params, images, words).logits
    padded = look(params, images, words.at[0, 2].set(jnp.nan)).logits
    np.testing.assert_array_equal(padded, logits)
    for other in (words.at[0, 0, 0].add(2.0), words[:, jnp.array([1, 0, 2])]):
        assert np.abs(look(params, images, other).logits - logits).max() > 1e-3


def test_cameras_are_told_apart_and_pictures_are_not_mixed():
    params, (images, words) = params_of(cameras=2), drawn(2, 4)
    found = look(params, images, words, cameras=2)
    same = look(params, images[jnp.array([0, 0, 2, 2])], words[jnp.array([0, 0, 2, 2])], cameras=2)
    assert np.abs(same.logits[0] - same.logits[1]).max() > 1e-3
    np.testing.assert_allclose(same.logits[::2], found.logits[::2], atol=1e-5)


def test_the_distance_by_hand():
    logits = jnp.zeros((2, 2, 4)).at[:, 0].set(jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4])))
    place = jnp.array([[[0.5, -0.5], [9.0, 9.0]]] * 2)
    target = jnp.array([[0.4, -0.3], [0.4, -0.3]])  # the lower left of four cells
    loss = pointing_loss(Points(place, jnp.zeros((2, 2, 1)), logits), target, jnp.array([True, False]))
    np.testing.assert_allclose(loss, [-np.log(0.3) + 0.1**2 + 0.2**2, 0.0], rtol=1e-5)
    edge = pointing_loss(Points(place, jnp.zeros((2, 2, 1)), logits), jnp.ones((2, 2)), jnp.array([True, True]))
    np.testing.assert_allclose(edge, -np.log(0.4) + 0.5**2 + 1.5**2, rtol=1e-5)  # an edge is of the last cell


def test_it_learns_to_point_at_what_a_word_names():
    """A red and a blue square on black, and the word for one of them."""

    def batch(key):
        keys = jax.random.split(key, 3)
        places = jax.random.randint(keys[0], (32, 2, 2), 1, 20)
        grid = jnp.arange(24)
        within = lambda p: (grid >= p) & (grid < p + 4)
        square = jax.vmap(lambda p: within(p[0])[:, None] & within(p[1])[None])
        images = jnp.stack([square(places[:, 0]), 0 * square(places[:, 0]), square(places[:, 1])], -1) * 255
        which = jax.random.bernoulli(keys[1], 0.5, (32,)).astype(int)
        words = jnp.zeros((32, 3, 8)).at[jnp.arange(32), 0, which].set(1.0)
        target = (jnp.take_along_axis(places, which[:, None, None], 1)[:, 0] + 2) / 12 - 1
        return images.astype(jnp.uint8), words, target

    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state, key):
        images, words, target = batch(key)

        def loss(params):
            found = look(params, images, words)
            return pointing_loss(found, target, jnp.ones(32, bool)).mean(), jnp.abs(found.place[:, 0] - target).max(-1)

        (_, missed), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        change, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, change), state, (missed < 1 / 6).mean()

    params = params_of()
    state, shares = optimizer.init(params), []
    for i in range(250):
        params, state, share = step(params, state, jax.random.key(i))
        shares.append(float(share))
    assert np.mean(shares[:20]) < 0.2 and np.mean(shares[-20:]) > 0.9


def test_a_policy_that_looks_with_points():
    module = vla.tiny(2, 3, words=10, image_size=24, width=32, num_layers=1, mlp_width=64, points=3)
    images, _ = drawn(3, 4)
    seen = Observation(images.reshape(2, 2, 24, 24, 3), jnp.zeros((2, 5)), jnp.array([[4, 7, 0], [4, 9, 1]], jnp.int32))
    params = module.init(jax.random.key(0), seen)["params"]
    logits = module.apply({"params": params}, seen)
    assert logits.shape == (2, 2, 3, 256)
    (points,) = module.apply({"params": params}, seen, method="points")
    assert points.place.shape == (4, 3, 2)
    other = seen._replace(instruction=seen.instruction.at[0, 1].set(8))
    assert np.abs(module.apply({"params": params}, other)[0] - logits[0]).max() > 0
    np.testing.assert_array_equal(module.apply({"params": params}, other)[1], logits[1])


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="images are 20x20, the tower is for 24x24"):
        TOWER.init(jax.random.key(0), jnp.zeros((1, 20, 20, 3), jnp.uint8), jnp.zeros((1, 3, 8)), SEEN)
    with pytest.raises(ValueError, match="patch_size=3: give an even number"):
        params_of(TOWER.clone(patch_size=3))
