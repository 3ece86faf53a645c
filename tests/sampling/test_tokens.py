"""The token sampler: filters, draws, log-probabilities, ends of answers, keys, and slots that are filled again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from opd_jax.models.hf import load_decoder
from opd_jax.sampling import tokens as sampler
from opd_jax.sampling.tokens import SamplingParams, as_prompts, filter_logits, generate

V, D, ROOM = 13, 8, 6
STOP = (3, 7)
PROMPTS = [[1, 2, 4], [5], [9, 8, 1, 2, 11, 6], [12, 10], [4, 4, 4, 4], [2], [6, 5], [8, 1, 9, 10, 2]]
WARM = SamplingParams(max_new_tokens=10, stop_ids=STOP, temperature=0.9)

# ---- a decoder of one attention layer, its float64 twin, and a table of transitions ----------------------------------


def make_params(seed=0):
    shapes = {"embed": (V, D), "place": (32, D), "q": (D, D), "k": (D, D), "v": (D, D), "out": (D, V)}
    keys = dict(zip(shapes, jax.random.split(jax.random.key(seed), len(shapes))))
    return {name: 0.5 * jax.random.normal(keys[name], shape) for name, shape in shapes.items()}


def init_cache(batch, length):
    return {"k": jnp.zeros((1, batch, length, D)), "v": jnp.zeros((1, batch, length, D))}


def decode(params, tokens, positions, cache):
    x = params["embed"][tokens] + params["place"][positions]
    write = jax.vmap(lambda row, p, value: row.at[p].set(value))
    k, v = (write(cache[name][0], positions, x @ params[name]) for name in "kv")
    scores = jnp.einsum("bsd,btd->bst", x @ params["q"], k)
    seen = jnp.arange(k.shape[1])[None, None] <= positions[..., None]
    mixed = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)) @ v
    return (x + mixed) @ params["out"], {"k": k[None], "v": v[None]}


def forward64(params, tokens):
    """Logits of one row without padding: no cache, written for numpy."""
    p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    x = p["embed"][tokens] + p["place"][: len(tokens)]
    scores = (x @ p["q"]) @ (x @ p["k"]).T
    scores[np.triu_indices(len(tokens), 1)] = -np.inf
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return (x + weights / weights.sum(1, keepdims=True) @ (x @ p["v"])) @ p["out"]


def log_softmax64(logits):
    logits = np.asarray(logits, np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


TABLE = jnp.asarray([[0.0, 1.0, -0.5, 0.3], [1.2, -1.0, 0.4, 0.0], [0.1, 0.2, 0.9, -0.7], [-0.3, 0.0, 0.5, 1.1]])


def table_decode(table, tokens, positions, cache):
    return table[tokens], cache


def no_cache(batch, length):
    return jnp.zeros((1, batch, length))


PARAMS = make_params()


@functools.partial(jax.jit, static_argnames=("sampling", "decode_fn", "cache_fn"))
def run(prompts, sampling=WARM, params=PARAMS, decode_fn=decode, cache_fn=init_cache):
    return generate(decode_fn, cache_fn, params, prompts, sampling)


def prompts_of(seed=0, ids=PROMPTS, room=ROOM, **kwargs):
    return as_prompts(ids, room, jax.random.key(seed), **kwargs)


def rows(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def assert_same(a, b):
    """The same tokens to the bit, log-probabilities but for rounding."""
    for name, left, right in zip(a._fields, a, b):
        if name in ("behavior_logp", "sampling_logp"):
            np.testing.assert_allclose(left, right, atol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(left, right, err_msg=name)


# ---- filters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.1), (8, 0.7, 0.0), (9, 0.9, 0.2), (99, 0.01, 0.5)],
)
def test_filters_are_transformers(temperature, top_k, top_p, min_p):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    logits = np.random.default_rng(0).normal(size=(64, 40)).astype(np.float32) * 2
    scores = hf.TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))
    for on, make in ((top_k > 0, lambda: hf.TopKLogitsWarper(top_k)), (top_p < 1, lambda: hf.TopPLogitsWarper(top_p)),
                     (min_p > 0, lambda: hf.MinPLogitsWarper(min_p))):  # fmt: skip
        scores = make()(None, scores) if on else scores
    ours = filter_logits(jnp.asarray(logits), SamplingParams(1, (), temperature, top_k, top_p, min_p))
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(scores.numpy()))
    np.testing.assert_allclose(jax.nn.log_softmax(ours), torch.log_softmax(scores, -1).numpy(), atol=2e-6)


def test_filters_by_hand():
    logits = jnp.log(jnp.asarray([[0.4, 0.1, 0.3, 0.2]]))
    kept = lambda **settings: np.isfinite(filter_logits(logits, SamplingParams(1, **settings)))[0].tolist()
    assert kept(top_k=2) == [True, False, True, False]
    assert kept(top_p=0.65) == [True, False, True, False]
    assert kept(top_p=0.75) == [True, False, True, True]
    assert kept(top_p=0.01) == [True, False, False, False]
    assert kept(min_p=0.45) == [True, False, True, True]
    assert kept(min_p=1.0) == [True, False, False, False]
    assert kept(top_k=3, top_p=0.5) == [True, False, True, False]  # 0.4 of the 0.9 left is below one half
    assert kept(top_k=2, top_p=0.5) == [True, False, False, False]  # 0.4 of the 0.7 left is not
    assert kept(temperature=0.0) == [True, False, False, False]


@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.3}, {"temperature": 0.0}])
def test_filters_of_ties_infinities_and_extremes(settings):
    logits = jnp.asarray([[0.0, 0.0, 0.0, -jnp.inf], [1e30, -1e30, 0.0, 1.0], [5.0, -jnp.inf, -jnp.inf, -jnp.inf]])
    sampling = SamplingParams(1, **settings)
    probability = np.asarray(jax.nn.softmax(filter_logits(logits.astype(jnp.bfloat16), sampling)))
    np.testing.assert_allclose(probability.sum(1), 1, rtol=1e-6)
    assert probability[0, 3] == 0
    np.testing.assert_allclose(probability[0, :3], [1, 0, 0] if settings.get("temperature") == 0 else [1 / 3] * 3)
    np.testing.assert_array_equal(probability[1:], [[1, 0, 0, 0], [1, 0, 0, 0]])


def test_a_low_temperature_does_not_overflow():
    cold = filter_logits(jnp.asarray([[1e36, 2e36, 0.0]]), SamplingParams(1, temperature=1e-4))
    np.testing.assert_array_equal(jax.nn.softmax(cold), [[0, 1, 0]])


# ---- draws and their log-probabilities -------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [SamplingParams(3), SamplingParams(3, (3,), 0.7, 3, 0.75)])
def test_frequencies_are_the_enumerated_probabilities(sampling):
    """Chi-square of whole answers of the table model; the kept set and its mass are worked out in numpy."""
    n = 20_000
    rollout = run(prompts_of(ids=[[0, 1]], room=2, samples=n), sampling, TABLE, table_decode, no_cache)
    probability = np.exp(log_softmax64(np.asarray(TABLE) / sampling.temperature))
    for row in probability if sampling.top_k else ():
        row[np.argsort(row)[0]] = 0  # top-k 3 of 4
        row /= row.sum()
        order = np.argsort(-row)
        row[order[int(np.searchsorted(np.cumsum(row[order]), sampling.top_p)) + 1 :]] = 0
        row /= row.sum()
    assert not sampling.top_k or (probability == 0).sum() > 4  # top-p removes something that top-k does not
    expected = {}

    def walk(answer, last, p):
        if len(answer) == sampling.max_new_tokens or (last in sampling.stop_ids and answer):
            expected[answer] = p
            return
        for token in np.flatnonzero(probability[last]):
            walk((*answer, int(token)), int(token), p * probability[last, token])

    walk((), 1, 1.0)
    tokens, length = np.asarray(rollout.tokens), np.asarray(rollout.length)
    answers, counts = np.unique([str(tuple(map(int, t[2:end]))) for t, end in zip(tokens, length)], return_counts=True)
    assert set(answers) <= set(map(str, expected)) and abs(sum(expected.values()) - 1) < 1e-12
    seen = dict(zip(answers, counts))
    chi = sum((seen.get(str(a), 0) - n * p) ** 2 / (n * p) for a, p in expected.items())
    freedom = len(expected) - 1
    assert abs(chi - freedom) < 4 * np.sqrt(2 * freedom)

    policy, drawn = log_softmax64(TABLE), np.log(np.where(probability > 0, probability, 1))
    previous = np.pad(tokens[:, :-1], ((0, 0), (1, 0)))
    response = np.asarray(rollout.response)
    np.testing.assert_allclose(rollout.behavior_logp, np.where(response, policy[previous, tokens], 0), atol=2e-6)
    np.testing.assert_allclose(rollout.sampling_logp, np.where(response, drawn[previous, tokens], 0), atol=2e-6)


def test_sampling_logp_is_normalised_over_what_is_kept():
    """The mean of 1 / probability over draws counts the kept tokens: here all of the table's are drawn often."""
    sampling = SamplingParams(1, (), 1.3, 3, 0.95, 0.05)
    rollout = run(prompts_of(ids=[[2]], room=1, samples=500), sampling, TABLE, table_decode, no_cache)
    drawn, first = np.unique(rollout.tokens[:, 1], return_index=True)
    assert len(drawn) == np.isfinite(filter_logits(TABLE[2], sampling)).sum() == 3
    np.testing.assert_allclose(np.exp(rollout.sampling_logp[first, 1]).sum(), 1, rtol=1e-6)


def test_the_draw_at_a_position_uses_the_record_key_and_the_position():
    prompts = prompts_of()
    rollout = run(prompts, SamplingParams(4))
    for b, ids in enumerate(PROMPTS):
        for p in range(len(ids), len(ids) + 4):
            logits = jnp.asarray(forward64(PARAMS, rollout.tokens[b, :p])[-1], jnp.float32)
            key = jax.random.fold_in(prompts.keys[b], p)
            assert rollout.tokens[b, p] == jax.random.categorical(key, logits, mode="high")


@pytest.mark.parametrize("sampling", [WARM, WARM._replace(top_p=0.8, temperature=1.4), WARM._replace(temperature=0.0)])
def test_behavior_logp_is_a_fresh_forward(sampling):
    """Of the T = 1 policy, against float64 without a cache, whatever was sampled from."""
    rollout = run(prompts_of(), sampling)
    for b in range(len(PROMPTS)):
        tokens = np.asarray(rollout.tokens[b, : rollout.length[b]])
        logits = forward64(PARAMS, tokens)
        logp = np.take_along_axis(log_softmax64(logits[:-1]), tokens[1:, None], 1)[:, 0]
        start = len(PROMPTS[b])
        np.testing.assert_allclose(rollout.behavior_logp[b, start : len(tokens)], logp[start - 1 :], atol=1e-5)
        kept = jax.nn.log_softmax(filter_logits(jnp.asarray(logits, jnp.float32), sampling))
        logp = np.take_along_axis(np.asarray(kept)[:-1], tokens[1:, None], 1)[:, 0]
        np.testing.assert_allclose(rollout.sampling_logp[b, start : len(tokens)], logp[start - 1 :], atol=1e-5)


def test_rollout_log_probs_are_behavior_logp_and_blind_to_padding():
    rollout = run(prompts_of())
    b, s = rollout.tokens.shape
    positions = jnp.broadcast_to(jnp.arange(s)[None], (b, s))
    logits, _ = jax.jit(decode)(PARAMS, rollout.tokens, positions, init_cache(b, s))
    predicts = jnp.pad(rollout.response[:, 1:], ((0, 0), (0, 1)))
    spoiled = jnp.where(predicts[..., None], logits, jnp.nan)

    def total(x):
        logp = sampler.rollout_log_probs(x, rollout)
        return logp.sum(), logp

    gradient, logp = jax.jit(jax.grad(total, has_aux=True))(spoiled)
    np.testing.assert_allclose(logp, rollout.behavior_logp, atol=1e-5)
    after = jnp.pad(rollout.tokens[:, 1:], ((0, 0), (0, 1)))
    expected = jnp.where(predicts[..., None], jax.nn.one_hot(after, V) - jax.nn.softmax(logits), 0)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_log_probs_by_hand():
    logits = jnp.log(jnp.asarray([[0.25, 0.75], [0.5, 0.5]]))
    np.testing.assert_allclose(sampler.log_probs(logits + 7, jnp.asarray([1, 0])), np.log([0.75, 0.5]), rtol=1e-5)
    assert sampler.log_probs(logits.astype(jnp.bfloat16), jnp.asarray([1, 0])).dtype == jnp.float32


# ---- what a rollout holds --------------------------------------------------------------------------------------------


def test_greedy_is_stepping_by_hand():
    rollout = run(prompts_of(), WARM._replace(temperature=0.0, top_k=3))
    for b, tokens in enumerate(map(list, PROMPTS)):
        while len(tokens) < len(PROMPTS[b]) + 10 and (len(tokens) == len(PROMPTS[b]) or tokens[-1] not in STOP):
            tokens.append(int(forward64(PARAMS, np.asarray(tokens))[-1].argmax()))
        assert rollout.length[b] == len(tokens)
        np.testing.assert_array_equal(rollout.tokens[b], tokens + [0] * (ROOM + 10 - len(tokens)))
    np.testing.assert_array_equal(rollout.sampling_logp, jnp.zeros_like(rollout.sampling_logp))
    assert (rollout.behavior_logp[rollout.response] < 0).all()


def test_the_end_token_belongs_to_the_answer():
    rollout = run(prompts_of(samples=4, task=[2, 0, 1, 2, 0, 1, 2, 0]), WARM._replace(pad_id=9))
    start = np.repeat([len(ids) for ids in PROMPTS], 4)
    np.testing.assert_array_equal(rollout.group, np.repeat(np.arange(8), 4))
    np.testing.assert_array_equal(rollout.task, np.repeat([2, 0, 1, 2, 0, 1, 2, 0], 4))
    assert 0 < int(rollout.truncated.sum()) < 32
    for b, (tokens, length) in enumerate(zip(np.asarray(rollout.tokens), np.asarray(rollout.length))):
        place = np.arange(len(tokens))
        np.testing.assert_array_equal(rollout.response[b], (place >= start[b]) & (place < length))
        np.testing.assert_array_equal(tokens[: start[b]], PROMPTS[b // 4])
        assert (tokens[length:] == 9).all()
        answer = tokens[start[b] : length]
        assert not np.isin(answer[:-1], STOP).any()
        assert bool(rollout.truncated[b]) == (answer[-1] not in STOP)
        assert len(answer) == 10 or answer[-1] in STOP
        assert (np.asarray(rollout.behavior_logp[b])[rollout.response[b]] < 0).all()
    for logp in (rollout.behavior_logp, rollout.sampling_logp):
        assert (logp[~rollout.response] == 0).all() and logp.dtype == jnp.float32


def test_an_end_token_at_the_limit_is_no_truncation():
    table = jnp.full((4, 4), -30.0).at[jnp.arange(4), jnp.asarray([1, 2, 3, 3])].set(30.0)  # 0 -> 1 -> 2 -> 3
    prompts = prompts_of(ids=[[0], [1], [0, 3, 2]], room=3)
    rollout = run(prompts, SamplingParams(2, (3,)), table, table_decode, no_cache)
    np.testing.assert_array_equal(rollout.tokens, [[0, 1, 2, 0, 0], [1, 2, 3, 0, 0], [0, 3, 2, 3, 0]])
    np.testing.assert_array_equal(rollout.length, [3, 3, 4])
    np.testing.assert_array_equal(rollout.truncated, [True, False, False])


def test_without_stop_ids_every_answer_is_full():
    rollout = run(prompts_of(), SamplingParams(4))
    np.testing.assert_array_equal(rollout.response.sum(1), np.full(8, 4))
    assert rollout.truncated.all()


def test_no_gradient_reaches_the_parameters():
    total = lambda params: generate(decode, init_cache, params, prompts_of(), SamplingParams(2)).behavior_logp.sum()
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(total))(PARAMS)))


# ---- keys, batches, devices ------------------------------------------------------------------------------------------


def test_a_record_depends_on_neither_its_batch_nor_the_room_nor_the_padding():
    prompts = prompts_of()
    whole = run(prompts)
    assert_same(run(rows(prompts, np.asarray([6, 1]))), rows(whole, np.asarray([6, 1])))
    junk = jnp.where(jnp.arange(ROOM)[None] < prompts.length[:, None], prompts.tokens, 5)
    assert_same(run(prompts._replace(tokens=junk)), whole)
    wide = prompts._replace(tokens=jnp.pad(prompts.tokens, ((0, 0), (0, 3))))
    assert_same(run(wide), jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 3))) if x.ndim == 2 else x, whole))


def test_samples_of_one_prompt_differ_and_seeds_differ():
    rollout = run(prompts_of(ids=[[1, 2]], samples=8))
    assert len(np.unique(rollout.tokens, axis=0)) > 4
    assert not np.array_equal(rollout.tokens, run(prompts_of(1, ids=[[1, 2]], samples=8)).tokens)


def test_eight_devices_draw_what_one_does():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    prompts = prompts_of()
    split = jax.device_put(prompts, NamedSharding(mesh, PartitionSpec("data")))
    params = jax.device_put(PARAMS, NamedSharding(mesh, PartitionSpec()))
    rollout = run(split, WARM, params)
    assert len(rollout.tokens.sharding.device_set) == 8
    assert_same(rollout, run(prompts))


# ---- how much is run and compiled ------------------------------------------------------------------------------------


def counted(calls, traces):
    """The decoder, with the widths it is traced at and run at written down."""

    def count(params, tokens, positions, cache):
        traces.append(tokens.shape)
        jax.debug.callback(lambda: calls.append(tokens.shape))
        return decode(params, tokens, positions, cache)

    return count


def test_the_logits_of_a_prefill_are_never_computed():
    wide, vocabulary = 64, 5000
    params = PARAMS | {"out": jnp.zeros((D, vocabulary)), "place": jnp.zeros((2 * wide, D))}
    compiled = run.lower(prompts_of(room=wide), SamplingParams(2), params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * len(PROMPTS) * wide * vocabulary / 4


def test_samples_of_a_prompt_share_its_prefill_and_draw_what_they_draw_alone():
    prompts, calls, traces = prompts_of(samples=3), [], []
    rollout = jax.jit(generate, static_argnums=(0, 1, 4, 5))(
        counted(calls, traces), init_cache, PARAMS, prompts, WARM, 3
    )
    assert traces[0] == (len(PROMPTS), ROOM)
    assert_same(rollout, run(prompts))
    with pytest.raises(ValueError, match="rows are no multiple of samples=5"):
        generate(decode, init_cache, PARAMS, prompts, WARM, 5)


def test_the_loop_ends_with_the_last_record():
    calls = []
    rollout = run(prompts_of(ids=PROMPTS[:3]), WARM._replace(max_new_tokens=25), decode_fn=counted(calls, []))
    jax.block_until_ready(rollout)
    jax.effects_barrier()
    longest = int(rollout.response.sum(1).max())
    assert longest < 25 and calls == [(3, ROOM)] + [(3, 1)] * longest


def test_prefill_and_loop_are_compiled_once():
    traces, fn = [], counted([], [])
    fn = lambda *args: traces.append(args[1].shape) or decode(*args)
    for seed in range(3):
        run(prompts_of(seed, ids=PROMPTS[seed:][:4]), WARM, make_params(seed), fn)
    assert traces == [(4, ROOM), (4, 1)]


# ---- slots -----------------------------------------------------------------------------------------------------------


def stream_all(prompts, sampling=WARM, params=PARAMS, decode_fn=decode, **kwargs):
    return sampler.generate_in_slots(decode_fn, init_cache, params, prompts, sampling, **kwargs)


@pytest.mark.parametrize(("slots", "admit"), [(3, 1), (4, 3), (5, None), (40, 16)])
def test_slots_draw_what_one_batch_draws(slots, admit):
    prompts = prompts_of(ids=PROMPTS * 3, task=list(range(24)))
    assert_same(stream_all(prompts, slots=slots, admit=admit), run(prompts))


def test_slots_draw_greedily_and_filtered_what_one_batch_draws():
    for sampling in (WARM._replace(temperature=0.0), WARM._replace(top_k=6, top_p=0.9, min_p=0.02, pad_id=2)):
        assert_same(stream_all(prompts_of(), sampling, slots=3, admit=2), run(prompts_of(), sampling))


def test_answers_come_as_they_end_and_hold_nobody_up():
    """One record of 12 tokens beside short ones, two slots: the short ones all pass through the other slot."""
    table = jnp.full((4, 4), -30.0).at[jnp.arange(4), jnp.asarray([0, 3, 1, 3])].set(30.0)  # 0 repeats, 2 -> 1 -> 3
    prompts = prompts_of(ids=[[0]] + [[2]] * 6, room=1)
    calls = []

    def decode_table(params, tokens, positions, cache):
        jax.debug.callback(lambda: calls.append(tokens.shape))
        return params[tokens], cache

    pieces = sampler.stream(decode_table, no_cache, table, prompts, SamplingParams(12, (3,)), slots=2, admit=1)
    order = [int(i) for index, _ in pieces for i in index]
    jax.effects_barrier()
    assert sorted(order[:-2]) + sorted(order[-2:]) == [1, 2, 3, 4, 5, 0, 6]
    assert calls.count((2, 1)) == 12 and calls.count((1, 1)) == 7  # 12 steps; batches of two would take 12 + 2 + 2 + 2


def test_slots_are_compiled_once_whatever_the_number_of_prompts():
    traces = []
    fn = lambda *args: traces.append(args[1].shape) or decode(*args)
    for seed, n in enumerate((8, 5, 2)):
        stream_all(prompts_of(seed, PROMPTS[:n]), WARM, make_params(seed), fn, slots=4, admit=2)
    assert traces == [(2, ROOM), (4, 1)]


def test_slots_over_eight_devices_draw_what_one_does():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    prompts = prompts_of(ids=PROMPTS * 3)
    traces = []
    fn = lambda *args: traces.append(args[1].shape) or decode(*args)
    params = jax.device_put(PARAMS, NamedSharding(mesh, PartitionSpec()))
    assert_same(stream_all(prompts, WARM, params, fn, slots=16, admit=8, mesh=mesh), run(prompts))
    assert traces == [(8, ROOM), (16, 1)]


# ---- the bundled decoder ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """A random Qwen3 of transformers, and the same as a `decode_fn`, an `init_cache` and parameters."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, **heads)).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.2 * torch.randn_like(value))
    directory = tmp_path_factory.mktemp("qwen3")
    model.save_pretrained(directory)
    module, params = load_decoder(directory)
    apply = lambda params, *args: module.apply({"params": params}, *args, method="decode")
    return model, module, apply, params


def test_greedy_is_transformers_generate(qwen3):
    torch = pytest.importorskip("torch")
    model, module, apply, params = qwen3
    sampling = SamplingParams(12, (3, 7, 11), temperature=0.0)
    rollout = run(prompts_of(), sampling, params, apply, module.init_cache)
    settings = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": list(sampling.stop_ids), "pad_token_id": 0}
    for b, ids in enumerate(PROMPTS):
        expected = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **settings)[0].numpy()
        np.testing.assert_array_equal(rollout.tokens[b, : rollout.length[b]], expected)
    assert 0 < int(rollout.truncated.sum()) < 8


def test_decoder_in_slots_and_its_behavior_logp(qwen3):
    _, module, apply, params = qwen3
    prompts, sampling = prompts_of(), SamplingParams(12, (3, 7, 11), 0.8, top_p=0.95)
    rollout = run(prompts, sampling, params, apply, module.init_cache)
    streamed = sampler.generate_in_slots(apply, module.init_cache, params, prompts, sampling, slots=3, admit=2)
    assert_same(streamed, rollout)
    logits = jax.jit(module.apply)({"params": params}, rollout.tokens)
    np.testing.assert_allclose(sampler.rollout_log_probs(logits, rollout), rollout.behavior_logp, atol=1e-5)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_p": 0.0}, "top_p=0.0: .*1 keeps all"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_k": -1}, "top_k=-1: .*0 for all"),
        ({"min_p": 2.0}, "min_p=2.0"),
        ({"temperature": -1.0}, "temperature=-1.0: give 0, for greedy"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"stop_ids": (3, V)}, f"stop_ids holds {V}; .*0 to {V - 1}"),
        ({"pad_id": -1}, "pad_id holds -1"),
    ],
)
def test_bad_settings_are_refused(change, message):
    for call in (run, functools.partial(stream_all, slots=2)):
        with pytest.raises(ValueError, match=message) as error:
            call(prompts_of(), WARM._replace(**change))
        assert "\n" not in str(error.value)


def test_bad_calls_are_refused():
    with pytest.raises(ValueError, match=r"stop_ids=\[3\]: give a tuple"):
        stream_all(prompts_of(), WARM._replace(stop_ids=[3]), slots=2)
    with pytest.raises(ValueError, match="prompt 2 has 6 tokens; give 1 to 5"):
        prompts_of(room=5)
    with pytest.raises(ValueError, match="prompt 1 has 0 tokens"):
        prompts_of(ids=[[1], []])
    with pytest.raises(ValueError, match="samples=0"):
        prompts_of(samples=0)
    with pytest.raises(ValueError, match="slots=2, admit=3"):
        stream_all(prompts_of(), slots=2, admit=3)
    with pytest.raises(ValueError, match=r"prompt lengths \[7\]"):
        stream_all(prompts_of()._replace(length=jnp.full(8, 7)), slots=2)
    with pytest.raises(ValueError, match=r"init_cache\(8, 6\) has a leaf \(1, 6, 8\)"):
        run(prompts_of(), cache_fn=lambda batch, length: jnp.zeros((1, length, batch)))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match="multiples of 8 devices"):
        stream_all(prompts_of(), slots=12, admit=8, mesh=mesh)
