"""What blocks keep for the backward pass: the same gradients, less memory, more products, in every model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import cost
from opd_jax.models import remat
from opd_jax.models.decoder import Decoder
from opd_jax.models.gpt2 import GPT2
from opd_jax.models.mmdit import MMDiT
from opd_jax.models.vit import ViT

SETTINGS = ("", "nothing", "dots", "dots_with_no_batch_dims")
LAYERS, RECORDS, TOKENS, WIDTH, MLP, HEADS, DIM = 6, 2, 64, 32, 48, 4, 8
DECODER = Decoder(64, WIDTH, MLP, LAYERS, HEADS, HEADS, DIM, qk_norm=True)
NORMAL = np.random.default_rng(0).standard_normal
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (RECORDS, TOKENS)), jnp.int32)
FLOW = [jnp.asarray(NORMAL(size), jnp.float32) for size in ((2, 8, 8, 4), (2, 3, 12), (2, 6))]
MODELS = {
    "decoder": (DECODER, (IDS,)),
    "gpt2": (GPT2(64, 32, 2, 4), (IDS,)),
    "mmdit": (MMDiT(2, 4, 4, 2, 2, 8, 12, 6, 8, (0,)), (FLOW[0], jnp.ones(2) / 2, *FLOW[1:])),
    "vit": (ViT(32, 48, 2, 4, patch_size=4, image_size=8), (jnp.full((2, 8, 8, 3), 99, jnp.uint8),)),
}


def compiled(module, inputs):
    """The gradient of a sum of squares, and parameters to call it with."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(0.2 * NORMAL(leaf.shape), jnp.float32), shapes)
    loss = lambda params: (module.apply({"params": params}, *inputs) ** 2).sum()
    return jax.jit(jax.grad(loss)).lower(params).compile(), params


@pytest.mark.parametrize("name", list(MODELS))
def test_gradients_are_the_same(name):
    module, inputs = MODELS[name]
    program, params = compiled(module, inputs)
    expected = program(params)
    for setting in SETTINGS[1:]:
        actual = compiled(module.clone(remat=setting), inputs)[0](params)
        for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
            own = actual
            for key in path:
                own = own[key.key]
            np.testing.assert_allclose(own, leaf, rtol=0, atol=1e-5 * max(1e-3, np.abs(leaf).max()), err_msg=str(path))


def test_less_is_kept_and_more_is_computed():
    """FLOPs by hand: without projections the products of attention alone, without anything all but the last of a block.

    The gradient needs the inputs of a block's last product, and not its result.
    """
    programs = {setting: compiled(DECODER.clone(remat=setting), (IDS,))[0] for setting in SETTINGS}
    flops = {name: cost.cost_of(program.as_text()).flops for name, program in programs.items()}
    rows = RECORDS * TOKENS
    attention = 2 * 2 * rows * TOKENS * HEADS * DIM
    projections = 2 * rows * (4 * WIDTH * HEADS * DIM + 2 * WIDTH * MLP)
    assert flops["dots"] == flops[""]
    assert flops["dots_with_no_batch_dims"] - flops[""] == LAYERS * attention
    assert flops["nothing"] - flops[""] == LAYERS * (attention + projections)
    memory = {name: cost.memory_of(program).temporary for name, program in programs.items()}
    assert memory["nothing"] < memory["dots_with_no_batch_dims"] < memory["dots"] < memory[""]
    block = 4 * rows * WIDTH  # the one array of a block that is kept
    assert memory[""] - memory["nothing"] > (LAYERS - 1) * block


@pytest.mark.parametrize("setting", ["False", False, ""])
def test_false_keeps_everything(setting):
    assert remat.name_of(setting) == "" and remat.block_of(Decoder, setting) is Decoder


@pytest.mark.parametrize("setting", ["True", True, "nothing"])
def test_true_keeps_nothing(setting):
    assert remat.name_of(setting) == "nothing" and not remat.mistake(setting)


def test_an_unknown_setting_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="remat='all': choose nothing, dots, dots_with_no_batch_dims"):
        DECODER.clone(remat="all").init(jax.random.key(0), IDS)
