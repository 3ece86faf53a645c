# SPDX-License-Identifier: Apache-2.0
"""The fused linear divergence against float64 on full logits: values, gradients, memory, work, masks and meshes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from opd_jax import sharding
from opd_jax.losses.linear_divergence import Head, LinearDivergence, Options, linear_divergence, record_norms

FIELDS = LinearDivergence._fields


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(kind, options, trained, frozen, tokens, mask, weights):
    """All results, and the gradient of their weighted sum by what the student owns and by what the teacher owns."""

    def total(trained, frozen):
        (x, student_head), (y, teacher_head) = trained, frozen
        out = linear_divergence(x, student_head, y, teacher_head, kind, tokens, mask, options)
        return sum((a * w).sum() for a, w in zip(out, weights)), out

    (_, out), gradients = jax.value_and_grad(total, (0, 1), has_aux=True, allow_int=True)(trained, frozen)
    return out, *gradients


def problem(tokens=(6,), widths=(5, 7), columns=(37, 37), bias=False, softcap=(None, None), scale=1.0, seed=0):
    """Hidden states and heads of both models, sampled tokens, and a weight for every result."""
    keys = iter(jax.random.split(jax.random.key(seed), 20))
    models = []
    for width, vocabulary, cap in zip(widths, columns, softcap):
        kernel = scale * jax.random.normal(next(keys), (width, vocabulary))
        b = jax.random.normal(next(keys), (vocabulary,)) if bias else None
        models.append((jax.random.normal(next(keys), (*tokens, width)), Head(kernel, b, cap)))
    ids = jax.random.randint(next(keys), tokens, 0, 30)
    return *models, ids, [jax.random.normal(next(keys), tokens) for _ in FIELDS]


# ---- the definition, in float64 --------------------------------------------------------------------------------------


def logp64(x, kernel, bias, softcap, temperature, vocabulary):
    z = x @ kernel + (0 if bias is None else bias)
    z = (z if softcap is None else softcap * np.tanh(z / softcap))[..., :vocabulary] / temperature
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def defined(kind, a, s, t):
    kl = lambda p, q: np.where(np.isneginf(p), 0, np.exp(p) * (np.where(np.isneginf(p), 0, p) - q)).sum(-1)
    mix = lambda w: np.log(w * np.exp(t) + (1 - w) * np.exp(s))
    return {
        "reverse_kl": lambda: kl(s, t),
        "forward_kl": lambda: kl(t, s),
        "generalized_jsd": lambda: a * kl(t, mix(a)) + (1 - a) * kl(s, mix(a)),
        "skewed_forward_kl": lambda: kl(t, mix(a)),
        "skewed_reverse_kl": lambda: kl(s, mix(1 - a)),
    }[kind]()


def results64(kind, options, trained, frozen, tokens):
    (x, student), (y, teacher) = trained, frozen
    vocabulary = options.vocab_size or student[0].shape[1]
    s, t = (logp64(h, *head, options.temperature, vocabulary) for h, head in ((x, student), (y, teacher)))
    entropy = lambda logp: -(np.exp(logp) * np.where(np.isneginf(logp), 0, logp)).sum(-1)
    picked = [np.take_along_axis(logp, tokens[..., None], -1)[..., 0] for logp in (s, t)]
    kls = [defined(name, options.parameter, s, t) for name in (kind, "reverse_kl", "forward_kl")]
    return [*kls, entropy(s), entropy(t), *picked]


def to64(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def gradient64(kind, options, trained, frozen, tokens, weights, step=1e-5):
    """Central differences, for the hidden states and whatever the head has."""
    leaves, structure = jax.tree.flatten(trained)

    def total():
        out = results64(kind, options, jax.tree.unflatten(structure, leaves), frozen, tokens)
        return sum((a * w).sum() for a, w in zip(out, weights))

    slopes = [np.zeros_like(leaf) for leaf in leaves]
    for leaf, slope in zip(leaves, slopes):
        for i in np.ndindex(*leaf.shape):
            kept = leaf[i]
            leaf[i] = kept + step
            up = total()
            leaf[i] = kept - step
            slope[i] = (up - total()) / (2 * step)
            leaf[i] = kept
    return jax.tree.unflatten(structure, slopes)


def error(actual, expected):
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


# ---- values and gradients --------------------------------------------------------------------------------------------


def test_a_value_worked_out_by_hand():
    # Student (1/2, 1/2), teacher (9/10, 1/10).
    heads = jnp.zeros((1, 2)), jnp.log(jnp.array([[0.9, 0.1]]))
    out = linear_divergence(jnp.ones((1, 1)), heads[0], jnp.ones((1, 1)), heads[1], tokens=jnp.array([1]))
    expected = [0.510826, 0.510826, 0.368064, np.log(2), 0.325083, -np.log(2), np.log(0.1)]
    np.testing.assert_allclose(np.concatenate(out), expected, rtol=1e-5)


CASES = {
    "reverse_kl": (Options(block=8), {}),
    "forward_kl": (Options(block=64, train_head=False), {}),
    "generalized_jsd": (
        Options(0.3, temperature=1.3, vocab_size=35, block=7),
        {"tokens": (2, 3), "columns": (37, 40), "bias": True, "softcap": (4.0, 6.0)},
    ),
    "skewed_forward_kl": (Options(0.1, block=16), {}),
}


@pytest.mark.parametrize("kind", CASES)
def test_values_and_gradients_are_those_of_full_logits(kind):
    """Every result carries a weight of its own, so that one gradient covers them all."""
    options, shapes = CASES[kind]
    trained, frozen, tokens, weights = problem(**shapes)
    out, by_student, by_teacher = run(kind, options, trained, frozen, tokens, None, weights)
    exact = to64(trained), to64(frozen), np.asarray(tokens)
    for name, actual, expected in zip(FIELDS, out, results64(kind, options, *exact)):
        assert actual.shape == tokens.shape and actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, expected, atol=3e-6, err_msg=name)
    expected = gradient64(kind, options, *exact, to64(weights))
    assert error(by_student[0], expected[0]) < 1e-6
    if options.train_head:
        assert error(by_student[1].kernel, expected[1].kernel) < 1e-6
        if expected[1].bias is not None:
            assert error(by_student[1].bias, expected[1].bias) < 1e-6
            np.testing.assert_array_equal(by_student[1].softcap, 0.0)
    else:
        np.testing.assert_array_equal(by_student[1].kernel, 0.0)
    for leaf in jax.tree.leaves(by_teacher):
        np.testing.assert_array_equal(leaf, 0.0)


def test_bfloat16_and_masked_nan():
    options = Options(0.1, block=16)
    trained, frozen, tokens, weights = problem()
    trained, frozen = (jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree) for tree in (trained, frozen))
    kept = to64(trained), to64(frozen), np.asarray(tokens)
    mask = jnp.array([True, True, False, True, False, True])
    broken = [(jnp.where(mask[:, None], hidden, jnp.nan), head) for hidden, head in (trained, frozen)]
    out, by_student, _ = run("skewed_reverse_kl", options, *broken, tokens.at[2].set(-5), mask, weights)
    for actual, expected in zip(out, results64("skewed_reverse_kl", options, *kept)):
        np.testing.assert_allclose(actual, np.where(mask, expected, 0), atol=3e-6)
    masked = [np.where(mask, w, 0) for w in to64(weights)]
    expected = gradient64("skewed_reverse_kl", options, *kept, masked)
    assert by_student[0].dtype == by_student[1].kernel.dtype == jnp.bfloat16
    assert error(by_student[0], expected[0]) < 1e-2 and error(by_student[1].kernel, expected[1].kernel) < 1e-2
    np.testing.assert_array_equal(by_student[0][~mask], 0.0)
    zeros = run("skewed_reverse_kl", options, *broken, tokens, jnp.zeros(6, bool), weights)
    for leaf in jax.tree.leaves(zeros):
        np.testing.assert_array_equal(leaf.astype(jnp.float32), 0.0)


def test_a_float32_kernel_beside_bfloat16_states_is_multiplied_in_bfloat16():
    """The master's gradient is float32, and that of the rounded kernel before it is rounded itself."""
    (x, head), (y, other), *_ = problem(tokens=(9,), columns=(40, 40))
    x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    total = lambda x, head: linear_divergence(x, head, y, other, options=Options(block=16)).divergence.sum()
    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
    products = re.findall(r"dot_general .*: \((\S+), (\S+)\) -> (\S+)", gradient.lower(x, head).as_text())
    assert len(products) >= 6  # both models forward, and again backward, and the two gradients
    assert all(left.endswith("bf16>") and right.endswith("bf16>") for left, right, _ in products)
    by_hidden, by_head = gradient(x, head)
    assert by_hidden.dtype == jnp.bfloat16 and by_head.kernel.dtype == jnp.float32
    rounded = gradient(x, head._replace(kernel=head.kernel.astype(jnp.bfloat16)))[1].kernel
    np.testing.assert_array_equal(by_head.kernel.astype(jnp.bfloat16), rounded)


def test_equal_models_give_exactly_zero():
    model, *_ = problem(tokens=(9,), columns=(300, 300), scale=3.0)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def total(x, head):
        settings = {"reverse_kl": Options(block=64), "scaled_jsd": Options(0.3, block=64)}
        outs = [linear_divergence(x, head, x, head, kind, options=option) for kind, option in settings.items()]
        values = [value for out in outs for value in (out.divergence, out.reverse_kl, out.forward_kl)]
        return sum(value.sum() for value in values), values

    gradients, values = total(*model)
    for leaf in jax.tree.leaves((gradients, values)):
        np.testing.assert_array_equal(leaf, 0.0)


def test_columns_that_a_bias_excludes():
    options = Options(block=16)
    (x, student), (y, teacher), tokens, weights = problem(bias=True)
    weights = [jnp.abs(w) for w in weights]
    without = lambda head, *columns: head._replace(bias=head.bias.at[jnp.array(columns)].set(-jnp.inf))
    drop = lambda head: head._replace(
        **{k: np.delete(v, [3, 36], -1) for k, v in (head._asdict().items()) if v is not None}
    )
    ids = jnp.where(tokens == 3, 4, tokens)
    out, by_student, _ = run(
        "reverse_kl", options, (x, without(student, 3, 36)), (y, without(teacher, 3, 36)), ids, None, weights
    )
    fewer = (to64(x), to64(drop(student))), (to64(y), to64(drop(teacher))), np.where(ids > 3, ids - 1, ids)
    for actual, expected in zip(out, results64("reverse_kl", options, *fewer)):
        np.testing.assert_allclose(actual, expected, atol=3e-6)
    assert error(by_student[0], gradient64("reverse_kl", options, *fewer, to64(weights))[0]) < 1e-5
    np.testing.assert_array_equal(by_student[1].kernel[:, jnp.array([3, 36])], 0.0)

    finite_weights = [jnp.zeros(6), jnp.zeros(6), *weights[2:]]  # a weight on infinity is the caller's
    out, by_student, _ = run("reverse_kl", options, (x, student), (y, without(teacher, 3)), ids, None, weights)
    assert jnp.isposinf(out.reverse_kl).all() and jnp.isfinite(out.forward_kl).all()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(by_student))
    out, by_student, _ = run("reverse_kl", options, (x, without(student, 3)), (y, teacher), ids, None, finite_weights)
    assert jnp.isposinf(out.forward_kl).all() and jnp.isfinite(out.reverse_kl).all()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(by_student))


def test_a_token_outside_the_vocabulary():
    (x, student), (y, teacher), tokens, weights = problem(bias=True)
    out, by_student, _ = run(
        "reverse_kl", Options(block=16), (x, student), (y, teacher), tokens.at[0].set(50), None, weights
    )
    assert jnp.isneginf(out.student_logp[0]) and jnp.isneginf(out.teacher_logp[0])
    assert jnp.isfinite(out.student_logp[1:]).all() and jnp.isfinite(by_student[0]).all()


def test_records_one_by_one_under_vmap():
    """As per-record clipping takes them: `vmap` of the gradient, here of a record's masked total by a shared kernel."""
    (x, student), (y, teacher), *_ = problem(tokens=(3, 4))
    mask = jnp.arange(12).reshape(3, 4) % 4 < jnp.array([[4], [2], [0]])

    def total(kernel, x, y, mask):
        return linear_divergence(x, kernel, y, teacher, mask=mask, options=Options(block=16)).divergence.sum(-1)

    @jax.jit
    def both(kernel):
        records = jax.vmap(jax.grad(total), (None, 0, 0, 0))(kernel, x, y, mask)
        return records, jax.jacrev(total)(kernel, x, y, mask)

    records, batch = both(student.kernel)
    np.testing.assert_allclose(records, batch, atol=1e-6)
    np.testing.assert_array_equal(records[2], 0.0)
    assert (jnp.abs(records[:2]).max((1, 2)) > 0.01).all()


# ---- memory and work -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["reverse_kl", "generalized_jsd"])
def test_logits_are_never_held(kind):
    shape, vocabulary, width = (4, 64), 50_003, 8
    options = Options(0.5 if kind == "generalized_jsd" else None, train_head=False)

    def total(x, head, y, teacher_head):
        return linear_divergence(x, head, y, teacher_head, kind, options=options).divergence.sum()

    arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in 2 * ((*shape, width), (width, vocabulary))]
    compiled = jax.jit(jax.grad(total)).lower(*arrays).compile()
    one_model = 4 * shape[0] * shape[1] * vocabulary
    assert compiled.memory_analysis().temp_size_in_bytes < one_model / 4


def flops_of_products(jaxpr):
    """Multiplications and additions of all matrix products, those in loops as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = np.prod([equation.invars[0].aval.shape[i] for i in contracted])
            total += 2 * depth * equation.outvars[0].aval.size
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                total += flops_of_products(inner) * equation.params.get("length", 1)
    return total


@pytest.mark.parametrize("kind, passes", [("reverse_kl", 1), ("generalized_jsd", 2)])
def test_a_frozen_head_costs_nothing(kind, passes):
    trained, frozen, *_ = problem(tokens=(2, 3), widths=(5, 7), columns=(100, 100))
    parameter = 0.5 if kind == "generalized_jsd" else None

    def work(train_head):
        def total(trained, frozen):
            options = Options(parameter, train_head=train_head, block=16)
            return linear_divergence(*trained, *frozen, kind, options=options).divergence.sum()

        return flops_of_products(jax.make_jaxpr(jax.grad(total))(trained, frozen).jaxpr)

    one = 2 * 6 * 100  # per unit of width
    assert work(False) == one * ((passes + 1) * (5 + 7) + 5)
    assert work(True) == work(False) + one * 5


# ---- meshes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_mesh_left_behind():
    before = jax.sharding.get_mesh()
    yield
    jax.set_mesh(before)


def test_eight_devices_equal_one(no_mesh_left_behind):
    """Heads split by columns, tokens by records; padded vocabularies that differ, so that a device's columns would."""
    trained, frozen, tokens, weights = problem(tokens=(4, 3), columns=(40, 48), bias=True, softcap=(5.0, None))
    mask = jnp.arange(12).reshape(4, 3) % 5 > 0
    options = Options(0.3, vocab_size=37, block=4)
    alone = run("generalized_jsd", options, trained, frozen, tokens, mask, weights)

    mesh = sharding.make_mesh({"data": 2, "tensor": 4})
    place = lambda tree, *spec: jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))
    by_column = lambda head: Head(place(head.kernel, None, "tensor"), place(head.bias, "tensor"), head.softcap)
    models = [(place(hidden, "data"), by_column(head)) for hidden, head in (trained, frozen)]
    rest = place((tokens, mask, weights), "data")
    split = run("generalized_jsd", options._replace(axis="tensor"), *models, *rest)
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=3e-6)
    jax.tree.map(compare, split, alone)
    refused, own = pytest.raises(ValueError, match="norms of a head split over 'tensor'"), Options(axis="tensor")
    with refused, record_norms(jnp.float32(0), "n"):
        jax.eval_shape(lambda: linear_divergence(*models[0], *models[1], options=own))
    odd = [(hidden, head._replace(kernel=head.kernel[:, :39], bias=head.bias[:39])) for hidden, head in models]
    jax.tree.map(compare, run("generalized_jsd", options._replace(axis="tensor"), *odd, *rest)[0], alone[0])
    assert split[1][1].kernel.sharding.spec == PartitionSpec(None, "tensor")

    data = [(place(hidden, "data"), place(head)) for hidden, head in (trained, frozen)]
    jax.tree.map(compare, run("generalized_jsd", options, *data, *rest), alone)


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes_are_named():
    (x, student), (y, teacher), *_ = problem(columns=(37, 40))
    call = lambda kind="reverse_kl", **options: linear_divergence(
        x, student, y, teacher, kind, options=Options(**options)
    )
    for attempt, message in [
        (lambda: call("adaptive_kl"), "'adaptive_kl' does not come from hidden states; choose one of reverse_kl"),
        (lambda: call("generalized_jsd"), "generalized_jsd with parameter=None: give beta"),
        (lambda: call(vocab_size=38), "vocab_size=38 but the heads have 37 and 40 columns"),
    ]:
        with pytest.raises(ValueError, match=message):
            attempt()
