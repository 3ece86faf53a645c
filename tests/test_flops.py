"""What a step must do, by hand, against what compiled programs do."""

import jax
import jax.numpy as jnp
import pytest

from opd_jax import cost, flops
from opd_jax.models import lora
from opd_jax.models.decoder import Decoder
from opd_jax.models.mmdit import MMDiT

RECORDS, TOKENS, SLOTS = 2, 16, 24
SIZES = {"width": 32, "mlp_width": 48, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
FLOW = MMDiT(2, 4, 4, 3, 3, 8, 40, 20, 8, (0, 1), "rms_norm")
ADAPTED, RANK, SIDE, CONTEXT = r"attn/(to|add)_\w+/kernel", 4, 8, 5


def counted(function, *args) -> float:
    return cost.cost_of(jax.jit(function).lower(*args).compile().as_text()).flops


def decoder(tied: bool):
    module = Decoder(64, tie_embeddings=tied, **SIZES)
    tokens = jax.ShapeDtypeStruct((RECORDS, TOKENS), jnp.int32)
    return module, tokens, jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_decoders_gradient(tied):
    module, tokens, params = decoder(tied)
    loss = lambda params, tokens: (module.apply({"params": params}, tokens) ** 2).sum()
    forward = flops.decoder(module, RECORDS * TOKENS, TOKENS, RECORDS * TOKENS)
    assert counted(jax.value_and_grad(loss), params, tokens) == forward.total + forward.backward()


def test_one_token_from_a_cache():
    module, _, params = decoder(False)
    cache = jax.eval_shape(lambda: module.init_cache(RECORDS, SLOTS))
    one = jax.ShapeDtypeStruct((RECORDS, 1), jnp.int32)
    decode = lambda params, *args: module.apply({"params": params}, *args, method="decode")
    assert counted(decode, params, one, one, cache) == flops.decoder(module, RECORDS, SLOTS, RECORDS).total


def test_answers_are_their_tokens_one_by_one():
    module, prompt, new = decoder(False)[0], 5, 4
    each = [flops.decoder(module, RECORDS, seen, RECORDS).total for seen in (6, 7, 8)]
    first = flops.decoder(module, RECORDS * prompt, prompt, RECORDS).total
    assert flops.answers(module, RECORDS, prompt, new).total == pytest.approx(first + sum(each))


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_of_decoding_are_kernels_and_cache(tied):
    module, _, params = decoder(tied)
    count = sum(leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "kernel")
    count += 64 * SIZES["width"] if tied else 0
    slot = 2 * SIZES["num_layers"] * SIZES["num_kv_heads"] * SIZES["head_dim"]
    by_hand = 2 * (4 * count + RECORDS * slot * (6 + 7 + 8))  # three tokens after the prompt, 16 bits
    assert flops.decoding_bytes(module, RECORDS, 5, 4, 2) == by_hand


def test_bytes_of_experts_are_refused():
    module = Decoder(64, num_experts=4, experts_per_token=2, **SIZES)
    with pytest.raises(ValueError, match="num_experts=4"):
        flops.decoding_bytes(module, RECORDS, 5, 4, 2)


def test_experts_count_as_far_as_tokens_use_them():
    module = Decoder(64, num_experts=4, experts_per_token=2, **SIZES)
    dense = flops.decoder(decoder(False)[0], 1, 1, 0).dense
    gate = 2 * SIZES["num_layers"] * SIZES["width"] * 4
    mlp = 2 * SIZES["num_layers"] * 3 * SIZES["width"] * SIZES["mlp_width"]
    assert flops.decoder(module, 1, 1, 0).dense == dense + mlp + gate


def flow():
    shapes = (RECORDS, SIDE, SIDE, 4), (RECORDS,), (RECORDS, CONTEXT, 40), (RECORDS, 20)
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    params = jax.eval_shape(FLOW.init, jax.random.key(0), *inputs)["params"]
    adapter = jax.eval_shape(lambda params: lora.init(jax.random.key(0), params, ADAPTED, RANK), params)
    return params, adapter, inputs


def test_a_velocity_with_an_adapter_beside_the_weights():
    params, adapter, inputs = flow()
    velocity = lambda adapter, params, *inputs: lora.apply(FLOW, params, adapter, 2.0, *inputs)
    expected = flops.mmdit(FLOW, RECORDS, SIDE, CONTEXT, ADAPTED, RANK)
    assert counted(velocity, adapter, params, *inputs) == expected.total
    assert expected._replace(adapter=0.0) == flops.mmdit(FLOW, RECORDS, SIDE, CONTEXT)


def test_the_gradient_of_an_adapter_needs_none_of_the_weights():
    """The hand count is a little too much: nothing before the first adapter has a gradient, nor has its input."""
    params, adapter, inputs = flow()
    loss = lambda adapter, params, *inputs: (lora.apply(FLOW, params, adapter, 2.0, *inputs) ** 2).sum()
    forward = flops.mmdit(FLOW, RECORDS, SIDE, CONTEXT, ADAPTED, RANK)
    found = counted(jax.grad(loss), adapter, params, *inputs)
    assert 0.85 < found / (forward.total + forward.backward(frozen=True)) <= 1
