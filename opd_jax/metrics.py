# SPDX-License-Identifier: Apache-2.0
"""What a run says while it runs: metrics.jsonl, TensorBoard, progress, seconds per stage, and the NaN guard."""

import functools
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from opd_jax import hosts
from opd_jax.config import write_atomic

PLAIN_LINE_EVERY = 10.0  # seconds between progress lines where there is no terminal


def read_metrics(workdir: str | os.PathLike, stage: str | None = None) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, of one stage or of all; a last line cut short by a kill is left out."""
    path = Path(workdir) / "metrics.jsonl"
    lines = path.read_text().split("\n") if path.exists() else []
    rows = [json.loads(line) for line in lines[:-1]]  # what follows the last newline is empty or cut short
    return [row for row in rows if stage in (None, row["stage"])]


class MetricsWriter:
    """Writes the metrics of one stage, one step late, so that the device is never waited for.

    Every line of `metrics.jsonl` is `{"stage", "step", "seconds", metric: value, ...}`; `seconds` is the time spent in
    the stage, resumed runs included. Lines of this stage at or after `start` are dropped first, so that a resumed run
    has every step once.

    ```
    with MetricsWriter(workdir, config.steps, "distill", start=start) as writer:
        for step in range(start, config.steps):
            ...
            writer.write(step, metrics | watch.take())
    ```

    Args:
        total_steps: where the stage ends, for the progress bar and the time left.
        start: first step that will be written.
        show: metrics to show beside the progress.
        last_good: returns the last good checkpoint, named when a value is not finite.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        total_steps: int,
        stage: str,
        *,
        start: int = 0,
        show: tuple[str, ...] = ("loss", "epsilon"),
        last_good: Callable[[], Any] = lambda: None,
    ):
        self._stage, self._show, self._last_good = stage, show, last_good
        self._held: tuple[int, float, Mapping[str, Any]] | None = None
        kept = [row for row in read_metrics(workdir) if row["stage"] != stage or row["step"] < start]
        path = write_atomic(Path(workdir) / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(path if hosts.first() else os.devnull, "a")  # noqa: SIM115 closed by close()
        before = max((row["seconds"] for row in kept if row["stage"] == stage), default=0.0)
        self._began = time.perf_counter() - before
        self._board = _tensorboard(Path(workdir) / "tensorboard" / stage, start) if hosts.first() else None
        self._progress = _Progress(stage, start, total_steps)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of a step and writes those of the step before.

        Args:
            metrics: scalars, or small vectors, on the device or the host. All must be finite: leave out what is
                undefined at a step.

        Raises:
            FloatingPointError: a metric of the step before is NaN or infinite.
        """
        held, self._held = self._held, (step, time.perf_counter() - self._began, dict(metrics))
        if held is not None:
            self._emit(*held)

    def flush(self) -> None:
        """Writes what is held back. Call it before a checkpoint is saved, so that no bad state is ever saved."""
        held, self._held = self._held, None
        if held is not None:
            self._emit(*held)

    def close(self) -> None:
        """Ends the progress bar and closes the files; `flush` first to keep the last step."""
        self._progress.close()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            self.close()

    def _emit(self, step: int, seconds: float, metrics: Mapping[str, Any]) -> None:
        values = {name: np.asarray(value) for name, value in hosts.fetch(metrics).items()}
        for name, value in values.items():
            if not np.all(np.isfinite(value)):
                raise FloatingPointError(
                    f"{self._stage} step {step}: {name} = {value}; last good checkpoint: {self._last_good()}; "
                    "start a new run with a lower learning rate or tighter clipping"
                )
        row = {"stage": self._stage, "step": step, "seconds": round(seconds, 3)}
        self._file.write(json.dumps(row | {name: _number(value) for name, value in values.items()}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                for index, element in enumerate(value.reshape(-1)):
                    self._board.add_scalar(f"{name}/{index}" if value.ndim else name, float(element), step)
        shown = {name: float(values[name]) for name in self._show if name in values and values[name].ndim == 0}
        self._progress.update(step, shown)


def _number(value: np.ndarray) -> Any:
    """JSON's form of an array, with the digits that its own precision has and no more."""
    if jax.numpy.issubdtype(value.dtype, np.inexact) and value.dtype != np.float64:
        value = value.astype(np.float32).astype(str).astype(float)
    return value.tolist()


def _tensorboard(directory: Path, start: int) -> Any:
    """A TensorBoard writer, or None where tensorboardX is not installed."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory), purge_step=start)


class _Progress:
    """A bar with rate and time left on a terminal; elsewhere a line at the start, every 10 seconds and at the end."""

    def __init__(self, stage: str, start: int, total: int):
        self._stage, self._total, self._step = stage, total, start
        shown = sys.stderr.isatty() and hosts.first()
        self._bar = tqdm(desc=stage, initial=start, total=total, dynamic_ncols=True) if shown else None
        self._last_time, self._last_step = -math.inf, start

    def update(self, step: int, shown: Mapping[str, float]) -> None:
        done = step + 1
        if not hosts.first():
            return
        if self._bar is not None:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
            self._bar.update(done - self._step)
        elif time.perf_counter() - self._last_time >= PLAIN_LINE_EVERY or done >= self._total:
            self._print(done, shown)
        self._step = done

    def _print(self, done: int, shown: Mapping[str, float]) -> None:
        now = time.perf_counter()
        rate = (done - self._last_step) / (now - self._last_time)  # 0 at the first line
        left = f"  {rate:.3g} steps/s  {format_seconds((self._total - done) / rate)} left" if rate > 0 else ""
        values = "".join(f"  {name} {value:.4g}" for name, value in shown.items())
        print(f"{self._stage}  step {done}/{self._total}{values}{left}", file=sys.stderr, flush=True)
        self._last_time, self._last_step = now, done

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def format_seconds(seconds: float | int) -> str:
    """`8.3 s`, `4 min 05 s` or `2 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class Stopwatch:
    """Seconds of wall time by name, of functions whose results are waited for.

    ```
    watch = Stopwatch()
    method = watch.wrap(method)  # sample, label and update, timed
    ... writer.write(step, metrics | watch.take())
    ```
    """

    def __init__(self) -> None:
        self.total: dict[str, float] = {}
        self._taken: dict[str, float] = {}

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, which waits for its result and adds its seconds to `name`."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = jax.block_until_ready(function(*args, **kwargs))
            self.total[name] = self.total.get(name, 0.0) + time.perf_counter() - began
            return result

        return call

    def wrap(self, functions: Any) -> Any:
        """A NamedTuple of functions, such as a `Method`, each timed under its own name."""
        return type(functions)(*(self.timed(name, function) for name, function in functions._asdict().items()))

    def take(self) -> dict[str, float]:
        """`{"seconds/name": s}` since the last call; `total` keeps the sums."""
        lap = {f"seconds/{name}": total - self._taken.get(name, 0.0) for name, total in self.total.items()}
        self._taken = dict(self.total)
        return lap


def peak_memory() -> int:
    """Most memory this process has held so far, in bytes: of the first device, or of the host on CPU."""
    stats = jax.local_devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS and in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
