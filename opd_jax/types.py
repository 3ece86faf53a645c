"""The vocabulary of the library: what the loop passes from one of its four functions to the next.

Every container is a `typing.NamedTuple`, so it is a pytree without registration. Axes: `B` records, `T` flow steps,
`H W C` an image, `L E` a context sequence, `P` a pooled context vector, `D` everything of one state flattened.
Flow time runs from `t = 1` (noise) to `t = 0` (data) and velocity = noise - data, everywhere.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, Key

PyTree = Any
Metrics = dict[str, Array]

VelocityFn = Callable[[PyTree, Float[Array, "B H W C"], Float[Array, "B"], PyTree], Float[Array, "B H W C"]]
"""`velocity_fn(params, x, t, condition) -> velocity`. A `jax.tree_util.Partial` where it carries frozen weights, so
that they enter a jitted function as arguments and not as constants."""


def as_partial(function: Callable) -> Partial:
    """The function as a pytree, so that it can be bound to another `Partial` and its arrays enter jit as arguments."""
    return function if isinstance(function, Partial) else Partial(function)


class Condition(NamedTuple):
    """What a flow model is conditioned on: the encoded prompt."""

    context: Float[Array, "B L E"]
    pooled: Float[Array, "B P"]


class FlowRollout(NamedTuple):
    """The student's own path from noise to image, every visited state kept; nothing here carries a gradient.

    Every leaf begins with the record axis, the schedule too, so that records can be sharded, split into micro-batches
    and mapped over without a special case; but all records of a batch share one schedule, and losses read the first's.
    """

    condition: PyTree  # leaves [B, ...]: whatever velocity_fn takes, such as the prompt's token ids or a Condition
    task: Int[Array, "B"]  # index of the prompt's task, which routes it to its teacher
    group: Int[Array, "B"]  # index of the prompt a record was sampled for; G records share one
    states: Float[Array, "B T+1 H W C"]  # states[:, 0] is noise, states[:, -1] the image
    noise: Float[Array, "B T H W C"]  # standard normal draws: states[:, i + 1] = mean_i + std_i * noise[:, i]
    times: Float[Array, "B T+1"]  # decreasing from 1 to 0
    levels: Float[Array, "B T"]  # noise level of each transition; 0 is a deterministic step
    logp: Float[Array, "B T"]  # behaviour log-density in nats, mean over the D elements; 0 where the step is an ODE's
    logp_sum: Float[Array, "B T"]  # the same, summed over the D elements


class FlowLabels(NamedTuple):
    """What the teachers say about a rollout, at every visited state but the last; no gradient."""

    teacher_velocity: Float[Array, "B T H W C"]
    anchor_velocity: Float[Array, "B T H W C"] | None = None


class TokenRollout(NamedTuple):
    """The student's own completions; nothing here carries a gradient. `S` is prompt and response, right-padded."""

    tokens: Int[Array, "B S"]  # prompt, then response
    response: Bool[Array, "B S"]  # True where the token at s was sampled (it is predicted at s - 1); the end token too
    length: Int[Array, "B"]  # prompt and response tokens
    group: Int[Array, "B"]  # index of the prompt a record was sampled for; G records share one
    task: Int[Array, "B"]  # index of the prompt's task, which routes it to its teacher
    behavior_logp: Float[Array, "B S"]  # of the unmodified (T = 1) policy that sampled, in nats; 0 where not `response`
    sampling_logp: Float[Array, "B S"]  # of the distribution drawn from (temperature, top-k); 0 where not `response`
    truncated: Bool[Array, "B"]  # no end token before the limit


class ActionTokens(NamedTuple):
    """Chunks of actions as bins, one token for each of A dimensions of H steps; leaves begin `[B, T]` in a rollout."""

    tokens: Int[Array, "*n H A"]
    behavior_logp: Float[Array, "*n H A"]  # of the policy that acted, at its temperature, in nats


class ActionPaths(NamedTuple):
    """Chunks of actions with the path from noise that drew them; all of a rollout share times and levels."""

    states: Float[Array, "*n F+1 H A"]  # the last is the chunk
    times: Float[Array, "*n F+1"]  # decreasing from 1 to 0
    levels: Float[Array, "*n F"]  # noise level of each transition


class EpisodeRollout(NamedTuple):
    """The student's own episodes in an environment: T decisions, each of a chunk of H actions; no gradient."""

    observation: PyTree  # leaves [B, T, ...]: what the policy saw at each decision
    drawn: PyTree  # ActionTokens or ActionPaths, leaves [B, T, ...]
    counted: Bool[Array, "B T H"]  # True where the action was executed, the episode not over
    success: Float[Array, "B"]  # 1 where the task was done before the horizon
    length: Int[Array, "B"]  # actions executed
    group: Int[Array, "B"]  # index of the initial state; G episodes share one
    task: Int[Array, "B"]
    states: PyTree = None  # leaves [B, T, ...], of the environment at each decision: what a scripted expert labels
    redone: Int[Array, "B 2"] | None = None  # how often begun again: it failed; another of its process failed
    played: dict[str, Float[Array, "B"]] | None = None  # what it has cost, those that gave way to it included


class ActionLabels(NamedTuple):
    """A teacher's distribution over bins, at every decision of the student; no gradient."""

    logits: Float[Array, "B T H A K"]


class PathLabels(NamedTuple):
    """A teacher's velocity at every state of the paths that drew the student's chunks; no gradient."""

    velocity: Float[Array, "B T F H A"]


class Weighted(NamedTuple):
    """A loss before any average: per record, a sum of per-step terms and how much it counts. `dense` divides, once."""

    total: Float[Array, "B"]
    weight: Float[Array, "B"]
    metrics: dict[str, Float[Array, "B"]] = {}  # noqa: RUF012  per record; reported as means over records
    spread: dict[str, Float[Array, "B T"]] = {}  # noqa: RUF012  per step, NaN where not counted; reported as quantiles


class TrainState(NamedTuple):
    """All that an update changes, and so all that a checkpoint must hold beside the data position."""

    step: Int[Array, ""]
    params: PyTree  # the trained parameters only; a frozen backbone travels with the velocity function
    opt_state: PyTree
    ema: PyTree  # exponential moving average of params, evaluated and sampled from


Supervise = Callable[[PyTree, PyTree, PyTree, Key[Array, ""]], Weighted]
"""`supervise(student_params, rollout, labels, key) -> Weighted`: the paper."""


class Method(NamedTuple):
    """A paper, as the loop sees it."""

    sample: Callable[[PyTree, PyTree, jax.Array], PyTree]  # (student_params, batch, key) -> rollout
    label: Callable[[PyTree, PyTree], PyTree]  # (teacher_params, rollout) -> labels
    update: Callable[[TrainState, PyTree, PyTree, jax.Array], tuple[TrainState, Metrics]]
