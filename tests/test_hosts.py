"""One run in several processes: how they find each other, the results of one, a killed process, and resuming."""

import contextlib
import functools
import itertools
import json
import os
import random
import shutil
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

exhaustive = functools.partial(pytest.param, marks=pytest.mark.exhaustive)
ROOT = Path(__file__).parent.parent
DEVICES = 4  # of the whole run
MAIN = "experiments/main.py"
# Of two processes each has half of every matrix, and of four a quarter; records are split as well.
LANGUAGE = ("--config=configs/opd.py:tiny", "--config.only=('online',)", "--config.sft.steps=0")
LANGUAGE += ("--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
LANGUAGE += ("--config.opd.steps=12", "--config.save_every=3")
# Two stages of a flow, of which every process has all parameters.
SCENES = ("--config=configs/scenes_base.py:tiny", "--config.phases=('draw', 'web')")
PROGRAMS = {"language": LANGUAGE, "scenes": SCENES}


def free_port(first=20_000):
    """A port that nobody listens at, of `first` and the 4,095 behind it."""
    while True:
        with socket.socket() as listening, contextlib.suppress(OSError):
            listening.bind(("localhost", port := first + random.randrange(4096)))
            return port


def explicit(count):
    """The environments of `count` processes that are told all."""
    address = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": str(count)}
    return [address | {"JAX_PROCESS_ID": str(i)} for i in range(count)]


def slurm(count):
    """As `srun --ntasks-per-node=COUNT` sets them. The job's number decides on the port that JAX takes."""
    job = {"SLURM_JOB_ID": str(free_port(61440) - 61440), "SLURM_STEP_NODELIST": "localhost"}
    job |= {"SLURM_NTASKS": str(count), "SLURM_STEP_NUM_NODES": "1"}
    return [job | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(count)]


def open_mpi(count):
    """As mpirun of Open MPI 4 sets them."""
    uri = f"{(free_port(61440) - 61440) * 4096}.0;tcp://127.0.0.1:34911"
    world = {"OMPI_MCA_orte_hnp_uri": uri, "OMPI_COMM_WORLD_SIZE": str(count), "OMPI_COMM_WORLD_LOCAL_SIZE": str(count)}
    return [world | {"OMPI_COMM_WORLD_RANK": str(i), "OMPI_COMM_WORLD_LOCAL_RANK": str(i)} for i in range(count)]


def open_mpi_5(count):
    """Without what JAX finds the address by, which is given; and inside a job of SLURM, whose task is the script."""
    address = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}"}
    address |= {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    return [{k: v for k, v in own.items() if "uri" not in k} | address for own in open_mpi(count)]


def start(count, *arguments, program=MAIN, launcher=explicit):
    """A program on four devices as `count` processes."""
    flags = f"--xla_force_host_platform_device_count={DEVICES // count}"
    flags += " --xla_cpu_multi_thread_eigen=false --xla_cpu_use_fusion_emitters=false"  # the second as `conftest.py`
    shared = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    environments = [{}] if count == 1 else launcher(count)
    distributed = ["--distributed"] if count > 1 and program == MAIN else []
    command = [sys.executable, *program.split(), *distributed, *map(str, arguments)]
    return [
        subprocess.Popen(command, cwd=ROOT, env=shared | own, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
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


def run(count, *arguments, **how):
    ended = end(start(count, *arguments, **how))
    assert all(code == 0 for code, _, _ in ended), "\n".join(err[-2000:] for _, _, err in ended)
    return ended


def losses(workdir):
    return {(row["stage"], row["step"]): row["loss"] for row in read_metrics(workdir) if "loss" in row}


def assert_same_losses(workdir, expected):
    expected, found = losses(expected), losses(workdir)
    assert len(found) == 12 and expected.keys() == found.keys()
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)


# ---- how they find each other ----------------------------------------------------------------------------------------

LAUNCHERS = {"explicit": explicit, "slurm": slurm, "open mpi": open_mpi, "open mpi 5": open_mpi_5}


def rows_of(count, launcher=None):
    """What each process says of itself, and of its rows of batches of eight."""
    ended = run(count, program="tests/hosts_rows.py", launcher=launcher)
    return [json.loads(out.splitlines()[-1]) for _, out, _ in ended]


@pytest.fixture(scope="module")
def alone():
    (said,) = rows_of(1)
    return said["meshes"]


@pytest.mark.parametrize("count", [2, exhaustive(4)])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_processes_join_and_split_every_batch(alone, launcher, count):
    """Their rows have nothing in common, and together are the batch of one process."""
    said = rows_of(count, LAUNCHERS[launcher])
    assert [(one["process"], one["count"], one["devices"]) for one in said] == [(i, count, 4) for i in range(count)]
    for mesh, expected in enumerate(alone):
        for batch, whole in enumerate(expected):
            parts = [one["meshes"][mesh][batch] for one in said]
            assert [len(part) for part in parts] == [8 // count] * count
            assert list(itertools.chain(*parts)) == whole
            assert len({index for index, *_ in whole}) == 8, "no record is in a batch twice"
        assert {index for batch in expected for index, *_ in batch} == set(range(16)), "an epoch leaves none out"


@pytest.mark.skipif(not shutil.which("mpirun"), reason="Open MPI is not installed")
def test_mpirun_starts_a_run(alone):
    how = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "tests/hosts_rows.py"]
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    out = subprocess.run(how, cwd=ROOT, env=os.environ | flags, text=True, capture_output=True, check=True).stdout
    said = sorted((json.loads(line) for line in out.splitlines()), key=lambda one: one["process"])
    assert [said[0]["meshes"][0][batch] + said[1]["meshes"][0][batch] for batch in (0, 1)] == alone[0]


GPUS = {  # environment of a process, and which GPUs of those that it sees are its own; []: all
    "one of each host": ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_NODES": "4", "SLURM_LOCALID": "0"}, []),
    "one of eight": ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_NODES": "1", "SLURM_LOCALID": "3"}, [3]),
    "bound": ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_NODES": "1", "SLURM_LOCALID": "3", "SLURM_GPUS_PER_TASK": "1"}, []),
    "sees one": ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8", "CUDA_VISIBLE_DEVICES": "3"}, []),
    "sees all": ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, [5]),
    "alone": ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, []),
    "mpirun binds none": ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8", "SLURM_GPUS_PER_TASK": "1"}, [5]),
    "said": ({"SLURM_NTASKS": "8", "SLURM_LOCALID": "3", "JAX_LOCAL_DEVICE_IDS": "6,7"}, None),
    "by hand": ({"JAX_PROCESS_ID": "1", "SLURM_NTASKS": "8", "SLURM_LOCALID": "3"}, None),
    "of no launcher": ({}, None),
}


@pytest.mark.parametrize("case", GPUS)
def test_which_gpus_are_its_own(case, monkeypatch):
    given, expected = GPUS[case]
    if "SLURM_NTASKS" in given:
        given = given | {"SLURM_PROCID": "3"}
    elif given:
        given = given | {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "5"}
    for name in (*hosts.EXPLICIT, *sum(hosts.LAUNCHERS, ()), "SLURM_GPUS_PER_TASK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert hosts.gpus() == expected


def test_jax_is_told_which_gpus_a_process_has():
    one_each = lambda count: [own | {"SLURM_STEP_NUM_NODES": str(count)} for own in slurm(count)]
    assert [one["gpus"] for one in rows_of(2, one_each)] == ["all", "all"]
    assert [one["gpus"] for one in rows_of(2, slurm)] == ["0", "1"]


def test_what_is_missing_to_find_each_other_is_said(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(ConfigError, match="JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID not set"):
        hosts.initialize()


# ---- what they do together -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(program, count)`: the folder of its run, and what the processes said."""

    @functools.cache
    def of(program, count):
        workdir = tmp_path_factory.mktemp("hosts") / "run"
        return workdir, run(count, *PROGRAMS[program], f"--workdir={workdir}")

    return of


@pytest.mark.parametrize(
    ("program", "count"), [("language", 2), exhaustive("language", 4), exhaustive("scenes", 2), exhaustive("scenes", 4)]
)
def test_several_processes_end_as_one(made, program, count):
    (whole, _), (workdir, ended) = made(program, 1), made(program, count)
    assert_same_losses(workdir, whole)
    assert ["| " in out for _, out, _ in ended] == [True] + [False] * (count - 1), "the first alone prints"
    for folder in (".", "stages"):
        there = lambda workdir, folder=folder: {path.name for path in (workdir / folder).iterdir()} - {"compiled"}
        assert there(workdir) == there(whole)


STOPPED = 3  # updates that are in the checkpoint


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """`killed(victim)`: the folder of a run of two processes, one of which was killed behind a checkpoint."""

    @functools.cache
    def of(victim):
        workdir = tmp_path_factory.mktemp("killed") / "run"
        processes, limit = start(2, *LANGUAGE, f"--workdir={workdir}"), time.time() + 600
        while time.time() < limit and not list(workdir.glob(f"checkpoints/*/{STOPPED}")):
            time.sleep(0.02)
        processes[victim].send_signal(signal.SIGKILL)
        began, (code, _, err) = time.time(), end(processes)[1 - victim]
        return workdir, code, err, time.time() - began

    return of


def by_process(paths):
    """Files of a checkpoint by the number of the process that has written them."""
    found = {}
    for path in paths:
        found.setdefault(path.parent.parent.name.rpartition("_")[2], []).append(path)
    return found


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_job(killed, victim):
    """The first, by which the others find each other, or another."""
    workdir, code, err, seconds = killed(victim)
    assert code != 0 and seconds < 2 * hosts.HEARTBEAT
    assert "start all again with --resume" in err or "another task died" in err  # ours, or JAX's while it waits
    assert not (workdir / "summary.json").exists()
    written = workdir.glob(f"checkpoints/*/{STOPPED}/state/ocdbt.process_*/d/*")
    sizes = {i: sum(path.stat().st_size for path in paths) for i, paths in by_process(written).items()}
    assert sizes.keys() == {"0", "1"} and max(sizes.values()) < 2 * min(sizes.values()), "each has written its half"


@pytest.mark.parametrize(("victim", "count"), [(1, 1), (1, 4), (0, 2)])
def test_any_number_resumes_what_two_have_saved(made, killed, tmp_path, victim, count):
    workdir = tmp_path / "run"
    shutil.copytree(killed(victim)[0], workdir)
    before = read_metrics(workdir)[:STOPPED]
    run(count, *LANGUAGE, f"--workdir={workdir}", "--resume")
    assert read_metrics(workdir)[:STOPPED] == before, "goes on from the checkpoint, and does not begin again"
    assert_same_losses(workdir, made("language", 1)[0])
    if count == 2:
        assert losses(workdir) == losses(made("language", 2)[0]), "the same bits"
        sha256 = lambda workdir: json.loads((workdir / "summary.json").read_text())["params_sha256"]
        assert sha256(workdir) == sha256(made("language", 2)[0])


def test_a_mistake_is_said_once_by_every_process(tmp_path):
    (tmp_path / "there").write_text("")
    for code, _, err in end(start(2, *SCENES, f"--workdir={tmp_path}")):
        assert code == 2
        assert "not empty" in err
        assert "Traceback" not in err


def test_one_process_does_everything_itself():
    done = []
    hosts.by_first(lambda: done.append(1))
    hosts.wait("nobody")
    assert done == [1]
    assert hosts.first() and not hosts.several()
    assert hosts.agreed(3) == 3
    with pytest.raises(ConfigError, match="mine"):
        hosts.by_first(lambda: (_ for _ in ()).throw(ConfigError("mine")))
