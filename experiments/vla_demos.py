"""Demonstrations from a directory in LeRobot's format, in place of an expert's."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from experiments.vla_policies import Kit, Robot
from experiments.vla_worlds import Demonstrations, as_demonstrations
from opd_jax.config import ConfigError
from opd_jax.types import EpisodeRollout
from opd_jax.worlds import lerobot


def digest(path: str) -> str:
    """Hash of what a data set says of itself: another one in its place is noticed."""
    whole, folder = hashlib.sha256(), Path(path).expanduser() / "meta"
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        whole.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode() + file.read_bytes())
    return whole.hexdigest()


def read(path: str, kit: Kit, robot: Robot, numbers: Mapping[str, int], count: int) -> Demonstrations:
    """The first `count` episodes of each task, told by their instructions.

    Args:
        numbers: instruction to the task's number; episodes of others are passed over.

    Raises:
        ConfigError: what `lerobot.read` refuses; a task has too few; pictures, what is felt and actions are not as the
            robot's; or a policy without statistics is shown actions beyond [-1, 1].
    """
    missing, found = dict.fromkeys(numbers.values(), count), []
    for episode in lerobot.read(Path(path).expanduser()):
        task = numbers.get(episode.instruction)
        if task is None or not missing[task]:
            continue
        if not found:
            check(path, episode, robot)
        check_range(path, episode, kit)
        found.append(as_demonstrations(_rollout(episode, task, kit), kit.module.horizon))
        missing[task] -= 1
        if not any(missing.values()):
            return jax.tree.map(lambda *parts: np.concatenate(parts), *found)
    few = [f"{text!r} {count - missing[task]}" for text, task in numbers.items() if missing[task]]
    raise ConfigError(f"demos={path}: {count} episodes of each task are asked for; of {', '.join(few)} are there")


def check(path: str, episode: lerobot.Episode, robot: Robot) -> None:
    """Refuses a data set of another robot."""
    _, cameras, height, width, _ = episode.images.shape
    wanted = {"cameras": robot.cameras, "height": robot.size, "width": robot.size}
    wanted |= {"proprioception": robot.felt.shape[1], "actions": robot.action_dims}
    shapes = {"cameras": cameras, "height": height, "width": width}
    shapes |= {"proprioception": episode.proprioception.shape[1], "actions": episode.actions.shape[1]}
    wrong = [f"{name} {shapes[name]}, not {value}" for name, value in wanted.items() if shapes[name] != value]
    if wrong:
        raise ConfigError(f"demos={path}: {', '.join(wrong)}; give demonstrations of this world's robot and cameras")


def check_range(path: str, episode: lerobot.Episode, kit: Kit) -> None:
    """Refuses what a policy of our own cannot do: it has no statistics, and bins end at -1 and 1."""
    if kit.student:
        return
    size = np.abs(episode.actions).max(0)
    if not (size <= 1 + 1e-6).all():
        which = int(np.argmax(~(size <= 1 + 1e-6)))
        remedy = "scale or clip the data set's as the simulator does"
        line = f"demos={path}: action {which} is as large as {size[which]:.3g}, and a policy without statistics acts in"
        raise ConfigError(f"{line} [-1, 1]; {remedy}")


def _rollout(episode: lerobot.Episode, task: int, kit: Kit) -> EpisodeRollout:
    """As an expert's episode: an observation and an action, as the policy has it, at every step."""
    steps = [
        kit.prepare({"images": images, "proprioception": hand}, episode.instruction)
        for images, hand in zip(episode.images, episode.proprioception)
    ]
    seen = jax.tree.map(lambda *leaves: np.stack(leaves)[None], *steps)
    actions = np.asarray(kit.from_robot(episode.actions), np.float32)[None]
    length, one = actions.shape[1], np.zeros(1, np.int32)
    counted = np.ones((1, length, 1), bool)
    return EpisodeRollout((seen, None), actions, counted, one + 1.0, one + length, one, one + task)
