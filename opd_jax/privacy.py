# SPDX-License-Identifier: Apache-2.0
"""Differential privacy: what may be spent, what has been, who is in a batch, and the secret that all of it rests on.

The mechanism is DP-SGD with Poisson sampling (Abadi et al., arXiv:1607.00133): every record joins a step on its own
with probability `sampling_rate`, and the step releases a clipped sum with Gaussian noise (`dp_sgd.private`). Two data
sets are neighbours when one has one record more. Accounting is dp-accounting's; none of it is ours. `docs/privacy.md`
states the guarantee and what it does not cover.
"""

import functools
import hashlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import dp_accounting
import jax
import numpy as np
from absl import logging
from dp_accounting import pld, rdp
from jax_privacy.batch_selection import CyclicPoissonSampling
from jaxtyping import Array, Key

from opd_jax.config import ConfigError, fingerprint, versions, write_atomic

ACCOUNTANTS = {
    "pld": functools.partial(pld.PLDAccountant, value_discretization_interval=1e-3),
    "rdp": rdp.RdpAccountant,
}
SECRET_BYTES = 32


# ---- accounting ------------------------------------------------------------------------------------------------------


def _event(noise_multiplier: float, sampling_rate: float, steps: int) -> dp_accounting.DpEvent:
    step = dp_accounting.PoissonSampledDpEvent(sampling_rate, dp_accounting.GaussianDpEvent(noise_multiplier))
    return dp_accounting.SelfComposedDpEvent(step, steps)


@functools.cache
def epsilon_spent(
    noise_multiplier: float, delta: float, sampling_rate: float, steps: int, accountant: str = "pld"
) -> float:
    """The epsilon of `steps` steps of the subsampled Gaussian mechanism, an upper bound; adding or removing a record.

    Args:
        noise_multiplier: standard deviation of the noise over the clip norm; 0 gives infinity.
        accountant: "pld" (privacy loss distributions, tight) or "rdp" (Renyi: some 7 % more noise for one epsilon).
    """
    if steps == 0:
        return 0.0
    if noise_multiplier == 0:
        return float("inf")
    spent, verbosity = ACCOUNTANTS[accountant](), logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # it warns of every order of Renyi divergence that it leaves out
    try:
        spent.compose(_event(noise_multiplier, sampling_rate, steps))
        return float(spent.get_epsilon(delta))
    finally:
        logging.set_verbosity(verbosity)


@functools.cache
def noise_multiplier(epsilon: float, delta: float, sampling_rate: float, steps: int, accountant: str = "pld") -> float:
    """The least noise multiplier with which `steps` steps stay within (epsilon, delta), to 1e-4, rounded up.

    Raises:
        ConfigError: an epsilon or delta that no noise reaches, a rate outside 0 to 1, no steps.
    """
    if not (epsilon > 0 and 0 < delta < 1 and 0 < sampling_rate <= 1 and steps > 0):
        raise ConfigError(
            f"epsilon={epsilon}, delta={delta}, sampling_rate={sampling_rate}, steps={steps}: give an epsilon above 0, "
            "a delta between 0 and 1, a rate above 0 and up to 1, and 1 step or more"
        )
    within = lambda multiplier, accountant: (
        epsilon_spent(multiplier, delta, sampling_rate, steps, accountant) <= epsilon
    )
    upper = 1.0
    while not within(upper, "rdp"):
        upper *= 1.5
    while within(upper / 1.2, accountant):  # downwards: with far too little noise, a privacy loss takes gigabytes
        upper /= 1.2
    if not within(upper, accountant):  # where "rdp" is below "pld", at a hundredth of a percent
        upper *= 1.2
    lower = upper / 1.2
    while upper - lower > 1e-4:
        middle = (upper + lower) / 2
        lower, upper = (lower, middle) if within(middle, accountant) else (middle, upper)
    return upper


class Mechanism(NamedTuple):
    """What a step does, and the budget (epsilon, delta) that all steps together may spend."""

    epsilon: float
    delta: float
    noise_multiplier: float
    sampling_rate: float

    def spent(self, steps: int, accountant: str = "pld") -> float:
        """Epsilon after so many steps."""
        return epsilon_spent(self.noise_multiplier, self.delta, self.sampling_rate, steps, accountant)

    def most_steps(self, cap: int = 10**6) -> int:
        """Steps that the budget allows, by "pld", at most `cap`."""
        lower, upper = 0, 1
        while upper <= cap and self.spent(upper) <= self.epsilon:
            lower, upper = upper, 2 * upper
        while upper - lower > 1:
            middle = (lower + upper) // 2
            lower, upper = (middle, upper) if self.spent(middle) <= self.epsilon else (lower, middle)
        return min(lower, cap)


# ---- secrets ---------------------------------------------------------------------------------------------------------


class Secret(NamedTuple):
    """What noise and batches are drawn from. Whoever knows it can take the noise off again."""

    value: bytes
    is_test: bool  # made from a number in a config: reproducible, and NOT private

    def derive(self, *names: str) -> bytes:
        """32 bytes that belong to these names alone; nothing about the secret follows from them."""
        return hashlib.sha256(b"\0".join([self.value, *(name.encode() for name in names)])).digest()


def open_secret(workdir: str | os.PathLike, test_seed: int | None) -> Secret:
    """The secret of a run, from the system's entropy, kept in `workdir/secret` for a resume, readable by its owner.

    Delete the file when the run is over; nothing else holds it.

    Args:
        test_seed: makes the run reproducible and NOT private; None for a private one.
    """
    if test_seed is not None:
        return Secret(hashlib.sha256(f"test {test_seed}".encode()).digest(), True)
    path = Path(workdir) / "secret"
    if not path.exists():
        write_atomic(path, secrets.token_bytes(SECRET_BYTES), mode=0o600)
    value = path.read_bytes()
    if len(value) != SECRET_BYTES:
        raise ConfigError(f"{path}: {len(value)} bytes, not {SECRET_BYTES}; it is damaged, start a new run")
    return Secret(value, False)


def key_of(derived: bytes) -> Key[Array, ""]:
    """A key with all of the 64 bits that one has; `jax.random.key(integer)` keeps 32, which can be tried out."""
    return jax.random.wrap_key_data(np.frombuffer(derived[:8], np.uint32), impl="threefry2x32")


def environment() -> str:
    """Hash of what decides a step's arithmetic to the last bit; never the same twice where that cannot be relied on."""
    facts = {name: value for name, value in versions().items() if name not in ("command", "commit")}
    root = Path(__file__).parents[1]
    files = [path for name in ("opd_jax", "experiments", "configs") for path in sorted((root / name).rglob("*.py"))]
    code = {str(path.relative_to(root)): path.read_text() for path in files}
    again = "" if jax.default_backend() == "cpu" else secrets.token_hex(8)
    return fingerprint([facts, code, os.environ.get("XLA_FLAGS", ""), again])[:16]


# ---- batches, and the ledger -----------------------------------------------------------------------------------------


class Ledger:
    """Every private step that was begun, by stage and environment: lines of `workdir/ledger.jsonl`, never rewritten.

    A step is written down before it is taken. Taken again after a kill in the same environment it is the same step:
    same batch, gradient and noise, nothing new is released. In another environment noise and batches are drawn anew,
    and it counts as one more.
    """

    def __init__(self, workdir: str | os.PathLike, stage: str, here: str):
        self.path, self.stage, self.here = Path(workdir) / "ledger.jsonl", stage, here
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = self.path.read_bytes() if self.path.exists() else b""
        whole = written[: written.rfind(b"\n") + 1]  # a line that a kill cut short is of a step that was not taken
        if whole != written:
            os.truncate(self.path, len(whole))
        rows = map(json.loads, whole.splitlines())
        self.begun = {(row["environment"], row["step"]) for row in rows if row["stage"] == stage}

    def has(self, step: int) -> bool:
        """Whether the step was begun in this environment."""
        return (self.here, step) in self.begun

    def begin(self, step: int) -> None:
        """Writes a step down, once."""
        if self.has(step):
            return
        self.begun.add((self.here, step))
        with open(self.path, "a") as file:
            file.write(json.dumps({"stage": self.stage, "environment": self.here, "step": step}) + "\n")
            file.flush()
            os.fsync(file.fileno())


class PoissonBatches:
    """Batches of a private data set, each paid for; ends where the next would go beyond the budget.

    A batch is a function of (secret, stage, environment, step). It is padded to `room` records, or to the next
    multiple where it is larger, which happens to one in a billion and recompiles; nobody is left out. `get_state` goes
    into checkpoints, and holds what has been spent.

    Args:
        records: makes a batch of arrays from the indices of records, -1 where there is none.
        count: records of the data set.
        room: see `capacity`.
        place: puts a batch on the devices.
    """

    def __init__(
        self,
        records: Callable[[np.ndarray], Any],
        count: int,
        mechanism: Mechanism,
        room: int,
        secret: Secret,
        ledger: Ledger,
        place: Callable[[Any], Any] = lambda batch: batch,
    ):
        self.records, self.count, self.mechanism, self.room, self.place = records, count, mechanism, room, place
        self.secret, self.ledger, self.step, self.most = secret, ledger, 0, mechanism.most_steps()

    def __iter__(self):
        return self

    def __next__(self) -> Any:
        if not self.ledger.has(self.step) and len(self.ledger.begun) >= self.most:
            raise StopIteration
        self.ledger.begin(self.step)
        entropy = self.secret.derive("batch", self.ledger.stage, self.ledger.here, str(self.step))
        sampling = CyclicPoissonSampling(self.mechanism.sampling_rate, iterations=1)
        chosen = next(sampling.batch_iterator(self.count, np.random.default_rng(int.from_bytes(entropy, "little"))))
        self.step += 1
        size = self.room * max(-(-len(chosen) // self.room), 1)
        return self.place(self.records(np.pad(chosen.astype(np.int64), (0, size - len(chosen)), constant_values=-1)))

    def get_state(self) -> dict[str, Any]:
        return {"step": self.step, "epsilon": self.epsilon, "delta": self.mechanism.delta}

    def set_state(self, state: dict[str, Any]) -> None:
        self.step = state["step"]

    @property
    def epsilon(self) -> float:
        """Spent by this stage up to here, and by all steps that were begun in other environments."""
        here = self.ledger.here
        return self.mechanism.spent(sum(other != here or step < self.step for other, step in self.ledger.begun))

    def seed(self) -> Key[Array, ""]:
        """What `loop.run` draws this stage's rollouts and noise from."""
        return key_of(self.secret.derive("noise", self.ledger.stage, self.ledger.here))


def capacity(count: int, sampling_rate: float, multiple: int) -> int:
    """Records that a Poisson batch has room for: six standard deviations above the mean, up to a `multiple`."""
    mean = count * sampling_rate
    most = min(count, mean + 6 * (mean * (1 - sampling_rate)) ** 0.5 + 1)
    return multiple * -(-int(most) // multiple)
