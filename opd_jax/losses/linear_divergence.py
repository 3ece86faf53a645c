# SPDX-License-Identifier: Apache-2.0
"""Exact divergences straight from hidden states: the logits `[tokens, V]` of neither model ever exist.

The vocabulary is read in blocks of columns. One pass keeps, per token and model, a running maximum and four sums of
`exp(z - max)`, which give both KLs, both entropies and the sampled token's log-probabilities; a divergence of a mixture
needs the normalised probabilities and so a second pass. The backward pass (a `custom_vjp`) makes each block's logits
again from what the forward pass saved, three to five numbers per token, and adds up

    d loss / d z_s = sum of (upstream cotangent) * (slope - p_s sum(slope))       `divergences.pointwise` has the slopes

for all outputs at once: any of them may be differentiated, weighted by token, in any mixture. Cost in multiples of one
product of hidden states and head, `2 tokens D V` FLOPs for each model: forward 1 (2 with the second pass), backward 1
for both models, and for the student 1 more for the hidden states and 1 for a trained head.

Only columns are cut, never tokens. So tokens may have any leading shape and sharding (packed, data or context
parallel): nothing is reshaped and nothing gathered.
"""

import contextlib
import contextvars
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from opd_jax.losses.divergences import F_DIVERGENCES, pointwise, times

BLOCK_ELEMENTS = 2**24  # tokens times columns of a default block: 64 MiB in float32, of which some six are live
PerToken = Float[Array, "*tokens"]
Hidden = Float[Array, "*tokens D"]


class Head(NamedTuple):
    """`logits = softcap tanh((hidden @ kernel + bias) / softcap)`; no gradient to the soft-cap."""

    kernel: Float[Array, "D V"]
    bias: Float[Array, "V"] | None = None
    softcap: Float[Array, ""] | float | None = None


class Options(NamedTuple):
    """Static settings.

    parameter: beta or alpha of the divergence, see `divergences`.
    temperature: divides the logits of both models, after their soft-cap.
    train_head: False for a frozen head (or one under LoRA): its gradient is zero and costs nothing, `2 tokens D V`
        FLOPs and a `[D, V]` accumulator less.
    vocab_size: the tokenizer's; columns from there on are padding and do not exist. Default: the smaller head's.
    block: columns at a time. Default: as many as make `BLOCK_ELEMENTS` with the tokens (all of the global batch), in
        multiples of 128, but at least 1024 for the sake of the matrix unit and at most 1/32 of the vocabulary.
    precision: of all matrix products, as in `jax.numpy.dot`; on TPU float32 inputs need "highest" to be that exact.
    axis: the mesh axis over which both kernels are split by columns (vocabulary-parallel). Whole ones, as with None,
        where the current mesh has no such axis or the columns do not divide.
    """

    parameter: float | int | None = None
    temperature: float | int = 1.0
    train_head: bool = True
    vocab_size: int | None = None
    block: int | None = None
    precision: Any = None
    axis: str | None = None


class LinearDivergence(NamedTuple):
    """Per token, float32, in nats; gradients reach the student through every field but the teacher's own two."""

    divergence: PerToken  # the one asked for
    reverse_kl: PerToken
    forward_kl: PerToken
    student_entropy: PerToken
    teacher_entropy: PerToken
    student_logp: PerToken | None  # of `tokens`
    teacher_logp: PerToken | None


def linear_divergence(
    student_hidden: Float[Array, "*tokens D"],
    student_head: Head | Float[Array, "D V"],
    teacher_hidden: Float[Array, "*tokens E"],
    teacher_head: Head | Float[Array, "E W"],
    divergence: str = "reverse_kl",
    tokens: Int[Array, "*tokens"] | None = None,
    mask: Bool[Array, "*tokens"] | None = None,
    options: Options = Options(),  # noqa: B008  a tuple
) -> LinearDivergence:
    """The divergence of student and teacher, exact over the vocabulary, per token and in nats, from hidden states.

    Equals `divergences` on `hidden @ kernel`. Relative error (2-norm) of the gradients by hidden states and by kernel
    against float64, on CPU, 128 tokens, widths 256 and 384, 8003 columns:

    | | reverse_kl, float32 | generalized_jsd, float32 | either, bfloat16 |
    | --- | --- | --- | --- |
    | logits of standard deviation 1 | 5e-7, 1.0e-6 | 3e-7, 8e-7 | 1.8e-3, 2.3e-3 |
    | 3 | 2.4e-6, 2.4e-6 | 3.1e-6, 2.9e-6 | 2.4e-3, 2.4e-3 |

    In float32 that is the rounding of the logits: NumPy's float32 products with all else in float64 give, for
    `reverse_kl`, 4e-7 and 9e-7 at 1, and 2.2e-6 at 3. In bfloat16 the products' factors, `d loss / d z` among them,
    are rounded, never a sum. Values of the two KLs carry an absolute error of about 1e-6 nats and may fall below 0 by
    that; equal hidden states and heads give exactly 0, gradient included.

    Args:
        student_hidden, teacher_hidden: after the final norm, any float type; widths may differ. Gradient to the
            student's only. Products of one model are taken in the type of its hidden states, as its own are, and
            accumulated in float32: a float32 kernel beside bfloat16 states is rounded, its gradient's sum is not.
        student_head, teacher_head: kernel `[D, V]`, or a `Head`. Gradient to the student's, if `options.train_head`.
            The padded vocabularies may differ.
        divergence: one of `divergences.F_DIVERGENCES`.
        tokens: sampled tokens, for their log-probabilities under both models (at `options.temperature`).
        mask: True counts. Elsewhere every result is 0 and nothing, NaN included, reaches a value or a gradient.
        options: static.

    Returns:
        a `LinearDivergence` of arrays shaped like the tokens, not reduced: `jnp.where(response, out.divergence,
        0).sum(-1)` is a per-record total.

        | case | result |
        | --- | --- |
        | a token id outside the vocabulary | its log-probability is -inf |
        | a bias of -inf in both heads | as if the column did not exist |
        | a bias of -inf in one | +inf where `divergences` says so; gradients finite |

    Raises:
        ValueError: unknown divergence or parameter, shapes that do not fit, a vocabulary larger than a head.
    """
    if divergence not in F_DIVERGENCES:
        raise ValueError(f"{divergence!r} does not come from hidden states; choose one of {', '.join(F_DIVERGENCES)}")
    heads = [head if isinstance(head, Head) else Head(head) for head in (student_head, teacher_head)]
    hidden = [student_hidden, jax.lax.stop_gradient(teacher_hidden)]
    static, heads = _resolve(divergence, options, heads, student_hidden.shape)
    if mask is not None:
        hidden = [jnp.where(mask[..., None], h, 0) for h in hidden]
    ids = jnp.full(student_hidden.shape[:-1], -1) if tokens is None else tokens
    square, name = _SQUARE.get() if options.train_head else (None, "")
    if square is not None and static.options.axis is not None:
        raise ValueError(f"norms of a head split over {options.axis!r} are not made; give a whole one")
    out = _fused(static, hidden[0], heads[0], hidden[1], jax.lax.stop_gradient(heads[1]), ids, square)
    if square is not None:
        out = out._replace(reverse_kl=checkpoint_name(out.reverse_kl, name))
    chosen = getattr(out, divergence) if divergence in ("reverse_kl", "forward_kl") else out.divergence
    out = out._replace(divergence=chosen)
    if mask is not None:
        out = jax.tree.map(lambda a: jnp.where(mask, a, 0.0), out)
    return out if tokens is not None else out._replace(student_logp=None, teacher_logp=None)


_SQUARE = contextvars.ContextVar("square", default=(None, ""))


@contextlib.contextmanager
def record_norms(square: Float[Array, ""], name: str):
    """Within it, the derivative by `square` of a loss is the squared norm of its gradient by a trained head.

    That gradient is made in blocks of columns and is never whole: a derivative by the head itself is 0 here. `name`
    marks a result, as by `jax.ad_checkpoint.checkpoint_name`. For heads that are not split over a mesh axis.
    """
    token = _SQUARE.set((square, name))
    try:
        yield
    finally:
        _SQUARE.reset(token)


# ---- shapes ----------------------------------------------------------------------------------------------------------


class _Static(NamedTuple):
    """Hashable, the first argument of the `custom_vjp`; `options` with `vocab_size` and `block` filled in."""

    kind: str
    options: Options
    width: int  # columns of either kernel that a device reads


def _resolve(kind: str, options: Options, heads: list[Head], shape: tuple[int, ...]) -> tuple[_Static, list[Head]]:
    """Fills in the defaults. Kernels split over a mesh axis are cut alike, so that columns of a device agree."""
    pointwise(kind, options.parameter, *jnp.zeros((2, 1)))  # raises where the parameter does not fit
    widths = [head.kernel.shape[1] for head in heads]
    vocabulary = options.vocab_size or min(widths)
    if vocabulary > min(widths):
        raise ValueError(f"vocab_size={vocabulary} but the heads have {widths[0]} and {widths[1]} columns")
    width, parts = vocabulary, jax.sharding.get_abstract_mesh().shape.get(options.axis, 1)
    if parts == 1 or any(w % parts for w in widths):
        options = options._replace(axis=None)
    elif widths[0] == widths[1]:
        width = widths[0] // parts  # nothing moves; what is padding is masked
    else:
        width = -(-vocabulary // parts)
        heads = [_cut(head, width * parts) for head in heads]
    fitting = max(BLOCK_ELEMENTS // max(1, math.prod(shape[:-1])), 1024)
    block = options.block or max(128, min(fitting, width // 32) // 128 * 128)
    return _Static(kind, options._replace(vocab_size=vocabulary, block=block), width), heads


def _cut(head: Head, width: int) -> Head:
    if head.kernel.shape[1] == width:
        return head
    return head._replace(kernel=head.kernel[:, :width], bias=None if head.bias is None else head.bias[:width])


def _on_shards(static: _Static, kernel, heads: tuple[Head, Head], arrays: tuple, out_specs):
    """`kernel(heads, *arrays)`, where an axis is given on every device's own columns.

    Only this runs within `shard_map`, and nothing is differentiated through it. The other mesh axes stay automatic,
    which needs `jit`.
    """
    axis = static.options.axis
    if axis is None:
        return kernel(heads, *arrays)
    specs = tuple(_head_spec(head, axis) for head in heads)
    in_specs = (specs, *(jax.tree.map(lambda _: PartitionSpec(), array) for array in arrays))
    mapped = jax.shard_map(kernel, in_specs=in_specs, out_specs=out_specs, axis_names={axis}, check_vma=False)
    return jax.jit(mapped)(heads, *arrays)


def _head_spec(head: Head, axis: str) -> Head:
    specs = Head(PartitionSpec(None, axis), PartitionSpec(axis), PartitionSpec())
    return Head(*(None if array is None else spec for array, spec in zip(head, specs)))


# ---- blocks ----------------------------------------------------------------------------------------------------------


class _Block(NamedTuple):
    """One model's logits of a block of columns, at the temperature; `slope` is `dz / d (hidden @ kernel)`."""

    z: Float[Array, "*tokens C"]
    slope: Float[Array, "*tokens C"] | float
    hidden: Hidden
    kernel: Float[Array, "D C"]


def _over_blocks(static: _Static, body, carry):
    """`carry = body(carry, start, size)` over all columns: a scan over whole blocks, then what is left of them."""
    size = static.options.block
    count, rest = divmod(static.width, size)
    if count:
        starts = size * jnp.arange(count)
        carry, _ = jax.lax.scan(lambda carry, start: (body(carry, start, size), None), carry, starts)
    return body(carry, jnp.asarray(count * size), rest) if rest else carry


def _block(static: _Static, hidden: Hidden, head: Head, start: Int[Array, ""], size: int) -> _Block:
    options = static.options
    kernel = jax.lax.dynamic_slice_in_dim(head.kernel, start, size, axis=1).astype(hidden.dtype)
    z = jnp.einsum("...d,dv->...v", hidden, kernel, precision=options.precision, preferred_element_type=jnp.float32)
    if head.bias is not None:
        bias = jax.lax.dynamic_slice_in_dim(head.bias, start, size).astype(jnp.float32)
        z = z + jnp.broadcast_to(bias, z.shape)
    slope = 1 / options.temperature
    if head.softcap is not None:
        tanh = jnp.tanh(z / head.softcap)
        z, slope = head.softcap * tanh, (1 - tanh**2) / options.temperature
    exists = jnp.broadcast_to(_columns(static, start, size) < options.vocab_size, z.shape)
    return _Block(jnp.where(exists, z / options.temperature, -jnp.inf), slope, hidden, kernel)


def _columns(static: _Static, start: Int[Array, ""], size: int) -> Int[Array, "C"]:
    """The token ids of a block."""
    first = 0 if static.options.axis is None else jax.lax.axis_index(static.options.axis) * static.width
    return first + start + jnp.arange(size)


def _is_token(static: _Static, ids: Int[Array, "*tokens"], start: Int[Array, ""], size: int):
    columns = _columns(static, start, size)
    return jnp.broadcast_to(ids[..., None], (*ids.shape, size)) == jnp.broadcast_to(columns, (*ids.shape, size))


# ---- forward ---------------------------------------------------------------------------------------------------------


class _Sums(NamedTuple):
    """One model's running sums over columns, with `e = exp(z - top)`."""

    top: PerToken  # the largest logit so far
    mass: PerToken  # sum e
    own: PerToken  # sum e (z - top)
    cross: PerToken  # sum e (z - z of the other model)
    token: PerToken  # logit of the sampled token; -inf until seen


class _Saved(NamedTuple):
    """What the backward pass needs: `log p = (z - top) - log_mass`, and sums of slopes."""

    student: tuple[PerToken, PerToken]  # top, log_mass
    teacher: tuple[PerToken, PerToken]
    reverse_kl: PerToken
    student_entropy: PerToken
    slope: PerToken | None  # of the divergence of a mixture


def _forward(static: _Static, heads, hidden, ids) -> tuple[LinearDivergence, _Saved]:
    axis, shape = static.options.axis, ids.shape

    def add(carry, start, size):
        z = [_block(static, h, head, start, size).z for h, head in zip(hidden, heads)]
        here = _is_token(static, ids, start, size)
        return _add(carry[0], z[0], z[1], here), _add(carry[1], z[1], z[0], here)

    zero = jnp.zeros(shape, jnp.float32)
    empty = _Sums(zero - 1e30, zero, zero, zero, zero - jnp.inf)
    s, t = _over_blocks(static, add, (empty, empty))
    if axis is not None:
        s, t = _merge(s, axis), _merge(t, axis)
    student, teacher = (s.top, jnp.log(s.mass)), (t.top, jnp.log(t.mass))
    log_ratio = (s.top - t.top) + (student[1] - teacher[1])  # of the two sums of exp(z)
    reverse_kl, forward_kl = s.cross / s.mass - log_ratio, t.cross / t.mass + log_ratio
    entropies = student[1] - s.own / s.mass, teacher[1] - t.own / t.mass
    logp = (s.token - s.top) - student[1], (t.token - t.top) - teacher[1]
    value = slope = None
    if static.kind not in ("reverse_kl", "forward_kl"):

        def second(carry, start, size):
            logps = _log_probs(static, heads, hidden, (student, teacher), start, size)[0]
            term, slope = pointwise(static.kind, static.options.parameter, *logps)
            return carry[0] + jnp.maximum(term, 0.0).sum(-1), carry[1] + slope.sum(-1)

        value, slope = _over_blocks(static, second, (zero, zero))
        value, slope = (value, slope) if axis is None else jax.lax.psum((value, slope), axis)
    out = LinearDivergence(value, reverse_kl, forward_kl, *entropies, *logp)
    return out, _Saved(student, teacher, reverse_kl, entropies[0], slope)


def _add(sums: _Sums, z, other, here) -> _Sums:
    sums = _rescale(sums, jnp.maximum(sums.top, z.max(-1)))
    above = z - sums.top[..., None]
    e = jnp.exp(above)
    return _Sums(
        sums.top,
        sums.mass + e.sum(-1),
        sums.own + times(e, above).sum(-1),
        sums.cross + times(e, z - other).sum(-1),
        jnp.maximum(sums.token, jnp.where(here, z, -jnp.inf).max(-1)),
    )


def _rescale(sums: _Sums, top: PerToken) -> _Sums:
    """The same sums, relative to a larger maximum."""
    shift = sums.top - top
    factor = jnp.exp(shift)
    own = times(factor, sums.own + shift * sums.mass)
    return sums._replace(top=top, mass=factor * sums.mass, own=own, cross=times(factor, sums.cross))


def _merge(sums: _Sums, axis: str) -> _Sums:
    """The sums of all devices: a handful of numbers per token are all that vocabulary-parallel devices exchange."""
    sums = _rescale(sums, jax.lax.pmax(sums.top, axis))
    mass, own, cross = jax.lax.psum((sums.mass, sums.own, sums.cross), axis)
    return _Sums(sums.top, mass, own, cross, jax.lax.pmax(sums.token, axis))


def _log_probs(static: _Static, heads, hidden, normalizers, start, size):
    """The log-probabilities of a block, of both models, and the student's block itself."""
    blocks = [_block(static, h, head, start, size) for h, head in zip(hidden, heads)]
    logps = [(b.z - top[..., None]) - log_mass[..., None] for b, (top, log_mass) in zip(blocks, normalizers)]
    return logps, blocks[0]


# ---- backward --------------------------------------------------------------------------------------------------------


def _backward(static: _Static, norms: bool, heads, hidden, ids, saved: _Saved, g: LinearDivergence):
    """Cotangents of the student's hidden states, of its kernel and bias if they are trained, and their squared norm."""
    options, head = static.options, heads[0]
    product = functools.partial(jnp.einsum, precision=options.precision, preferred_element_type=jnp.float32)

    def add(carry, start, size):
        by_hidden, by_kernel, by_bias, square = carry
        logps, block = _log_probs(static, heads, hidden, (saved.student, saved.teacher), start, size)
        dz = _by_logits(static, logps, _is_token(static, ids, start, size), saved, g) * block.slope
        low = dz.astype(block.kernel.dtype)  # bfloat16 products need both factors in it
        by_hidden = by_hidden + product("...v,dv->...d", low, block.kernel)
        put = lambda whole, part, axis: jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis)
        kernel_part = lambda: product("...d,...v->dv", block.hidden, low)
        bias_part = lambda: dz.sum(tuple(range(ids.ndim)))
        if by_kernel is not None:
            by_kernel = put(by_kernel, kernel_part(), 1)
        if by_bias is not None:
            by_bias = put(by_bias, bias_part(), 0)
        if square is not None:
            square += jnp.square(kernel_part()).sum()
            square += 0.0 if head.bias is None else jnp.square(bias_part()).sum()
        return by_hidden, by_kernel, by_bias, square

    zeros = lambda array: None if array is None else jnp.zeros(array.shape, jnp.float32)
    trained = (zeros(head.kernel), zeros(head.bias)) if options.train_head and not norms else (None, None)
    square = jnp.float32(0) if norms else None
    by_hidden, by_kernel, by_bias, square = _over_blocks(static, add, (zeros(hidden[0]), *trained, square))
    if options.axis is not None:
        by_hidden = jax.lax.psum(by_hidden, options.axis)
    cast = lambda array, like: None if array is None else array.astype(like.dtype)
    return cast(by_hidden, hidden[0]), cast(by_kernel, head.kernel), cast(by_bias, head.bias), square


def _by_logits(static: _Static, logps, here, saved: _Saved, g: LinearDivergence) -> Float[Array, "*tokens C"]:
    """Derivative by a block of the student's logits: every output's, times its cotangent."""
    finite = lambda a: jnp.where(jnp.isfinite(a), a, 0.0)[..., None]
    student_logp = logps[0]
    p_s = jnp.exp(student_logp)
    _, reverse = pointwise("reverse_kl", None, *logps)
    _, forward = pointwise("forward_kl", None, *logps)
    dz = g.reverse_kl[..., None] * (reverse - p_s * finite(saved.reverse_kl)) + g.forward_kl[..., None] * forward
    dz = dz - g.student_entropy[..., None] * times(p_s, student_logp + saved.student_entropy[..., None])
    dz = dz + g.student_logp[..., None] * (here - p_s)
    if saved.slope is None:
        return dz
    _, slope = pointwise(static.kind, static.options.parameter, *logps)
    return dz + g.divergence[..., None] * (slope - p_s * saved.slope[..., None])


# ---- the two together ------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(
    static: _Static, student_hidden, student_head, teacher_hidden, teacher_head, ids, square=None
) -> LinearDivergence:
    return _fused_forward(static, student_hidden, student_head, teacher_hidden, teacher_head, ids, square)[0]


def _fused_forward(static: _Static, student_hidden, student_head, teacher_hidden, teacher_head, ids, square):
    heads, hidden = (student_head, teacher_head), (student_hidden, teacher_hidden)
    out, saved = _on_shards(static, functools.partial(_forward, static), heads, (hidden, ids), PartitionSpec())
    return out, (heads, hidden, ids, saved, square)


def _fused_backward(static: _Static, residuals, cotangents: LinearDivergence):
    heads, hidden, ids, saved, square = residuals
    kernel, axis = functools.partial(_backward, static, square is not None), static.options.axis
    trained = static.options.train_head and square is None
    out_specs = (
        PartitionSpec(),
        PartitionSpec(None, axis) if trained else None,
        PartitionSpec(axis) if trained and heads[0].bias is not None else None,
        None,
    )
    inputs = hidden, ids, saved, cotangents
    by_hidden, by_kernel, by_bias, by_square = _on_shards(static, kernel, heads, inputs, out_specs)
    by_head = Head(by_kernel, by_bias, None) if trained else None
    return by_hidden, by_head, None, None, None, by_square


_fused.defvjp(_fused_forward, _fused_backward)
