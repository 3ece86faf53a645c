"""The scenes world: captions, pictures, and verifiers that judge by pixels alone."""

import itertools

import numpy as np
import pytest

from opd_jax.worlds import scene_verifiers as verifiers
from opd_jax.worlds import scenes
from opd_jax.worlds.scenes import Group, Scene


@pytest.fixture(scope="module")
def truth():
    """Captions and their pictures, both splits of both tasks."""
    rng = np.random.default_rng(0)
    drawn = {
        task: [scenes.draw_scene(rng, task, test) for test in (False, True) for _ in range(150)]
        for task in scenes.TASKS
    }
    return {
        task: ([s.caption for s in some], np.stack([scenes.render(s, rng) for s in some]))
        for task, some in drawn.items()
    }


def scores(images, captions):
    return {
        "composition": verifiers.composition(images, captions).mean(),
        "ocr": verifiers.ocr(images, captions).mean(),
        "quality": verifiers.quality(images, captions).mean(),
    }


def test_a_caption_is_what_it_says():
    scene = scenes.parse("two red circles left of a blue square on stripes")
    assert scene == Scene((Group(2, "red", "circle"), Group(1, "blue", "square")), "left of", None, "stripes")
    assert scenes.parse('a sign that says "AX"').text == "AX"


def test_parse_and_caption_and_tokens_are_inverse(truth):
    for captions, _ in truth.values():
        for caption in captions:
            assert scenes.parse(caption).caption == caption
            assert scenes.caption_of(scenes.tokenize(caption)) == caption


@pytest.mark.parametrize(
    ("caption", "says"),
    [
        ("a purple circle", "purple"),
        ("five circles", "five circles"),
        ('a sign that says "QQ"', "QQ"),
        ("a red circles", "a red circle"),
        ("a red circle on sand", "sand"),
    ],
)
def test_what_cannot_be_read_is_named(caption, says):
    with pytest.raises(ValueError, match=says):
        scenes.parse(caption)


def test_splits_are_disjoint_and_hold_out_combinations():
    rng = np.random.default_rng(1)
    for task in scenes.TASKS:
        train = {scenes.draw_scene(rng, task)._replace(background="plain").caption for _ in range(600)}
        test = {scenes.draw_scene(rng, task, True)._replace(background="plain").caption for _ in range(600)}
        assert not train & test
    unseen = [
        s for s in map(scenes.parse, train | test) if any((g.color, g.shape) in scenes.HELD_OUT for g in s.groups)
    ]
    assert all(scene.is_test for scene in unseen)


def test_pictures_of_other_scenes_are_as_many_as_asked_and_of_the_same_task():
    """Right captions score as rendered truth; captions of unrelated pictures as chance."""
    rng = np.random.default_rng(3)
    none = dict.fromkeys(scenes.TASKS, 0.0)
    for share, low, high in ((0.0, 0.99, 1.0), (0.5, 0.45, 0.75), (1.0, 0.0, 0.45)):
        pairs = [
            scenes.web_pair(rng, none, 0.0, {"composition": share, "ocr": 0.0}, ("composition",)) for _ in range(200)
        ]
        captions, images = [caption for caption, _ in pairs], np.stack([image for _, image in pairs])
        assert all(scenes.parse(caption).task == "composition" for caption in captions)
        assert low <= verifiers.reward("composition", images, captions).mean() <= high


def test_a_picture_is_a_function_of_its_seed():
    one, two = (scenes.web_pair(np.random.default_rng(5), {"composition": 0.5, "ocr": 0.5}, 0.5) for _ in range(2))
    assert one[0] == two[0]
    np.testing.assert_array_equal(one[1], two[1])
    assert one[1].dtype == np.float32
    assert np.abs(one[1]).max() <= 1


def test_truth_scores_at_least_98_percent(truth):
    assert scores(truth["composition"][1], truth["composition"][0])["composition"] >= 0.98
    assert scores(truth["ocr"][1], truth["ocr"][0])["ocr"] >= 0.98
    for captions, images in truth.values():
        assert verifiers.quality(images, captions).min() >= 0.98


def test_wrong_pictures_score_low(truth):
    rng = np.random.default_rng(2)
    for task, (captions, _) in truth.items():
        wrong = np.stack([scenes.render(scenes.mistake(scenes.parse(c), rng), rng) for c in captions])
        other = [scenes.mistake(scenes.parse(c), rng).caption for c in captions]
        changed = np.array([a != b for a, b in zip(captions, other)])
        assert changed.mean() > 0.5
        assert scores(wrong, captions)[task] < 0.65
        assert scores(wrong, captions)["quality"] > 0.98, "a wrong picture is a clean one"


def test_damage_costs_quality(truth):
    rng = np.random.default_rng(3)
    for captions, images in truth.values():
        damaged = np.stack([scenes.damage(image, rng) for image in images])
        assert verifiers.quality(damaged, captions).mean() < 0.6
        assert verifiers.quality(images + 0.1 * rng.standard_normal(images.shape), captions).mean() < 0.7
        erased = np.where(np.abs(images - images[:, :1, :1]) < 0.5, images[:, :1, :1], images)
        textured = [i for i, c in enumerate(captions) if scenes.parse(c).background != "plain"]
        assert verifiers.quality(erased[textured], [captions[i] for i in textured]).mean() < 0.75


@pytest.mark.parametrize("level", [-1.0, -0.24, 0.0, 1.0])
def test_blank_pictures_fool_nobody(truth, level):
    for captions, images in truth.values():
        for value in scores(np.full_like(images, level), captions).values():
            assert value < 0.05


def test_noise_fools_nobody(truth):
    rng = np.random.default_rng(4)
    for captions, images in truth.values():
        for spread in (0.3, 1.0):
            for value in scores(spread * rng.standard_normal(images.shape), captions).values():
                assert value < 0.1


def test_a_noisy_glyph_is_no_cliff(truth):
    captions, images = truth["ocr"]
    noise = np.random.default_rng(5).standard_normal(images.shape)
    curve = [verifiers.ocr(images + level * noise, captions).mean() for level in (0.0, 0.4, 0.6, 0.8, 1.0)]
    assert all(a >= b for a, b in itertools.pairwise(curve))
    assert any(0.2 < value < 0.9 for value in curve)


def test_composition_by_hand():
    rng = np.random.default_rng(6)
    image = scenes.render(scenes.parse("two red circles left of a blue square"), rng)[None]
    cases = {
        "two red circles left of a blue square": 1,
        "two red circles and a blue square": 1,
        "two circles and a square": 1,
        "two red circles right of a blue square": 0,
        "three red circles left of a blue square": 0,
        "two blue circles left of a blue square": 0,
        "two red circles": 0,  # and something else
    }
    for caption, right in cases.items():
        assert verifiers.composition(image, [caption])[0] == right, caption
    # parts of "three red circles": shape 2/3, shape and colour 2/3, others 1 - (3 - 3) / 3
    partial = verifiers.composition(image, ["three red circles"], strict=False)[0]
    np.testing.assert_allclose(partial, (2 / 3 + 2 / 3 + 1) / 3, rtol=1e-6)


def test_ocr_by_hand():
    image = scenes.render(scenes.parse('a sign that says "AX"'), np.random.default_rng(7))[None]
    for text, right in {"AX": 1.0, "AH": 0.5, "XA": 0.0, "TO": 0.0, "XX": 0.5}.items():
        np.testing.assert_allclose(verifiers.ocr(image, [f'a sign that says "{text}"'])[0], right, atol=1e-6)
    assert verifiers.ocr(image, ["a circle"])[0] == 0


def test_unknown_reward_is_named():
    with pytest.raises(ValueError, match="beauty"):
        verifiers.reward("beauty", np.zeros((1, 24, 24, 3)), ["a circle"])
