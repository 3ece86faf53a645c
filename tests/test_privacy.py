"""The budget: its accounting beside dp-accounting's own values, who is in a batch, the ledger and the secret."""

import json
import os
import stat

import jax
import numpy as np
import pytest

from opd_jax import privacy
from opd_jax.config import ConfigError
from opd_jax.privacy import Ledger, Mechanism, PoissonBatches, Secret

HERE, SECRET = "here", Secret(b"s" * 32, True)


def mechanism(**change) -> Mechanism:
    return Mechanism(2.0, 1e-3, 1.0, 0.1)._replace(**change)


def batches(workdir, here=HERE, secret=SECRET, stage="student", **change) -> PoissonBatches:
    ledger = Ledger(workdir, stage, here)
    return PoissonBatches(lambda indices: indices, 400, mechanism(**change), 48, secret, ledger)


# ---- accounting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "steps", "by_pld", "by_rdp"),
    [(100_000, 732, 2.37, 2.55), (150_000, 1_098, 2.02, 2.16), (200_000, 1_464, 1.81, 1.92)],
)
def test_noise_for_the_published_pipelines(count, steps, by_pld, by_rdp):
    for accountant, want in (("pld", by_pld), ("rdp", by_rdp)):
        got = privacy.noise_multiplier(2.0, 1 / count, 4_096 / count, steps, accountant)
        assert got == pytest.approx(want, abs=0.006), accountant
        assert 1.99 < privacy.epsilon_spent(got, 1 / count, 4_096 / count, steps, accountant) <= 2.0


def test_epsilon_of_one_gaussian_release():
    """The whole data set, once: the Gaussian mechanism, whose exact curve is known (arXiv:1805.06530, theorem 8)."""
    from scipy.stats import norm

    sigma, epsilon = 1.3, privacy.epsilon_spent(1.3, 1e-4, 1.0, 1)
    delta = norm.cdf(0.5 / sigma - epsilon * sigma) - np.exp(epsilon) * norm.cdf(-0.5 / sigma - epsilon * sigma)
    assert delta == pytest.approx(1e-4, rel=0.02)


def test_what_is_spent_grows_and_nothing_costs_nothing():
    spent = [privacy.epsilon_spent(1.0, 1e-5, 0.01, steps) for steps in (0, 1, 10, 100)]
    assert spent[0] == 0 and sorted(spent) == spent and spent[1] > 0
    assert privacy.epsilon_spent(0.0, 1e-5, 0.01, 1) == np.inf


@pytest.mark.parametrize("wrong", [{"epsilon": 0.0}, {"delta": 1.0}, {"sampling_rate": 1.1}, {"steps": 0}])
def test_budgets_that_make_no_sense(wrong):
    (name, value), right = *wrong.items(), {"epsilon": 1.0, "delta": 1e-5, "sampling_rate": 0.1, "steps": 10}
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        privacy.noise_multiplier(**right | wrong)


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_every_record_joins_on_its_own(tmp_path):
    drawn = batches(tmp_path, noise_multiplier=20.0)
    chosen = [batch[batch >= 0] for batch, _ in zip(drawn, range(200))]
    sizes = np.array([len(batch) for batch in chosen])
    assert all(len(set(batch)) == len(batch) for batch in chosen)
    assert abs(sizes.mean() - 40) < 4 * 6 / np.sqrt(200)
    assert sizes.var() == pytest.approx(36, rel=4 * np.sqrt(2 / 200)), "batches of a shuffled set would all be as large"
    joined = np.bincount(np.concatenate(chosen), minlength=400)
    assert abs(joined - 20).max() < 5 * np.sqrt(200 * 0.1 * 0.9)
    together = sum(1 for batch in chosen if {0, 1} <= set(batch.tolist()))
    assert together < 2 + 4 * np.sqrt(2)


def test_batches_are_padded_and_nobody_is_left_out(tmp_path):
    drawn = batches(tmp_path, noise_multiplier=20.0, sampling_rate=0.12)
    sizes = {len(batch): int((batch >= 0).sum()) for batch, _ in zip(drawn, range(100))}
    assert set(sizes) == {48, 96} and sizes[96] > 48
    few = batches(tmp_path / "few", noise_multiplier=20.0, sampling_rate=1e-9)
    assert (next(few) == -1).all() and len(next(few)) == 48


def test_the_room_of_a_batch():
    assert privacy.capacity(400, 0.1, 16) == 80  # 40 + 6 * 6 + 1 = 77
    assert privacy.capacity(10, 0.9, 4) == 12
    assert privacy.capacity(400, 1e-6, 8) == 8


def test_a_batch_is_a_function_of_secret_stage_environment_and_step(tmp_path):
    first = [next(batches(tmp_path / str(i))).tolist() for i in range(2)]
    assert first[0] == first[1]
    others = [{"here": "there"}, {"stage": "other"}, {"secret": Secret(b"t" * 32, True)}]
    made = [batches(tmp_path / f"o{i}", **other) for i, other in enumerate(others)]
    assert all(next(one).tolist() != first[0] for one in made)
    keys = [tuple(jax.random.key_data(one.seed()).tolist()) for one in (*made, batches(tmp_path / "k"))]
    assert len(set(keys)) == 4
    again = batches(tmp_path / "0")
    again.set_state({"step": 3, "epsilon": 0.5, "delta": 1e-3})
    straight = batches(tmp_path / "1")
    assert next(again).tolist() == [next(straight).tolist() for _ in range(4)][3]


# ---- the ledger ------------------------------------------------------------------------------------------------------


def test_a_run_ends_where_the_budget_does(tmp_path):
    limited = mechanism(epsilon=1.5)
    steps = sum(1 for _ in batches(tmp_path, epsilon=1.5))
    assert limited.spent(steps) <= 1.5 < limited.spent(steps + 1)
    more = batches(tmp_path, epsilon=1.5)
    more.set_state({"step": steps, "epsilon": limited.spent(steps), "delta": 1e-3})
    assert next(more, None) is None


def test_a_step_taken_again_is_the_same_step(tmp_path):
    first = batches(tmp_path)
    taken = [next(first).tolist() for _ in range(5)]
    again = batches(tmp_path)  # after a kill; its last checkpoint was at step 2
    again.set_state({"step": 2, "epsilon": 0.1, "delta": 1e-3})
    assert [next(again).tolist() for _ in range(3)] == taken[2:]
    assert again.epsilon == first.epsilon == mechanism().spent(5)
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 5


def test_elsewhere_it_is_another_and_counts_again(tmp_path):
    first = batches(tmp_path)
    taken = [next(first).tolist() for _ in range(5)]
    moved = batches(tmp_path, here="there")
    moved.set_state({"step": 2, "epsilon": 0.1, "delta": 1e-3})
    assert next(moved).tolist() != taken[2]
    assert moved.epsilon == mechanism().spent(6)
    assert moved.get_state() == {"step": 3, "epsilon": moved.epsilon, "delta": 1e-3}


def test_stages_have_ledgers_of_their_own_and_a_cut_line_is_mended(tmp_path):
    next(batches(tmp_path))
    next(batches(tmp_path, stage="other"))
    with open(tmp_path / "ledger.jsonl", "a") as file:
        file.write('{"stage": "student", "envi')  # killed while writing
    again = batches(tmp_path)
    again.set_state({"step": 1, "epsilon": 0.1, "delta": 1e-3})
    next(again)
    assert again.epsilon == mechanism().spent(2)
    assert len(Ledger(tmp_path, "student", HERE).begun) == 2


# ---- the secret ------------------------------------------------------------------------------------------------------


def test_the_secret_is_the_systems_and_the_owners(tmp_path):
    secret = privacy.open_secret(tmp_path, None)
    assert not secret.is_test and len(secret.value) == 32
    assert stat.S_IMODE(os.stat(tmp_path / "secret").st_mode) == 0o600
    assert privacy.open_secret(tmp_path, None) == secret
    assert privacy.open_secret(tmp_path / "other", None) != secret
    (tmp_path / "secret").write_bytes(b"short")
    with pytest.raises(ConfigError, match="5 bytes, not 32"):
        privacy.open_secret(tmp_path, None)


def test_a_test_seed_is_marked_and_writes_nothing(tmp_path):
    assert privacy.open_secret(tmp_path, 3) == privacy.open_secret(tmp_path, 3) != privacy.open_secret(tmp_path, 4)
    assert privacy.open_secret(tmp_path, 3).is_test
    assert not list(tmp_path.iterdir())


def test_names_do_not_run_together_and_keys_have_64_bits():
    secret = Secret(b"s" * 32, False)
    assert secret.derive("ab", "c") != secret.derive("a", "bc")
    data = np.array([jax.random.key_data(privacy.key_of(secret.derive(str(i)))) for i in range(50)])
    assert (data > 2**31).mean(0) == pytest.approx([0.5, 0.5], abs=0.3)
    assert jax.random.key_data(jax.random.key(2**40 + 1)).tolist() != [2**8, 1], "then integers would do"


def test_the_environment_is_the_same_here_and_now():
    assert privacy.environment() == privacy.environment()
    assert json.loads(json.dumps(privacy.environment())) == privacy.environment()
