"""Runs an experiment: `python experiments/main.py --config=configs/flow_opd.py[:variant] [--config.a.b=value]`."""

import contextlib
import ctypes
import importlib.util
import os
import time
from pathlib import Path

# On CPU, two single-threaded devices are faster than one device with two threads: every operation is parallel, not
# matrix products alone. The number is fixed, so that a result does not depend on the machine's cores.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false")

# Memory that is freed stays with the process: on CPU a step of a small model otherwise spends as long in page faults as
# in arithmetic (1.4 times the images per second). M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_ARENA_MAX of glibc's malloc.h.
with contextlib.suppress(OSError, AttributeError):
    for option, value in ((-3, 1 << 30), (-1, (1 << 31) - 1), (-8, 1)):
        ctypes.CDLL("libc.so.6").mallopt(option, value)

import jax
from absl import flags, logging
from ml_collections import config_flags

from opd_jax import config as config_lib
from opd_jax import hosts, sharding

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file under configs/, with `:variant` if wanted.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where everything is written; default runs/NAME-TIME.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One of several processes of the run, see docs/launch.md.")
_RESUME = flags.DEFINE_bool("resume", False, "Continue the run in --workdir; it ends as if it had not stopped.")


def main(argv) -> None:
    if argv[1:]:
        raise config_lib.ConfigError(
            f"cannot use {' '.join(argv[1:])!r}: flags begin with --, as in --workdir=runs/mine"
        )
    if _RESUME.value and not _WORKDIR.value:
        raise config_lib.ConfigError("--resume needs --workdir=..., the folder of the run to continue")
    if _DISTRIBUTED.value:
        if not _WORKDIR.value:
            raise config_lib.ConfigError("--distributed needs --workdir=..., a folder that all processes see")
        hosts.initialize()
    jax.config.update("jax_numpy_rank_promotion", "raise")
    # One program at a time on CPU: of two in flight, each can hold the thread that the other's collective waits for.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    logging.set_verbosity(logging.WARNING)
    config = _CONFIG.value
    config_lib.keep_arms(config)
    jax.config.update("jax_disable_most_optimizations", config.compile_quickly)
    name = config.experiment
    name = config.experiment
    if importlib.util.find_spec(f"experiments.{name}") is None:
        raise config_lib.ConfigError(f"experiment={name!r}: there is no experiments/{name}.py; give one that is there")
    experiment = importlib.import_module(f"experiments.{name}")
    mesh = sharding.make_mesh(config.mesh)
    experiment.validate(config, mesh)
    workdir = _WORKDIR.value or os.path.join("runs", f"{config.experiment}-{time.strftime('%Y%m%d-%H%M%S')}")
    hosts.by_first(lambda: config_lib.prepare_workdir(workdir, config, resume=_RESUME.value))
    workdir = Path(workdir).expanduser().absolute()
    # Arms of an experiment run the same programs, and so does a resume. Not so where a CPU stands for several axes of
    # devices: programs read from such a cache have been seen to abort.
    several = sum(size > 1 for size in mesh.shape.values()) > 1 or hosts.several()
    if not jax.config.jax_compilation_cache_dir and not (several and jax.default_backend() == "cpu"):
        jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
    with hosts.together():
        experiment.run(config, workdir, mesh)


if __name__ == "__main__":
    config_lib.run(main)
