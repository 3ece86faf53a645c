# SPDX-License-Identifier: Apache-2.0
"""Accelerators by what bounds a step on them, and topologies of them to compile for without having one."""

import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from opd_jax.config import ConfigError
from opd_jax.cost import Cost

GIB = 2**30
# So that libtpu neither looks for a machine of Google's cloud nor waits for one, and several processes can compile.
_OFFLINE = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
_OFFLINE |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


class Chip(NamedTuple):
    """Peaks of the vendor; what a program reaches is less."""

    name: str
    flops: float  # per second, of products in bfloat16
    flops_float32: float  # of products in float32 at jax's default precision: bfloat16 on a TPU, TF32 on a GPU
    memory: float  # bytes of HBM that a program may use
    bandwidth: float  # of HBM, bytes per second
    interconnect: float  # bytes per second that a chip sends to others, over all its links: half the two-way figure
    clock: float | None = None  # cycles per second, by which a TPU's compiler's own estimate is in seconds


CHIPS = {
    # docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e (2026); memory as XLA grants it, a little less than is built in.
    # Clocks: the peak over 2 FLOPs of each cell of the matrix units, 4 and 8 of 128 x 128, and of v6e 4 of 256 x 256.
    "v5e": Chip("TPU v5e", 197e12, 197e12, 15.75 * GIB, 819e9, 200e9, 1.5e9),
    "v5p": Chip("TPU v5p", 459e12, 459e12, 95 * GIB, 2765e9, 600e9, 1.75e9),
    "v6e": Chip("TPU v6e", 918e12, 918e12, 31.25 * GIB, 1638e9, 400e9, 1.75e9),
    # NVIDIA's data sheets of the SXM boards, without sparsity; memory less 6% that the driver and XLA leave unused.
    "a100": Chip("A100 80GB", 312e12, 156e12, 75e9, 2039e9, 300e9),
    "h100": Chip("H100 80GB", 989e12, 495e12, 75e9, 3350e9, 450e9),
    "h200": Chip("H200 141GB", 989e12, 495e12, 132e9, 4800e9, 450e9),
}
TPUS = ("v5e", "v5p", "v6e")
# What the names of devices begin with, the longer first: jax's `device_kind`, and so torch's `get_device_name`.
_KINDS = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU v6e": "v6e"}
_KINDS |= {"NVIDIA A100-SXM4-80GB": "a100", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200"}  # the SXM boards


class Topology(NamedTuple):
    chip: Chip
    devices: list  # to make a mesh of and compile for, one per chip; nothing can run on them
    exact: bool  # compiled by the chip's own compiler; False: by that of CPUs, an estimate


class Roofline(NamedTuple):
    """Seconds of a step if each resource alone were busy at its peak; the longest is the least a step can take."""

    compute: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        return max(self)

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(self._fields, key=lambda name: getattr(self, name))


def roofline(cost: Cost, chip: Chip, float32: bool) -> Roofline:
    """Seconds of one run of a program.

    Args:
        cost: of one device.
        float32: whether products are of float32 numbers.
    """
    peak = chip.flops_float32 if float32 else chip.flops
    return Roofline(cost.flops / peak, cost.bytes / chip.bandwidth, cost.sent / chip.interconnect)


def expected(cost: Cost, chip: Chip) -> float | None:
    """Seconds of a program by its compiler's own estimate of each operation's cycles; None where there is none.

    It is no bound, in neither direction: operations are added as if none ran beside another, and what has no estimate,
    transfers and collectives, counts nothing.
    """
    return cost.cycles / chip.clock if cost.cycles and chip.clock else None


def of_device(kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`; None where it is not among `CHIPS`, such as a CPU or another board."""
    return next((CHIPS[key] for start, key in _KINDS.items() if kind.startswith(start)), None)


def parse(name: str) -> tuple[str, int]:
    """The key of the chip and the number of chips in `v5p:4x4x4` or `h100:8`.

    Raises: ConfigError: it is not of that form, or the chip is not known.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){0,2}", shape):
        raise ConfigError(f"--topology={name}: give CHIP:SHAPE, such as v5p:4x4x4 or h100:8; chips: {', '.join(CHIPS)}")
    count = 1
    for size in shape.split("x"):
        count *= int(size)
    return kind, count


def topology(name: str) -> Topology:
    """Devices to compile for, by name: a TPU's through libtpu, without a TPU; for GPUs as many CPU devices.

    Raises: ConfigError: the name is no topology, libtpu is not installed, or there are fewer CPU devices.
    """
    kind, count = parse(name)
    if kind not in TPUS:
        devices = jax.devices("cpu")
        if len(devices) < count:
            remedy = f"set XLA_FLAGS=--xla_force_host_platform_device_count={count} before the start"
            raise ConfigError(f"--topology={name}: {len(devices)} CPU devices stand for {count} GPUs; {remedy}")
        return Topology(CHIPS[kind], devices[:count], False)
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--topology={name}: needs libtpu; pip install -e '.[plan]'") from error
    for key, value in _OFFLINE.items():
        os.environ.setdefault(key, value)
    shape = name.partition(":")[2]
    shape += "x1" * ((3 if kind == "v5p" else 2) - shape.count("x") - 1)
    try:
        found = topologies.get_topology_desc(f"{kind}:{shape}", "tpu").devices
    except Exception as error:  # of the plugin's own type
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--topology={name}: {reason}; give a shape that is sold, such as v5p:2x2x1") from error
    return Topology(CHIPS[kind], list(found), True)
