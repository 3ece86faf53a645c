"""OpenVLA's directories as policies for simulators on the host: a student, and the teacher that labels."""

import dataclasses
import io
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from experiments import stages
from experiments.vla_policies import Kit, Robot
from opd_jax.checkpoint import params_sha256
from opd_jax.config import ConfigError
from opd_jax.models import action_tokens, attention, vla
from opd_jax.models.action_tokens import Statistics
from opd_jax.models.hf import load_openvla, openvla_inputs
from opd_jax.models.hf.openvla import OpenVla
from opd_jax.models.hf.openvla_inputs import Images, instruction_ids, load_tokenizer
from opd_jax.models.vla import Observation

JPEG = 95  # TensorFlow's quality


class Read(NamedTuple):
    """A directory, and the statistics of its actions that a run goes by."""

    model: OpenVla
    data_set: str
    statistics: Statistics
    ids: np.ndarray  # of the robot's instructions
    made: stages.Made


def kit(config, robot: Robot, mesh) -> Kit:
    """The policies of `student.path` and, where it is given, `teacher.path`.

    Pictures come to them as in OpenVLA-OFT's evaluation: as their data were stored (JPEG, Lanczos), the middle cut out.

    Raises:
        ConfigError: what `load_openvla` refuses; or equal tokens do not mean the same to both, or their shapes differ.
    """
    part = config.student
    student, taught = read(config, "student", robot, mesh), None
    if config.teacher.path:
        taught = read(config, "teacher", robot, mesh)
        check_alike(student, taught, config.teacher.path, part.proprioception)
    kernel = attention.kernel(part.attention, student.model.module.language_model.head_dim)
    fields = {"dtype": jnp.dtype(part.dtype), "attention": kernel, "remat": part.remat}
    module = vla.with_fields(student.model.module, **fields)
    words, felt = dict(zip(robot.instructions, student.ids)), None
    if part.proprioception:
        felt = student.model.proprioception[student.data_set]

    def prepare(seen: dict[str, np.ndarray], sentence: str) -> Observation:
        pictures = [picture(image, student.model.images, part.crop) for image in seen["images"][: part.cameras]]
        hand = jnp.asarray(seen["proprioception"] if felt else np.zeros(0), jnp.float32)
        hand = np.asarray(action_tokens.normalize(hand, felt) if felt else hand)
        return Observation(np.stack(pictures), hand, words[sentence])

    size, width = student.model.images.size, len(felt.q01) if felt else 0
    pictures = jnp.zeros((1, part.cameras, size, size, 3), jnp.uint8)
    return Kit(
        module,
        Observation(pictures, jnp.zeros((1, width)), jnp.asarray(student.ids[:1])),
        prepare,
        *conversions(robot, student.statistics),
        student.made,
        taught.made if taught else None,
    )


def read(config, which: str, robot: Robot, mesh) -> Read:
    """A directory of the config; the student's parameters are float32, the teacher's as stored."""
    part = config[which]
    shape = {"horizon": config.policy.horizon, "action_dim": robot.action_dims}
    dtype = jnp.float32 if which == "student" else None
    model = load_openvla(Path(part.path).expanduser(), dtype=dtype, mesh=mesh, **shape)
    if not part.statistics and len(model.statistics) != 1:
        known = ", ".join(sorted(model.statistics))
        raise ConfigError(f"{which}.statistics='': {part.path} has several; choose of {known}")
    data_set = part.statistics or next(iter(model.statistics))
    found = model.statistics[data_set]
    if len(found.q01) != robot.action_dims:
        line = f"{which}.statistics={data_set!r}: of {len(found.q01)} dimensions, the robot has {robot.action_dims}"
        raise ConfigError(f"{line}; choose others, or another world")
    ids = instruction_ids(load_tokenizer(part.path), robot.instructions)
    sha = params_sha256(model.params)
    return Read(model, data_set, found, ids, stages.Made(model.params, stages.recipe_of({"given": sha}), sha, 0.0, 0))


def check_alike(student: Read, teacher: Read, path: str, proprioception: bool) -> None:
    """Refuses a teacher whose answer to the student's observation would mean another thing.

    Its parameters run in the student's module, on the student's pictures, tokens and, where it has any, proprioception.
    """
    both = {"": (student.statistics, teacher.statistics)}
    if proprioception:
        both["of proprioception, "] = tuple(one.model.proprioception[one.data_set] for one in (student, teacher))
    for which, (own, other) in both.items():
        try:
            action_tokens.check_same(own, other)
        except ValueError as error:
            raise ConfigError(f"teacher.path={path}: {which}{error}") from error
    if other := ", ".join(differences(student.model.module, teacher.model.module)):
        raise ConfigError(f"teacher.path={path}: differs from the student in {other}; choose one of its architecture")
    if not np.array_equal(student.ids, teacher.ids):
        raise ConfigError(
            f"teacher.path={path}: its tokenizer gives instructions other ids; choose one of the student's"
        )
    if student.model.images != teacher.model.images:
        raise ConfigError(f"teacher.path={path}: takes pictures of {teacher.model.images}; choose one as the student's")
    shapes = [jax.tree.map(jnp.shape, one.model.params) for one in (student, teacher)]
    if shapes[0] != shapes[1]:
        raise ConfigError(f"teacher.path={path}: is of other sizes than the student; choose one of its architecture")


def differences(module: nn.Module, other: nn.Module) -> list[str]:
    """Fields of a module, and of the modules in them, in which another of its class has another value."""
    found = []
    for field in dataclasses.fields(module):
        if field.name in ("parent", "name"):
            continue
        own, its = getattr(module, field.name), getattr(other, field.name)
        inner = isinstance(own, nn.Module) and type(own) is type(its)
        if inner:
            found += [f"{field.name}.{name}" for name in differences(own, its)]
        elif own != its:
            found.append(field.name)
    return found


def conversions(robot: Robot, statistics: Statistics) -> tuple:
    """Actions as the policy has them, in [-1, 1], to the simulator's, and back."""

    def wide(value, rank: int):
        return jnp.asarray(value, jnp.float32).reshape(*[1] * (rank - 1), -1)

    def to_robot(actions):
        own = action_tokens.unnormalize(actions, statistics)
        return own * wide(robot.scale, own.ndim) + wide(robot.shift, own.ndim)

    def from_robot(actions):
        actions = jnp.asarray(actions, jnp.float32)
        own = (actions - wide(robot.shift, actions.ndim)) / wide(robot.scale, actions.ndim)
        return action_tokens.normalize(own, statistics)

    return to_robot, from_robot


def picture(image: UInt8[np.ndarray, "H W 3"], images: Images, crop: float) -> UInt8[np.ndarray, "size size 3"]:
    """A camera's picture as the policy takes it."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(file, "JPEG", quality=JPEG)
    stored = np.asarray(Image.open(file).resize((images.size, images.size), Image.Resampling.LANCZOS))
    return openvla_inputs.prepare(openvla_inputs.centre_crop(stored, crop), images)
