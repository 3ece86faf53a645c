"""What a compiled program costs: against counts by hand, loops as often as they run, collectives on eight devices."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from opd_jax import cost, hlo, optim
from opd_jax.models.decoder import Decoder
from opd_jax.types import Weighted

SIZES = {"width": 32, "mlp_width": 48, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "vocab_size": 64}
RECORDS, TOKENS = 2, 16


def compiled(function, *args, **jitted):
    return jax.jit(function, **jitted).lower(*args).compile()


def forward(layers: int):
    """A small decoder's logits, compiled from shapes, and the FLOPs of its matrix products by hand."""
    module = Decoder(num_layers=layers, qk_norm=True, **SIZES)
    tokens = jax.ShapeDtypeStruct((RECORDS, TOKENS), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
    w, m, heads, d = (SIZES[name] for name in ("width", "mlp_width", "num_heads", "head_dim"))
    block = w * (heads + 2 * SIZES["num_kv_heads"]) * d + heads * d * w + 3 * w * m
    attention = 2 * 2 * RECORDS * heads * TOKENS * TOKENS * d  # queries with keys, then with values
    by_hand = layers * (2 * block * RECORDS * TOKENS + attention) + 2 * w * SIZES["vocab_size"] * RECORDS * TOKENS
    return compiled(lambda params, tokens: module.apply({"params": params}, tokens), params, tokens), by_hand, params


@pytest.mark.parametrize("layers", [2, 4])
def test_flops_of_a_decoder_are_those_counted_by_hand(layers):
    program, by_hand, _ = forward(layers)
    assert cost.cost_of(program.as_text()).flops == by_hand


def layer_by_hand() -> tuple[int, int]:
    """FLOPs of one layer's forward pass, and of its last product."""
    w, m, heads, kv, d = (SIZES[name] for name in ("width", "mlp_width", "num_heads", "num_kv_heads", "head_dim"))
    rows = RECORDS * TOKENS
    kernels = w * (heads + 2 * kv) * d + heads * d * w + 3 * w * m
    return 2 * rows * kernels + 2 * 2 * rows * TOKENS * heads * d, 2 * rows * w * m


@pytest.mark.parametrize("remat", ["", "nothing"])
def test_flops_of_a_decoders_update_are_those_counted_by_hand(remat):
    """Backward twice the forward; with nothing kept, every layer once more but for its last product, twice in parts."""
    layers, parts = 3, 2
    module = Decoder(num_layers=layers, qk_norm=True, remat=remat, **SIZES)
    tokens = jax.ShapeDtypeStruct((parts * RECORDS, TOKENS), jnp.int32)

    def supervise(params, tokens, labels, key):
        total = (module.apply({"params": params}, tokens) ** 2).sum((1, 2))
        return Weighted(total, jnp.ones_like(total))

    optimizer = optim.adamw(1e-3)
    update = optim.dense(supervise, optimizer, micro_batches=parts)
    init = lambda: module.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    state = jax.eval_shape(lambda: optim.init_state(init(), optimizer))
    key = jax.eval_shape(lambda: jax.random.key(0))
    program = update.func.lower(*update.args, state, tokens, None, key).compile()
    layer, last = layer_by_hand()
    head = 2 * SIZES["width"] * SIZES["vocab_size"] * RECORDS * TOKENS
    again = layers * (layer - last) if remat else 0
    assert cost.cost_of(program.as_text()).flops == parts * (3 * (layers * layer + head) + again)
    memory, count = cost.memory_of(program), sum(leaf.size for leaf in jax.tree.leaves(state.params))
    scalars = 8 * 4
    assert memory.arguments == pytest.approx(4 * (4 * count + parts * RECORDS * TOKENS), abs=scalars)
    assert memory.aliased == pytest.approx(4 * 4 * count, abs=scalars)  # parameters, two moments, the average: in place


def test_flops_and_bytes_of_decoding_a_token_are_those_counted_by_hand():
    """Of the cache every slot is attended to; kernels are read once, and so are both caches."""
    layers, slots = 2, 32
    module = Decoder(num_layers=layers, qk_norm=True, **SIZES)
    one = jax.ShapeDtypeStruct((RECORDS, 1), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), one)["params"]
    cache = jax.eval_shape(lambda: module.init_cache(RECORDS, slots))
    decode = lambda params, tokens, positions, cache: module.apply(
        {"params": params}, tokens, positions, cache, method="decode"
    )
    found = cost.cost_of(compiled(decode, params, one, one, cache, donate_argnums=3).as_text())
    w, m, heads, kv, d = (SIZES[name] for name in ("width", "mlp_width", "num_heads", "num_kv_heads", "head_dim"))
    kernels = layers * (w * (heads + 2 * kv) * d + heads * d * w + 3 * w * m) + w * SIZES["vocab_size"]
    assert found.flops == 2 * RECORDS * kernels + layers * 2 * 2 * RECORDS * slots * heads * d
    least = 4 * (kernels + 2 * layers * RECORDS * slots * kv * d)
    assert least < found.bytes < 4 * least


@pytest.mark.parametrize("layers", [4, 16])
def test_the_peak_of_a_known_program_lies_between_counts_by_hand(layers):
    """The gradient through `layers` of tanh(x W): of each its input is kept, and up to two arrays more for the tanh.

    Where a layer is computed again its input alone is. A few arrays are of the running layer.
    """
    rows, width = 256, 64
    x, stack = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, width), (layers, width, width)))
    state, weights = 4 * rows * width, 4 * layers * width * width

    def peak(layer, least, most):
        loss = lambda stack, x: (jax.lax.scan(layer, x, stack)[0] ** 2).sum()
        memory = cost.memory_of(compiled(jax.grad(loss), stack, x))
        assert memory.arguments == state + weights and memory.output == weights
        assert least * layers * state <= memory.temporary <= (most * layers + 6) * state
        assert memory.peak == memory.arguments + memory.output + memory.temporary + memory.code

    layer = lambda x, w: (jnp.tanh(x @ w), None)
    peak(layer, 2, 3)
    peak(jax.checkpoint(layer, prevent_cse=False), 1, 1)


def test_memory_has_the_bytes_of_the_arguments():
    program, _, params = forward(2)
    memory = cost.memory_of(program)
    count = sum(leaf.size for leaf in jax.tree.leaves(params)) + RECORDS * TOKENS
    assert memory.arguments == 4 * count
    assert memory.output == 4 * RECORDS * TOKENS * SIZES["vocab_size"]
    assert memory.peak >= memory.arguments + memory.output


def test_donated_arguments_are_counted_once_in_the_peak():
    size = 1 << 16
    x = jax.ShapeDtypeStruct((size,), jnp.float32)
    kept = cost.memory_of(compiled(lambda x: x + 1, x))
    donated = cost.memory_of(compiled(lambda x: x + 1, x, donate_argnums=0))
    assert donated.aliased == 4 * size and kept.aliased == 0
    assert kept.peak - donated.peak == pytest.approx(4 * size, abs=1024)


def test_flops_do_not_depend_on_the_micro_batches():
    def supervise(params, x, labels, key):
        total = ((x @ params) ** 2).sum(1)
        return Weighted(total, jnp.ones_like(total))

    def flops(parts):
        optimizer = optax.sgd(0.1)
        update = optim.dense(supervise, optimizer, micro_batches=parts)
        state = jax.eval_shape(lambda: optim.init_state(jnp.zeros((16, 32)), optimizer))
        x, key = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.eval_shape(lambda: jax.random.key(0))
        return cost.cost_of(update.func.lower(*update.args, state, x, None, key).compile().as_text()).flops

    by_hand = 2 * 8 * 16 * 32 * 2  # forward, and the gradient of the parameters
    assert [flops(parts) for parts in (1, 2, 4)] == [by_hand] * 3


def test_a_loop_that_data_end_runs_as_often_as_the_caller_says():
    def halve(x, w):
        return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: jnp.tanh(x @ w), x)

    x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    text = compiled(halve, x, x).as_text()
    assert cost.cost_of(text, trips=7).flops == 7 * 2 * 8**3


def test_a_scan_reads_each_slice_of_what_it_goes_through_once():
    stack = jax.ShapeDtypeStruct((64, 32, 32), jnp.float32)
    x = jax.ShapeDtypeStruct((4, 32), jnp.float32)
    text = compiled(lambda x, stack: jax.lax.scan(lambda x, w: (x @ w, None), x, stack)[0], x, stack).as_text()
    whole = 4 * 64 * 32 * 32
    assert whole <= cost.cost_of(text).bytes < 6 * whole  # not 64 times


def test_collectives_of_a_program_on_eight_devices():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = lambda shape, *axes: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes))
    )

    def gathered(w):
        return jax.lax.with_sharding_constraint(w, NamedSharding(mesh, PartitionSpec()))

    with jax.set_mesh(mesh):
        text = compiled(gathered, place((64, 16), "data")).as_text()
    traffic = cost.cost_of(text, devices=8).collectives
    assert traffic == {"all-gather": cost.Traffic(1, 3 * 4 * 16 * 16)}  # three others get a shard of [16, 16]

    def reduced(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)[0]

    with jax.set_mesh(mesh):
        args = place((8, 32), None, "tensor"), place((32, 32), "tensor")
        text = compiled(reduced, *args, out_shardings=NamedSharding(mesh, PartitionSpec(None, "tensor"))).as_text()
    found = cost.cost_of(text, devices=8).collectives
    assert found and all(one.count % 5 == 0 for one in found.values())  # every run of the loop has its own


# What a TPU's program looks like, shortened: batches as dilated windows, and one gather in three fusions.
TPU = """\
HloModule jit_f, is_scheduled=true

%fused_start (p0: bf16[1,16]) -> bf16[4,16] {
  %p0 = bf16[1,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[4,16]{1,0:T(8,128)(2,1)} all-gather(%p0), channel_id=3, replica_groups=[2,4]<=[8]
}

%fused_done (p1: bf16[1,16]) -> bf16[4,16] {
  %p1 = bf16[1,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[4,16]{1,0:T(8,128)(2,1)} all-gather(%p1), channel_id=3, replica_groups=[2,4]<=[8]
}

%body (s: (s32[], bf16[1,16], f32[2,2,8,2,8])) -> (s32[], bf16[1,16], f32[2,2,8,2,8]) {
  %s = (s32[]{:T(128)}, bf16[1,16]{1,0}, /*index=2*/f32[2,2,8,2,8]{4,3,2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %w = bf16[1,16]{1,0} get-tuple-element(%s), index=1
  %a = bf16[4,16]{1,0:T(8,128)S(1)} fusion(%w), kind=kCustom, calls=%fused_start
  %b = bf16[4,16]{1,0:T(8,128)S(1)} fusion(%w), kind=kCustom, calls=%fused_done
  %q = bf16[2,2,8,4]{3,2,1,0} constant({...})
  %k = bf16[2,2,8,4]{3,2,1,0} constant({...})
  %c = f32[2,2,8,8]{3,2,1,0} convolution(%q, %k), window={size=2x2 lhs_dilate=2x2}, dim_labels=01bf_01oi->01bf
  ROOT %t = (s32[]{:T(128)}, bf16[1,16]{1,0}) tuple(%i, %w)
}

%cond (s.1: (s32[], bf16[1,16], f32[2,2,8,2,8])) -> pred[] {
  %n = s32[]{:T(128)} constant(6)
  %s.1 = (s32[]{:T(128)}, bf16[1,16]{1,0}, f32[2,2,8,2,8]{4,3,2,1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %n), direction=LT
}

ENTRY %main (w.1: bf16[1,16]) -> bf16[1,16] {
  %w.1 = bf16[1,16]{1,0} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %init = (s32[]{:T(128)}, bf16[1,16]{1,0}) tuple(%zero, %w.1)
  %while.1 = (s32[]{:T(128)}, bf16[1,16]{1,0}) while(%init), condition=%cond, body=%body
  ROOT %out = bf16[1,16]{1,0} get-tuple-element(%while.1), index=1
}
"""


def test_a_tpus_program_is_read():
    program = hlo.parse(TPU)
    assert program.entry == "main" and len(program.computations) == 5
    gather = program.computations["fused_start"].instructions["all-gather.1"]
    assert gather.shapes == (hlo.Shape("bf16", (4, 16), True),) and gather.operands == ("p0",)
    assert not program.computations["body"].instructions["a"].shapes[0].hbm


def test_a_tpus_loops_collectives_and_batched_products_are_counted():
    found = cost.cost_of(TPU, devices=8)
    assert found.collectives == {"all-gather": cost.Traffic(6, 6 * 3 * 32)}  # one channel, six runs, three receivers
    assert found.flops == 6 * 4 * (2 * 8 * 8 * 4)  # six runs of four products


FUSED_SCATTER = """\
HloModule jit_g, is_scheduled=true

%last (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  ROOT %y = bf16[] parameter(1)
}

%write (p0: bf16[64,16], p1: s32[2,1], p2: bf16[2,16]) -> bf16[64,16] {
  %p0 = bf16[64,16]{1,0} parameter(0)
  %p1 = s32[2,1]{1,0} parameter(1)
  %p2 = bf16[2,16]{1,0} parameter(2)
  ROOT %put = bf16[64,16]{1,0} scatter(%p0, %p1, %p2), update_window_dims={1}, inserted_window_dims={0}, to_apply=%last
}

ENTRY %main (c: bf16[64,16], i: s32[2,1], n: bf16[2,16]) -> bf16[64,16] {
  %c = bf16[64,16]{1,0} parameter(0)
  %i = s32[2,1]{1,0} parameter(1)
  %n = bf16[2,16]{1,0} parameter(2)
  ROOT %f = bf16[64,16]{1,0} fusion(%c, %i, %n), kind=kCustom, calls=%write
}
"""


def test_a_scatter_into_a_cache_costs_what_it_writes_and_not_the_cache():
    assert cost.cost_of(FUSED_SCATTER).bytes == 2 * 2 * 16 * 2 + 2 * 4  # the rows read and written, their places


@pytest.mark.parametrize(("step", "runs"), [(1, 6), (2, 3), (4, 2)])
def test_a_loop_may_count_by_more_than_one(step, runs):
    counted = TPU.replace("tuple(%i, %w)", "tuple(%next, %w)").replace(
        "  %w = bf16", f"  %by = s32[] constant({step})\n  %next = s32[] add(%i, %by)\n  %w = bf16"
    )
    assert cost.cost_of(counted, devices=8).collectives["all-gather"].count == runs


@pytest.mark.parametrize("n", [2, 3, 7])
def test_pairs_of_a_batch_written_as_a_window_are_its_size(n):
    """XLA writes n products as a window of n over an image dilated by n: each position meets one element."""
    assert cost._pairs(n, n, n, n - 1, 0, n, 1) == n
    assert cost._pairs(8, 3, 8, 1, 1, 1, 1) == 3 * 8 - 2  # an ordinary convolution, without what meets the padding


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("[2,4]<=[8]", 4),
        ("{{0,1},{2,3}}", 2),
        ("mesh['a'=4,'b'=2] {'b'}", 2),
        ("mesh['a'=4,'b'=2] {'a','b'}", 8),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", 4),
    ],
)
def test_the_size_of_a_group_is_read(groups, size):
    assert cost._group_size(f", channel_id=1, replica_groups={groups}, dimensions={{0}}", 16) == size
    assert cost._group_size(", replica_groups={}", 16) == 16


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse("nothing")
