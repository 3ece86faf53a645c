"""The loop: sample with the student, label with the teacher, supervise every step, update. There is no other."""

from collections.abc import Iterator
from pathlib import Path

from jaxtyping import Array, Key

from opd_jax import rng
from opd_jax.checkpoint import Checkpoints
from opd_jax.metrics import MetricsWriter, Stopwatch, peak_memory
from opd_jax.types import Method, PyTree, TrainState


def run(
    method: Method,
    state: TrainState,
    data: Iterator[PyTree],
    *,
    workdir: Path,
    stage: str,
    checkpoint_dir: Path,
    steps: int,
    seed: int | Key[Array, ""],
    teacher_params: PyTree = None,
    save_every: int = 100,
) -> tuple[TrainState, dict[str, float]]:
    """Trains to `steps` updates, or as long as there is data, and leaves metrics and checkpoints under `workdir`.

    Start order: the checkpoint that is there (resume), else `state` as given (warm start or scratch). Randomness is a
    function of (seed, step) and the data position is saved with the state, so a killed run ends as an unbroken one.

    Args:
        method: the four functions of a paper.
        data: an iterator of batches with `get_state` and `set_state` (`data.batches`); where it ends, so does the run.
        seed: of sampling and updates; an integer, or a key.
        workdir, stage: where metrics go, and this run's name in them.
        checkpoint_dir: of this run alone; what is found there is continued, so name it after all the run depends on.
        teacher_params: handed to `method.label`; never saved.
        save_every: updates between checkpoints; the last update is always saved.

    Returns: the final state and the seconds spent in sample, label and update by this process.
    Raises: FloatingPointError naming step, metric and last good checkpoint when a metric is not finite.
    """
    sample_key, update_key = rng.stream(seed, "sample"), rng.stream(seed, "update")
    watch = Stopwatch()
    method = watch.wrap(method)
    with Checkpoints(checkpoint_dir) as checkpoints:
        start = 0
        if restored := checkpoints.restore(state):
            state, data_state, start = restored
            data.set_state(data_state)
        last_good = lambda: f"{checkpoint_dir}/{checkpoints.latest_step}"
        with MetricsWriter(workdir, steps, stage, start=start, last_good=last_good) as writer:
            saved = done = start
            for step in range(start, steps):
                if (batch := next(data, None)) is None:
                    break
                rollout = method.sample(state.params, batch, rng.at_step(sample_key, step))
                labels = method.label(teacher_params, rollout)
                state, metrics = method.update(state, rollout, labels, rng.at_step(update_key, step))
                writer.write(step, metrics | watch.take() | {"peak_memory": peak_memory()})
                done = step + 1
                if done % save_every == 0:
                    writer.flush()  # a state whose metrics are not finite is never saved
                    checkpoints.save(done, state, data.get_state())
                    saved = done
            if done > saved:
                writer.flush()
                checkpoints.save(done, state, data.get_state())
    return state, watch.total
