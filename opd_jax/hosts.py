# SPDX-License-Identifier: Apache-2.0
"""One run in several processes: how they find each other, who writes, and what lies on other hosts.

Every process runs the same program on the same batches, and holds the parts of arrays that lie on its own devices;
with the mesh set, whatever JAX makes is an array of all of them. What is decided on the host must be decided alike
everywhere, or the processes wait for one another for ever: `fetch` gives all of them the same whole arrays, `agreed`
the first one's answer where answers can differ (a clock, a verifier that ran out of time). The folder of a run is on a
file system that all of them see, and the first process alone writes into it; of a checkpoint each writes its own part.

With one process nothing here does anything.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from opd_jax.config import ConfigError
from opd_jax.types import PyTree

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
HEARTBEAT = 60  # seconds of silence after which a process counts as dead, and the others end


class Launcher(NamedTuple):
    """The environment variables in which a launcher numbers its processes."""

    count: str
    process: str
    here: str  # among those of the same host


LAUNCHERS = (  # the first that is there counts, as in JAX: mpirun inside a job of SLURM is Open MPI's
    Launcher("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    Launcher("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
)


def initialize() -> None:
    """Joins the processes of this run; to be called before anything of JAX is used.

    JAX finds them, from the metadata of a TPU pod, SLURM, Open MPI or Kubernetes, or they are in three environment
    variables: `JAX_COORDINATOR_ADDRESS`, host:port of the first; `JAX_NUM_PROCESSES`; `JAX_PROCESS_ID`, 0 is the first.
    Under SLURM and Open MPI the first alone is enough, where JAX finds no address (Open MPI 5) or not the right one.

    Of a host's GPUs a process takes those that `gpus` says.

    Raises: ConfigError where there is nothing to find them by, or they do not all come.
    """
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT, **_numbers(), local_device_ids=gpus())
    except ConfigError:
        raise
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        remedy = f"start one process per host under SLURM, Open MPI or on a TPU pod, or set {', '.join(EXPLICIT)}"
        raise ConfigError(f"--distributed: {reason}; {remedy}") from error


def _launcher() -> Launcher | None:
    """The one that started this process; None where its number is given by hand, or JAX knows better."""
    if any(name in os.environ for name in EXPLICIT[1:]):
        return None
    return next((one for one in LAUNCHERS if all(name in os.environ for name in one)), None)


def _numbers() -> dict[str, Any]:
    """How many processes there are and which one this is, where the address of the first is given; else {}."""
    launcher, given = _launcher(), [name for name in EXPLICIT if name in os.environ]
    names = EXPLICIT if launcher is None else (EXPLICIT[0], launcher.count, launcher.process)
    if not given:
        return {}
    if missing := ", ".join(name for name in names if name not in os.environ):
        raise ConfigError(f"--distributed: {missing} not set beside {', '.join(given)}; set all three, or none")
    count, process = (int(os.environ[name]) for name in names[1:])
    return {"num_processes": count, "process_id": process, "cluster_detection_method": "deactivate"}


def gpus() -> list[int] | None:
    """Which of the GPUs that a process of SLURM or Open MPI can see are its own; []: all; None: left to JAX.

    All where it is alone on its host, and where it sees but one or `--gpus-per-task` has bound them to it. JAX would
    take the one GPU of the process's number on its host, which is the rule where several see all.
    """
    launcher, environment = _launcher(), os.environ
    if launcher is None or "JAX_LOCAL_DEVICE_IDS" in environment:
        return None
    one_each = environment.get("SLURM_STEP_NUM_NODES") == environment.get("SLURM_NTASKS", "")
    alone = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1" if launcher is LAUNCHERS[0] else one_each
    bound = launcher is LAUNCHERS[1] and "SLURM_GPUS_PER_TASK" in environment  # mpirun in such a job binds none
    sees_one = environment.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0
    return [] if alone or bound or sees_one else [int(environment[launcher.here])]


def several() -> bool:
    """Whether this run has more than one process."""
    return jax.process_count() > 1


def first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def wait(reason: str) -> None:
    """Returns when every process has come here, all with the same `reason`."""
    if several():
        multihost_utils.sync_global_devices(reason)


def fetch(tree: PyTree) -> PyTree:
    """The whole arrays of a tree, as numpy arrays, in every process; `jax.device_get`, wherever their parts lie."""

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree) if several() else tree)


def agreed(tree: PyTree) -> PyTree:
    """The first process's values of a tree of numbers or arrays of fixed shapes, as numpy arrays, in every process."""
    return multihost_utils.broadcast_one_to_all(tree) if several() else tree


def by_first(do: Callable[[], Any]) -> None:
    """Does something in the first process while the others wait.

    Raises: ConfigError in all of them where it does in the first.
    """
    if not several():
        do()
        return
    said = ""
    if first():
        try:
            do()
        except ConfigError as error:
            said = str(error)
    line = np.zeros(4096, np.uint8)
    text = np.frombuffer(said.encode()[: len(line)], np.uint8)
    line[: len(text)] = text
    if told := bytes(agreed(line)).rstrip(b"\0").decode(errors="replace"):
        raise ConfigError(told)


def from_first(make: Callable[[], np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """What the first process makes, float32 of this shape, in every process: of a server, say, that is asked once.

    Raises: ConfigError in all of them where it does in the first.
    """
    array = np.zeros(shape, np.float32)
    by_first(lambda: np.copyto(array, make()))
    return agreed(array)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """The work of all processes: the first alone prints, and one that fails ends at once, so that none waits for it.

    A `ConfigError` is everybody's, and is left to the caller.
    """
    if not several():
        yield
        return
    with contextlib.ExitStack() as quiet:
        if not first():
            quiet.enter_context(contextlib.redirect_stdout(quiet.enter_context(open(os.devnull, "w"))))
        try:
            yield
        except ConfigError:
            raise
        except Exception:
            traceback.print_exc()
            line = f"error: process {jax.process_index()} of {jax.process_count()} stopped, or lost another one"
            print(
                f"{line}; see the first error among their outputs, and start all again with --resume", file=sys.stderr
            )
            sys.stderr.flush()
            os._exit(1)
        wait("the run is over")
