"""Small policies, and for simulators on the host how an observation and an action become a policy's."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments import stages
from opd_jax.config import ConfigError
from opd_jax.models import vla
from opd_jax.models.vla import Observation


class Robot(NamedTuple):
    """What a policy has to know of a simulator."""

    cameras: int  # that a policy sees; 0: pictures are for films alone
    size: int  # of pictures, in pixels
    action_dims: int
    felt: Float[np.ndarray, "2 P"]  # least and most of its proprioception
    instructions: Sequence[str]
    scale: Float[np.ndarray, "A"]  # an action of the simulator is `scale * a + shift` of one as data sets have it
    shift: Float[np.ndarray, "A"]


class Kit(NamedTuple):
    """A class of policies for a robot. `to_robot` is traceable and static, as is the inverse."""

    module: nn.Module
    example: Observation  # [1, ...]
    prepare: Callable[[dict[str, np.ndarray], str], Observation]  # without a batch axis, numpy
    to_robot: Callable[[Array], Array]  # normalised actions [..., A] as the simulator takes them
    from_robot: Callable[[np.ndarray], np.ndarray]
    student: stages.Made | None = None  # what students begin with; None: random parameters
    teacher: stages.Made | None = None


def same(actions: Any) -> Any:
    return actions


class Words:
    """Sentences as numbers of words, from 1 on, padded with 0 to the longest."""

    def __init__(self, sentences: Sequence[str]):
        self.known = sorted({word for sentence in sentences for word in sentence.split()})
        self.length = max(len(sentence.split()) for sentence in sentences)
        self._ids = {sentence: self._encode(sentence) for sentence in sentences}

    def _encode(self, sentence: str) -> np.ndarray:
        ids = [1 + self.known.index(word) for word in sentence.split()]
        return np.array(ids + [0] * (self.length - len(ids)), np.int32)

    def __call__(self, sentence: str) -> np.ndarray:
        if sentence not in self._ids:
            raise ConfigError(f"instruction {sentence!r}: is of no task; give one of {', '.join(self._ids)}")
        return self._ids[sentence]


def small(policy, action_dims: int, words: int, image_size: int) -> vla.Vla:
    """A module of `vla.tiny`, of the sizes of a config's `policy`."""
    return vla.tiny(
        policy.horizon, action_dims, words=words, image_size=image_size, width=policy.width, num_layers=policy.layers,
        mlp_width=3 * policy.width, points=policy.points,
    )  # fmt: skip


def own(policy, robot: Robot) -> Kit:
    """Small policies for a robot."""
    words = Words(robot.instructions)
    module = small(policy, robot.action_dims, 1 + len(words.known), robot.size)
    least, most = robot.felt

    def prepare(seen: dict[str, np.ndarray], sentence: str) -> Observation:
        felt = np.clip(2 * (seen["proprioception"] - least) / (most - least) - 1, -1, 1)
        pictures = seen["images"] if robot.cameras else none
        return Observation(pictures, felt.astype(np.float32), words(sentence))

    none = np.zeros((robot.cameras, robot.size, robot.size, 3), np.uint8)
    first = prepare({"images": none, "proprioception": least}, robot.instructions[0])
    example = Observation(*(jnp.asarray(leaf)[None] for leaf in first))
    return Kit(module, example, prepare, same, same)
