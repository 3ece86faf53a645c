"""Whole programs in their own processes: kill and resume, wrong input. (`.ci/run` runs the `tiny` of every config.)"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opd_jax import config as config_lib

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
BASE = "--config=configs/scenes_base.py:tiny"
STEPS = 20  # of a phase, each saved
LONGER = (*(f"--config.{phase}.steps={STEPS}" for phase in ("draw", "web", "crawl")), "--config.save_every=1")


def start(*arguments, script="experiments/main.py", compiled=None):
    """A program in its own process, compiled as a user's is; or, where `compiled` is a folder, as in tests.

    There it keeps its compiled programs for the next one, unless the environment names one folder for all.
    """
    command, environment = [sys.executable, script, *map(str, arguments)], ENVIRONMENT
    if compiled is not None:
        environment = environment | {"XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false"}
        keep_all = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1", "JAX_COMPILATION_CACHE_DIR": str(compiled)}
        environment = keep_all | environment
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run(*arguments, **how):
    process = start(*arguments, **how)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def refused(*arguments, script="experiments/main.py"):
    """One line with what is wrong, exit code 2, no traceback."""
    code, _, err = run(*arguments, script=script)
    assert code == 2, err[-2000:]
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert lines, err
    return "\n".join(lines)


@pytest.fixture(scope="module")
def base_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("base") / "run"
    code, _, err = run(BASE, f"--workdir={workdir}", *LONGER)
    assert code == 0, err[-2000:]
    return workdir


def sha(workdir):
    return json.loads((workdir / "summary.json").read_text())["params_sha256"]


def test_a_run_leaves_what_it_promises(base_run):
    names = {path.name for path in base_run.iterdir()}
    assert {"config.json", "versions.json", "metrics.jsonl", "summary.json", "stages"} <= names
    lines = [json.loads(line) for line in (base_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["stage"] == "draw"] == list(range(STEPS))
    assert {"loss", "weight", "gradient_norm", "peak_memory"} <= lines[-1].keys()


def kill_in(stage, process, workdir):
    """SIGKILL as soon as a stage writes its first metrics."""
    log, limit = workdir / "metrics.jsonl", time.time() + 300
    while time.time() < limit and not (log.exists() and f'"{stage}"' in log.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_is_bit_identical(base_run, tmp_path):
    """SIGKILL among the first steps, then at random moments, start-up and writes included, until a run gets through."""
    seconds = json.loads((base_run / "summary.json").read_text())["seconds"]["total"]  # without start-up
    workdir, chance = tmp_path / "run", random.Random(1)
    kill_in("draw", start(BASE, f"--workdir={workdir}", "--resume", *LONGER), workdir)
    for attempt in range(4):
        process = start(BASE, f"--workdir={workdir}", "--resume", *LONGER)
        patience = chance.uniform(0.2, 0.9) * seconds if attempt < 3 else 300
        try:
            process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            continue
        assert process.returncode == 0
        break
    assert sha(workdir) == sha(base_run)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for stage in ("draw", "web", "crawl"):
        steps = [line["step"] for line in lines if line["stage"] == stage]
        assert steps == list(range(STEPS)), "no step is missing or written twice"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "killed_in"),
    [
        ("flow_opd", ("grpo_ocr", "flow_opd_seed0")),
        ("lightning_opd", ("rollouts_own_own_seed0", "lightning_seed0")),
    ],
)
def test_killed_between_and_within_stages(tmp_path, name, killed_in):
    """The many-stage runs: killed as soon as a given stage writes its first metrics, then resumed."""
    config = f"--config=configs/{name}.py:tiny"
    compiled, workdir = tmp_path / "compiled", tmp_path / "run"
    code, _, err = run(config, f"--workdir={tmp_path / 'whole'}", compiled=compiled)
    assert code == 0, err[-2000:]
    for stage in killed_in:
        kill_in(stage, start(config, f"--workdir={workdir}", "--resume", compiled=compiled), workdir)
    code, _, err = run(config, f"--workdir={workdir}", "--resume", compiled=compiled)
    assert code == 0, err[-2000:]
    whole, resumed = (json.loads((w / "summary.json").read_text()) for w in (tmp_path / "whole", workdir))
    assert resumed["params_sha256_of"] == whole["params_sha256_of"]


def test_wrong_keys_and_values_are_refused_before_anything(tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    assert "learning_rate" in refused(BASE, workdir, "--config.draw.learning_rat=1")
    assert "12.5" in refused(BASE, workdir, "--config.batch_size=12.5")
    assert "15" in refused(BASE, workdir, "--config.batch_size=15")
    assert "tinny" in refused("--config=configs/scenes_base.py:tinny", workdir)
    assert "no_such" in refused("--config=configs/no_such.py", workdir)
    assert not (tmp_path / "run").exists()


def test_all_errors_of_a_config_at_once(tmp_path):
    lines = refused(
        "--config=configs/flow_opd.py:tiny",
        f"--workdir={tmp_path / 'run'}",
        "--config.anchor=beauty",
        "--config.grpo.flow_grpo.window=99",
        "--config.opd.weighting=heavy",
    )
    assert all(value in lines for value in ("beauty", "99", "heavy"))


def test_a_workdir_with_something_in_it_is_not_touched(base_run, tmp_path):
    before = sha(base_run)
    assert "--resume" in refused(BASE, f"--workdir={base_run}")
    assert "steps" in refused(BASE, f"--workdir={base_run}", "--resume", *LONGER, "--config.draw.steps=7")
    assert sha(base_run) == before
    (tmp_path / "file").write_text("mine")
    assert str(tmp_path / "file") in refused(BASE, f"--workdir={tmp_path / 'file'}")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_unwritable_workdir_is_named():
    assert "/proc/opd" in refused(BASE, "--workdir=/proc/opd")


def test_sample_draws_a_grid(base_run, tmp_path):
    out = tmp_path / "grid.png"
    code, _, err = run(
        base_run, "two red circles left of a blue square", "--count=4", "--steps=2", f"--out={out}", "--stage=web",
        script="experiments/sample.py",
    )  # fmt: skip
    assert code == 0, err[-2000:]
    assert out.read_bytes().startswith(b"\x89PNG")


def test_sample_refuses_what_it_cannot_draw(base_run, tmp_path):
    draw = lambda *arguments: refused(*arguments, script="experiments/sample.py")
    assert "purple" in draw(base_run, "a purple circle")
    assert "nothing" in draw(base_run, "a red circle", "--stage=nothing")
    assert str(tmp_path) in draw(tmp_path, "a red circle")
    for name, settings, says in (
        ("dp", {"experiment": "dp"}, "is a run of dp; pictures are drawn of one of flow_opd or scenes_base"),
        ("early", {"experiment": "flow_opd", "model": {"num_layers": 1}}, "has made no stage yet"),
    ):
        config_lib.save(tmp_path / name / "config.json", settings)
        assert says in draw(tmp_path / name, "a red circle")
