# SPDX-License-Identifier: Apache-2.0
"""What benchmarks of a step beside a peer share: timing in turns, shares of a chip's peaks, peak memory, the table.

Imported by the programs beside it, `python benchmarks/token_opd.py`; it measures nothing itself.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from opd_jax import chips
from opd_jax.chips import GIB


class Work(NamedTuple):
    """What one call must do, whoever does it (`opd_jax.flops`)."""

    flops: float
    bytes: float | None = None  # that it must read from memory, where that is what bounds it
    count: int = 1
    unit: str = "tokens"


class Side(NamedTuple):
    """One contender: its calls by name, and bytes that it has had in use at most; None where that cannot be told."""

    calls: dict[str, Callable[[], object]]
    peak: Callable[[], int | None]


def timed(calls: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Seconds of every call, in turns, so that other load falls on all alike; one call of each is not counted."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def compare(sides: dict[str, Side], work: dict[str, Work], repeats: int, float32: bool) -> list[dict]:
    """Rows of the table: every call of `work` in its order, by every side, the first of which is "ours".

    Shares are of the fastest call, and of the peaks in `opd_jax.chips`; None where the device is not among them.
    Memory is the most that a side has had in use since its start: earlier rows count in later ones.
    """
    chip, rows = chips.of_device(jax.devices()[0].device_kind), []
    peak = chip and (chip.flops_float32 if float32 else chip.flops)
    for what, own in work.items():
        seconds = timed({name: side.calls[what] for name, side in sides.items()}, repeats)
        first = min(next(iter(seconds.values())))
        for name, times in seconds.items():
            best, used = min(times), sides[name].peak()
            row = {"": f"{what}, {name}", "fastest, s": f"{best:.4f}", "median, s": f"{np.median(times):.4f}"}
            row |= {f"{own.unit} a second": f"{own.count / best:,.4g}", "relative": f"{first / best:.2f}"}
            row |= {"TFLOP/s": f"{own.flops / best / 1e12:.4g}", "of peak": share(own.flops / best, peak)}
            row["of bandwidth"] = share(own.bytes and own.bytes / best, chip and chip.bandwidth)
            rows.append(row | {"peak GiB": None if used is None else f"{used / GIB:.2f}"})
    return rows


def profiled(side: Side, folder: str) -> None:
    """One more call of each of jax's rows, under `jax.profiler`: for TensorBoard or Perfetto."""
    with jax.profiler.trace(folder, create_perfetto_trace=True):
        for name, call in side.calls.items():
            with jax.profiler.TraceAnnotation(name):
                call()
    print(f"profile of {', '.join(side.calls)}: {folder}")


def share(rate: float | None, peak: float | None) -> str | None:
    return None if rate is None or peak is None else f"{rate / peak:.1%}"


def jax_peak() -> int | None:
    """Most bytes that jax has had in use on the first device; None on a CPU, which does not say."""
    stats = jax.local_devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    return stats.get("peak_bytes_in_use") if stats else None


def torch_peak(device: str) -> int | None:
    """The same of torch; None on a CPU."""
    import torch

    return torch.cuda.max_memory_allocated() if device == "cuda" else None
