"""VLM: ids that are images, the cache, packing, gradients, losses, adapters and meshes; parity is in test_hf_vlm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.losses import opd
from opd_jax.models import lora
from opd_jax.models.decoder import Decoder, partition_rules
from opd_jax.models.images import ImageBank, image_bank, visual_ids
from opd_jax.models.rope import Rope
from opd_jax.models.vision import Vision
from opd_jax.models.vlm import RULES, VLM, functions
from opd_jax.sampling.tokens import SamplingParams, as_prompts, generate
from opd_jax.sharding import make_mesh, param_specs, replicate, shard_batch, shard_params

V = 24
TEXT = Decoder(V, 16, 24, 2, 4, 2, 8, rope=Rope(50.0), qk_norm=True, tie_embeddings=True)
TOWER = Vision(16, 24, 2, 2, patch_size=2, num_positions=9, deepstack=(0,))
MODULE = VLM(TOWER, TEXT, rope_sections=(2, 1, 1), images_per_row=2)
SIZES = (4, 8), (8, 12), (4, 4), (12, 4), (8, 8)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def _bank(seed=0, count=6):
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
    return jax.tree.map(jnp.asarray, image_bank(images, count=count, patch_size=2))


BANK = _bank()


def _params(seed=0, module=MODULE):
    """Drawn by numpy, norms and biases too: no kernel to compile for each shape."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32), BANK)["params"]
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape) + (x.shape[-1] == 8), x.dtype), shapes)


PARAMS = _params()


def _see(*indices):
    return [token for i in indices for token in visual_ids(BANK, i, V).tolist()]


# two sizes in a record; images side by side; none; an image first; text after an image of many rows
RECORDS = [[1, *_see(0), 2, 3, *_see(1), 4], [5, *_see(2, 0), 6, 7], [8, 9, 10, 11], [*_see(4), 12], [1, *_see(3), 2]]
RECORDS += [[*_see(1, 4), 9], [13], [14, *_see(2), 15, *_see(2), 16]]
B = len(RECORDS)
LENGTHS = np.array([len(record) for record in RECORDS])


def _rows(records, width=14, fill=0):
    return jnp.asarray([[*record, *[fill] * (width - len(record))] for record in records], jnp.int32)


TOKENS = _rows(RECORDS)


def _jitted(method=None, module=MODULE):
    return jax.jit(lambda params, *args: module.apply({"params": params}, *args, method=method))


def _loss(params, tokens, bank):
    logits = MODULE.apply({"params": params}, tokens, bank)
    return jnp.square(logits).mean(), logits


LOGITS, DECODE, GRADIENT = _jitted(), _jitted("decode"), jax.jit(jax.grad(_loss, has_aux=True))


def _assert_rows_equal(actual, expected, lengths=LENGTHS, **close):
    for a, e, length in zip(actual, expected, lengths, strict=True):
        np.testing.assert_allclose(a[:length], e[:length], **close)


def test_decode_of_ragged_prompts_equals_the_full_forward():
    """In two calls, the second of which begins within an image. Padding has garbage, even an image of its own."""
    split = 7
    assert TOKENS[0, split] == TOKENS[0, split - 1] + 1 >= V
    decode = _jitted("decode", MODULE.clone(images_per_row=3))
    expected = LOGITS(PARAMS, TOKENS, BANK)
    index = jnp.broadcast_to(jnp.arange(14)[None], TOKENS.shape)
    padded = jnp.where(index < LENGTHS[:, None], TOKENS, jnp.asarray(_see(4)[2]))
    first, cache = decode(PARAMS, padded[:, :split], index[:, :split], MODULE.init_cache(B, 16), BANK)
    _assert_rows_equal(first, expected, np.minimum(LENGTHS, split), **CLOSE)
    rest, _ = decode(PARAMS, padded[:, split:], index[:, split:], cache, BANK)
    _assert_rows_equal(rest, expected[:, split:], np.maximum(LENGTHS - split, 0), **CLOSE)


def test_text_after_the_prompt_is_decoded_as_the_full_forward_has_it():
    """Records go on from their own lengths, over what padding left in the cache."""
    further = np.random.default_rng(0).integers(0, V, (B, 4))
    whole = _rows([[*record, *more] for record, more in zip(RECORDS, further)], 18)
    expected = LOGITS(PARAMS, whole, BANK)
    index = jnp.broadcast_to(jnp.arange(14)[None], TOKENS.shape)
    garbage = jnp.where(index < LENGTHS[:, None], TOKENS, 23)
    _, cache = DECODE(PARAMS, garbage, index, MODULE.init_cache(B, 18), BANK)
    for step in range(-1, 4):  # the last of the prompt once more, as the sampler does
        position = LENGTHS + step
        given = whole[np.arange(B), position]
        logits, cache = DECODE(PARAMS, given[:, None], jnp.asarray(position)[:, None], cache, BANK)
        np.testing.assert_allclose(logits[:, 0], expected[np.arange(B), position], **CLOSE)


def test_a_step_of_decoding_holds_no_tower():
    program = lambda width: str(
        jax.make_jaxpr(lambda *args: MODULE.apply({"params": PARAMS}, *args, method="decode"))(
            TOKENS[:, :width], jnp.zeros((B, width), jnp.int32), MODULE.init_cache(B, 16), BANK
        )
    )
    assert "erf" in program(2) and "erf" not in program(1)


def test_packed_segments_equal_separate_records():
    """Frequencies are so high that products with positions are mostly rounding: shifted positions would show."""
    module = MODULE.clone(images_per_row=6, language_model=TEXT.clone(rope=Rope(1e-20)))
    order = [4, 2, 1, 3]
    tokens = _rows([[token for i in order for token in RECORDS[i]]], 32)
    segments = np.repeat([*range(1, 5), 0], [*LENGTHS[order], 32 - LENGTHS[order].sum()])[None]
    packed = _jitted(module=module)(PARAMS, tokens, BANK, jnp.asarray(segments))[0]
    expected = _jitted(module=module)(PARAMS, TOKENS, BANK)
    for segment, i in enumerate(order, 1):
        np.testing.assert_allclose(packed[segments[0] == segment], expected[i, : LENGTHS[i]], **CLOSE)


def test_only_what_a_record_holds_changes_it():
    expected = LOGITS(PARAMS, TOKENS, BANK)
    own = jnp.arange(BANK.patches.shape[1])[None] < BANK.grid.prod(1)[:, None]
    spoiled = jnp.where(own[..., None], BANK.patches, jnp.nan)  # padding, and images that are not there
    np.testing.assert_array_equal(LOGITS(PARAMS, TOKENS, ImageBank(spoiled, BANK.grid)), expected)
    others = np.arange(B) != 4  # record 4 alone holds image 3
    unused = ImageBank(spoiled.at[3].set(jnp.nan), BANK.grid)
    np.testing.assert_array_equal(LOGITS(PARAMS, TOKENS, unused)[others], expected[others])

    changed = LOGITS(PARAMS, TOKENS, ImageBank(BANK.patches.at[0, 1, 5].add(1.0), BANK.grid))
    moved = np.abs(np.asarray(changed) - np.asarray(expected)).max(-1)
    assert not moved[2:].any()
    for row, first in ((0, 1), (1, 2)):  # not before the image
        assert not moved[row, :first].any() and (moved[row, first + 2 : LENGTHS[row]] > 1e-6).all()


def test_every_image_is_read_from_its_place_in_the_bank():
    order = np.array([5, 2, 4, 1, 0, 3])
    images = jax.tree.map(lambda leaf: leaf[order], BANK)
    image, token = np.divmod(np.asarray(TOKENS) - V, BANK.room())
    moved = np.where(TOKENS >= V, V + np.argsort(order)[image] * BANK.room() + token, TOKENS)
    _assert_rows_equal(LOGITS(PARAMS, jnp.asarray(moved), images), LOGITS(PARAMS, TOKENS, BANK), **CLOSE)


def test_wrong_ids_show_in_their_record_alone():
    room = BANK.room()
    wrong = {
        "an image beyond the bank": [1, V + 6 * room, 2],
        "an image that is not there": [1, V + 5 * room, 2],
        "a token beyond its image": [1, *_see(0), V + 2, 2],
        "a third image": [1, *_see(0, 2, 0), 2],
        "a token of no image": [1, V + 60 * room, 2],
    }
    logits = np.asarray(LOGITS(PARAMS, _rows([*wrong.values(), *RECORDS[:3]]), BANK))
    assert np.isnan(logits[:5]).all()
    np.testing.assert_allclose(logits[5:], LOGITS(PARAMS, TOKENS, BANK)[:3], **CLOSE)
    image_last = jnp.asarray([[V], *[[2]] * (B - 1)], jnp.int32)
    one = np.asarray(DECODE(PARAMS, image_last, jnp.zeros((B, 1), jnp.int32), MODULE.init_cache(B, 18), BANK)[0])
    assert np.isnan(one[0]).all() and np.isfinite(one[1:]).all()


def test_gradients_reach_every_parameter_and_none_of_the_tower_from_text():
    grads, _ = GRADIENT(PARAMS, TOKENS, BANK)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        leaf = np.asarray(leaf)
        stacks = leaf.reshape(len(leaf), -1) if "blocks" in name or "layers" in name else leaf.reshape(1, -1)
        assert np.isfinite(leaf).all() and (np.abs(stacks).max(1) > 0).all(), name
    text, _ = jax.device_get(GRADIENT(PARAMS, jnp.minimum(TOKENS, V - 1), BANK))
    assert not any(leaf.any() for leaf in jax.tree.leaves(text["visual"]))
    assert all(leaf.any() for leaf in jax.tree.leaves(text["language_model"]))
    remat = MODULE.clone(language_model=TEXT.clone(remat=True))
    traced = jax.make_jaxpr(lambda params: remat.apply({"params": params}, TOKENS, BANK))(PARAMS)
    assert str(traced).count("= remat") + str(traced).count("= checkpoint") == 2  # in the tower and in the decoder


def test_gradient_is_the_slope():
    params, direction = jax.device_get((PARAMS, _params(1)))
    gradient = jax.device_get(GRADIENT(PARAMS, TOKENS, BANK)[0])
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction)))
    moved = lambda step: jax.tree.map(lambda p, d: p + np.float32(step) * d, params, direction)
    at = lambda step: np.square(np.asarray(LOGITS(moved(step), TOKENS, BANK), np.float64)).mean()
    assert slope == pytest.approx((at(1e-3) - at(-1e-3)) / 2e-3, rel=2e-2)


def test_a_step_of_distillation_takes_images_and_another_bank_compiles_nothing():
    """Sampler and loss know nothing of images."""
    prompts = as_prompts(RECORDS, 14, jax.random.key(0))
    how = SamplingParams(max_new_tokens=3)

    @jax.jit
    def step(model, params, teacher):
        rollout = generate(model.decode, MODULE.init_cache, params, prompts, how)
        hidden = model.hidden(teacher, rollout.tokens, None)
        supervise = opd.supervise(model.hidden, MODULE.head, MODULE.head(teacher))
        loss = lambda p: supervise(p, rollout, opd.TeacherStates(hidden), jax.random.key(0)).total.sum()
        return rollout, *jax.value_and_grad(loss)(params)

    part = lambda bank: functions(MODULE, bank)._replace(head=None, init_cache=None)
    rollout, loss, grads = step(part(BANK), PARAMS, _params(1))
    assert loss > 0 and rollout.response.sum() == 3 * B and (rollout.tokens >= V).any()
    assert (
        all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
        and grads["visual"]["merger"]["norm"]["bias"].any()
    )
    _, other, _ = step(part(_bank(seed=1)), PARAMS, _params(1))
    assert other != loss and step._cache_size() == 1
    _, zero, _ = step(part(BANK), PARAMS, PARAMS)
    assert abs(zero) < 1e-5


def test_adapters_fit_the_tower_and_the_decoder():
    pattern = r"visual/(blocks/attn/qkv|.*merger.*/linear_fc1)/kernel|self_attn/(q|v)_proj/kernel"
    adapter = lora.init(jax.random.key(0), PARAMS, pattern, rank=2)
    assert len(adapter) == 5
    np.testing.assert_array_equal(LOGITS(lora.merge(PARAMS, adapter, 0.5), TOKENS, BANK), LOGITS(PARAMS, TOKENS, BANK))
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, adapter)
    merged, pull = jax.vjp(lambda adapter: lora.merge(PARAMS, adapter, 0.5), adapter)
    grads = pull(GRADIENT(merged, TOKENS, BANK)[0])
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in jax.tree.leaves(grads))


def test_eight_devices_equal_one():
    expected = GRADIENT(PARAMS, TOKENS, BANK)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    params = shard_params(PARAMS, mesh, partition_rules(mesh, RULES))
    actual = GRADIENT(params, shard_batch(TOKENS, mesh), replicate(BANK, mesh))
    assert actual[1].sharding.spec[0] == "fsdp"
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)


def test_rules_name_every_matrix():
    specs = param_specs(PARAMS, RULES)
    for path, spec in jax.tree_util.tree_leaves_with_path(specs):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        small = name.endswith(("scale", "bias")) or "pos_embed" in name or "patch_embed" in name
        assert (spec == jax.P()) == small, name


def test_bfloat16_computes_nearly_the_same():
    half = MODULE.clone(language_model=TEXT.clone(dtype=jnp.bfloat16))
    rough, copied = (_jitted(module=half)(params, TOKENS, BANK) for params in (PARAMS, half.sampling_copy(PARAMS)))
    np.testing.assert_array_equal(copied, rough)
    exact = LOGITS(PARAMS, TOKENS, BANK)
    assert rough.dtype == jnp.float32
    assert 0 < np.linalg.norm(rough - exact) < 0.1 * np.linalg.norm(exact)


def test_without_images_it_is_the_decoder():
    tokens = jnp.minimum(TOKENS, V - 1)
    expected = _jitted(module=TEXT)(PARAMS["language_model"], tokens)
    np.testing.assert_allclose(LOGITS(PARAMS, tokens, BANK), expected, **CLOSE)
    none = _jitted(module=MODULE.clone(images_per_row=0))
    np.testing.assert_allclose(none(PARAMS, tokens, BANK), expected, **CLOSE)
    assert MODULE.head(PARAMS).shape == (16, V) and functions(MODULE, BANK, V - 2).head(PARAMS).shape == (16, V - 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision": TOWER._replace(num_heads=8)}, "width=16 does not make 8 heads of a multiple of 4"),
        ({"vision": TOWER._replace(num_positions=10)}, "num_positions=10 is no square"),
        ({"vision": TOWER._replace(deepstack=(1, 0))}, r"deepstack=\(1, 0\): give increasing blocks of 0 to 1"),
        ({"vision": TOWER._replace(deepstack=(2,))}, r"deepstack=\(2,\)"),
        ({"images_per_row": -1}, "images_per_row=-1"),
    ],
)
def test_wrong_fields_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(MODULE.clone(**change).init, jax.random.key(0), TOKENS, BANK)
