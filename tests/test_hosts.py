"""One run in several processes: the same results as in one, a killed process, and resuming with another number."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from opd_jax import hosts
from opd_jax.config import ConfigError
from opd_jax.metrics import read_metrics

ROOT = Path(__file__).parent.parent
DEVICES = 4  # of the whole run
TWO_PHASES = ("--config=configs/scenes_base.py:tiny", "--config.phases=('draw', 'web')", "--config.web.steps=12")


def free_port():
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def start(count, *arguments):
    """A run on four devices as `count` processes."""
    port, flags = free_port(), f"--xla_force_host_platform_device_count={DEVICES // count}"
    flags += " --xla_cpu_multi_thread_eigen=false --xla_cpu_use_fusion_emitters=false"  # the second as `conftest.py`
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    if count == 1:
        environments, several = [environment], []
    else:
        address = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(count)}
        environments, several = (
            [environment | address | {"JAX_PROCESS_ID": str(i)} for i in range(count)],
            ["--distributed"],
        )
    command = [sys.executable, "experiments/main.py", *several, *map(str, arguments)]
    return [
        subprocess.Popen(command, cwd=ROOT, env=own, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for own in environments
    ]


def end(processes, timeout=900):
    """`(exit code, stdout, stderr)` of each."""
    try:
        said = [process.communicate(timeout=timeout) for process in processes]
        return [(process.returncode, *both) for process, both in zip(processes, said)]
    finally:
        for process in processes:
            process.kill()


def run(count, *arguments):
    ended = end(start(count, *arguments))
    assert all(code == 0 for code, _, _ in ended), "\n".join(err[-2000:] for _, _, err in ended)
    return ended


def losses(workdir):
    return {(row["stage"], row["step"]): row["loss"] for row in read_metrics(workdir) if "loss" in row}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run in one process."""
    workdir = tmp_path_factory.mktemp("hosts") / "one"
    run(1, *TWO_PHASES, f"--workdir={workdir}")
    return workdir


# The next test goes on with four, whose losses it compares as well.
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_several_processes_end_as_one(whole, tmp_path, count):
    ended = run(count, *TWO_PHASES, f"--workdir={tmp_path / 'run'}")
    expected, found = losses(whole), losses(tmp_path / "run")
    assert expected.keys() == found.keys()
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
    assert ["| " in out for _, out, _ in ended] == [True] + [False] * (count - 1), "the first alone prints"
    for folder in (".", "stages"):
        there = lambda workdir, folder=folder: {path.name for path in (workdir / folder).iterdir()} - {"compiled"}
        assert there(tmp_path / "run") == there(whole)


def test_a_killed_process_ends_the_job_and_any_number_resumes_it(whole, tmp_path):
    workdir, stage = tmp_path / "run", '"web"'
    processes, log = start(2, *TWO_PHASES, f"--workdir={workdir}"), workdir / "metrics.jsonl"
    limit = time.time() + 300
    while time.time() < limit and not (log.exists() and stage in log.read_text()):
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGKILL)
    (code, _, err), _ = end(processes)
    assert code != 0
    assert "start all again with --resume" in err or "another task died" in err  # ours, or JAX's while it waits
    run(4, *TWO_PHASES, f"--workdir={workdir}", "--resume")
    expected, found = losses(whole), losses(workdir)
    assert expected.keys() == found.keys()
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)


def test_a_mistake_is_said_once_by_every_process(tmp_path):
    (tmp_path / "there").write_text("")
    for code, _, err in end(start(2, *TWO_PHASES, f"--workdir={tmp_path}")):
        assert code == 2
        assert "not empty" in err
        assert "Traceback" not in err


def test_what_is_missing_to_find_each_other_is_said(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(ConfigError, match="JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID not set"):
        hosts.initialize()


def test_one_process_does_everything_itself():
    done = []
    hosts.by_first(lambda: done.append(1))
    hosts.wait("nobody")
    assert done == [1]
    assert hosts.first() and not hosts.several()
    assert hosts.agreed(3) == 3
    with pytest.raises(ConfigError, match="mine"):
        hosts.by_first(lambda: (_ for _ in ()).throw(ConfigError("mine")))
