"""Continuous actions as tokens, as OpenVLA has them (Kim et al., arXiv 2406.09246, section 3.2).

First each dimension is stretched so that the 1st and 99th percentile of a data set lie at -1 and 1; what is beyond is
clipped. Then [-1, 1] is cut into 255 bins by 256 equally spaced edges:

    bin k = [edge_k, edge_{k+1}),   edge_k = -1 + 2 k / 255,   k = 0..254;   k = 255 is 1 itself
    centre_k = (edge_k + edge_{k+1}) / 2;   bin 255 is decoded to centre_254

OpenVLA counts from 1, d = k + 1 (`numpy.digitize`), and gives bin d the token id `used_vocab_size - d`.

The percentiles say what a token means: two policies on the same tokens with different percentiles act differently, and
a divergence between them looks valid. `check_same` is for that.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

NUM_BINS = 256  # K
EDGES = np.linspace(-1, 1, NUM_BINS)
CENTRES = (EDGES[:-1] + EDGES[1:]) / 2
SMALLEST_RANGE = 1e-8  # added to the range of a dimension, as OpenVLA-OFT does: one that never moves gives -1


class Statistics(NamedTuple):
    """What actions of a data set are normalised by."""

    q01: Float[np.ndarray, "A"]  # 1st percentile
    q99: Float[np.ndarray, "A"]
    mask: Bool[np.ndarray, "A"]  # False where actions stay as they are: a gripper, -1 or 1 already


def statistics(demonstrations: Sequence[Float[np.ndarray, "_ A"]], mask: Sequence[bool]) -> Statistics:
    """The percentiles over all steps of all demonstrations; `mask` is False for dimensions that stay as they are.

    Raises:
      ValueError: where there is no step, a value is not finite, or the mask has another number of dimensions.
    """
    steps = np.concatenate([np.asarray(actions, np.float64) for actions in demonstrations] or [np.zeros((0, 0))])
    if not len(steps):
        raise ValueError("statistics of no actions; give at least one demonstration of one step")
    if len(mask) != steps.shape[1]:
        raise ValueError(f"mask has {len(mask)} dimensions, the actions {steps.shape[1]}; give one value for each")
    if not np.isfinite(steps).all():
        raise ValueError(f"{np.sum(~np.isfinite(steps))} values of the actions are not finite; remove those steps")
    q01, q99 = np.quantile(steps, [0.01, 0.99], axis=0)
    return Statistics(q01, q99, np.asarray(mask, bool))


def normalize(actions: Float[Array, "*n A"], statistics: Statistics) -> Float[Array, "*n A"]:
    """`2 (a - q01) / (q99 - q01) - 1`, clipped to [-1, 1]; where the mask is False, the action itself, not clipped."""
    low, width, mask = _ranges(statistics, actions.ndim)
    return jnp.where(mask, jnp.clip(2 * (actions - low) / width - 1, -1, 1), actions)


def unnormalize(actions: Float[Array, "*n A"], statistics: Statistics) -> Float[Array, "*n A"]:
    """The inverse of `normalize`, but for what it clipped: actions as the robot takes them."""
    low, width, mask = _ranges(statistics, actions.ndim)
    return jnp.where(mask, (actions + 1) / 2 * width + low, actions)


def _ranges(statistics: Statistics, rank: int) -> list[Array]:
    """Lower end, width and mask of every dimension, of the rank of the actions."""
    values = statistics.q01, statistics.q99 - statistics.q01 + SMALLEST_RANGE, statistics.mask
    dtypes = jnp.float32, jnp.float32, bool
    return [jnp.asarray(value, dtype).reshape(*[1] * (rank - 1), -1) for value, dtype in zip(values, dtypes)]


def encode(actions: Float[Array, "*n"]) -> Int[Array, "*n"]:
    """Bins, 0 to 255, of normalised actions; no gradient.

    | action | bin |
    | --- | --- |
    | below -1, above 1 | 0, 255 |
    | exactly an edge | the bin above it, where float32 has the edge so |
    | NaN | -1: none |
    """
    edges = jnp.asarray(EDGES, jnp.float32).reshape(*[1] * actions.ndim, -1)
    bins = jnp.sum(jnp.clip(actions, -1, 1)[..., None] >= edges, axis=-1, dtype=jnp.int32) - 1
    return bins


def decode(bins: Int[Array, "*n"]) -> Float[Array, "*n"]:
    """Centres of bins, float32; of those below 0 or above 254 the first and the last centre, as OpenVLA clips them.

    `decode(encode(a))` is within half a bin, 1/255, of any `a` in [-1, 1].
    """
    return jnp.asarray(CENTRES, jnp.float32)[jnp.clip(bins, 0, len(CENTRES) - 1)]


def expert_logits(actions: Float[Array, "*n A"], sigma: float | int, floor: float | int = 0) -> Float[Array, "*n A K"]:
    """`-(centre_k - a)^2 / (2 sigma^2)`: an expert's normalised action as a distribution over bins, unnormalised.

    The softmax is a discrete Gaussian about the action, clipped to [-1, 1], of standard deviation `sigma`. Here bin 255
    has the centre that follows centre_254, not that centre again, which would count the last bin twice. The best bin is
    that of the action, or for 1 itself the last two are equally good.

    Args:
      floor: share of the distribution that is spread evenly over all bins, below 1. Without it the far end costs
        `(2 / sigma)^2 / 2` nats, 200 at sigma 0.1, and a reverse KL is about wrong commands of a gripper and little
        else; with 0.01 nothing costs more than `log(K / 0.01)`, 10 nats.

    Raises:
      ValueError: where sigma is not positive, or floor is no such share.
    """
    if sigma <= 0:
        raise ValueError(f"sigma={sigma}; give a positive one, such as 0.02")
    if not 0 <= floor < 1:
        raise ValueError(f"floor={floor}; give a share below 1, such as 0.01")
    centres = jnp.asarray(EDGES + 1 / (NUM_BINS - 1), jnp.float32).reshape(*[1] * actions.ndim, -1)
    distance = centres - jnp.clip(actions.astype(jnp.float32), -1, 1)[..., None]
    logits = -jnp.square(distance) / (2 * sigma**2)
    if not floor:
        return logits
    return jnp.logaddexp(jax.nn.log_softmax(logits) + np.log1p(-floor), np.log(floor / NUM_BINS))


def to_json(statistics: Mapping[str, Statistics]) -> str:
    """The text of OpenVLA's `dataset_statistics.json`, by name of the data set (`unnorm_key`)."""
    as_lists = lambda one: {name: value.tolist() for name, value in one._asdict().items()}
    return json.dumps({key: {"action": as_lists(one)} for key, one in statistics.items()}, indent=2)


def from_json(text: str, key: str) -> Statistics:
    """The statistics of the data set `key`; without a mask, all dimensions are normalised.

    Raises:
      ValueError: where the text has no such data set, or of it no percentiles of one length.
    """
    found: dict[str, Any] = json.loads(text)
    if key not in found:
        raise ValueError(f"no statistics of {key!r}; choose one of {', '.join(sorted(found))}")
    action = found[key].get("action", {})
    if absent := {"q01", "q99"} - action.keys():
        raise ValueError(f"the actions of {key!r} have no {' and '.join(sorted(absent))}; they are needed")
    q01, q99 = (np.asarray(action[name], np.float64) for name in ("q01", "q99"))
    mask = np.asarray(action.get("mask", [True] * len(q01)), bool)
    if not len(q01) == len(q99) == len(mask):
        raise ValueError(
            f"the actions of {key!r} have {len(q01)} q01, {len(q99)} q99 and {len(mask)} mask; give as many"
        )
    return Statistics(q01, q99, mask)


def check_same(student: Statistics, teacher: Statistics) -> None:
    """Refuses two policies to whom the same tokens mean different actions.

    Raises:
      ValueError: one line with the key that differs, both values and the remedy.
    """
    for key, ours, theirs in zip(Statistics._fields, student, teacher):
        if not np.array_equal(ours, theirs):
            raise ValueError(
                f"{key} of the student is {ours.tolist()}, of the teacher {theirs.tolist()}: equal tokens would mean "
                "different actions; give the student the statistics (unnorm_key) of its teacher"
            )
