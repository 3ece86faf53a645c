# SPDX-License-Identifier: Apache-2.0
import io
import json
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import metrics as metrics_lib
from opd_jax.metrics import MetricsWriter, Stopwatch, read_metrics
from opd_jax.types import Method


def test_lines_hold_stage_step_seconds_and_metrics(tmp_path):
    with MetricsWriter(tmp_path, 2, "distill") as writer:
        writer.write(0, {"loss": jnp.float32(0.1), "tokens": jnp.int32(7), "quantiles": jnp.array([0.25, 0.5])})
        writer.write(1, {"loss": jnp.bfloat16(2), "half": 0.5})
    first, second = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    seconds = first.pop("seconds")
    assert first == {"stage": "distill", "step": 0, "loss": 0.1, "tokens": 7, "quantiles": [0.25, 0.5]}
    assert second["loss"] == 2.0 and second["half"] == 0.5 and 0 <= seconds <= second["seconds"] < 60


def test_metrics_are_written_one_step_late_and_flushed(tmp_path):
    writer = MetricsWriter(tmp_path, 10, "sft")
    writer.write(0, {"loss": 1.0})
    assert read_metrics(tmp_path) == []
    writer.write(1, {"loss": 2.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [0]
    writer.flush()
    writer.flush()
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]
    writer.close()


def test_resume_drops_repeated_steps_of_its_stage_only(tmp_path):
    with MetricsWriter(tmp_path, 4, "sft") as writer:
        for step in range(4):
            writer.write(step, {"loss": 1.0})
    with MetricsWriter(tmp_path, 4, "distill") as writer:
        for step in range(3):
            writer.write(step, {"loss": 2.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "distill", "step": 3, "lo')  # killed in the middle of a line
    with MetricsWriter(tmp_path, 4, "distill", start=2) as writer:
        assert [row["step"] for row in read_metrics(tmp_path, "distill")] == [0, 1]
        for step in (2, 3):
            writer.write(step, {"loss": 3.0})
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path, "distill")] == [(0, 2), (1, 2), (2, 3), (3, 3)]
    assert len(read_metrics(tmp_path, "sft")) == 4
    seconds = [row["seconds"] for row in read_metrics(tmp_path, "distill")]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("bad", [np.nan, np.inf, [1.0, -np.inf]])
def test_not_finite_stops_with_step_metric_and_checkpoint(tmp_path, bad):
    writer = MetricsWriter(tmp_path, 10, "distill", last_good=lambda: 40)
    writer.write(41, {"loss": 1.0})
    writer.write(42, {"loss": 1.0, "grad_norm": jnp.array(bad)})
    with pytest.raises(FloatingPointError, match=r"distill step 42: grad_norm = .*last good checkpoint: 40"):
        writer.write(43, {"loss": 1.0})
    writer.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [41]


def test_an_exception_of_the_loop_is_not_replaced_by_the_guard(tmp_path):
    with pytest.raises(KeyError), MetricsWriter(tmp_path, 10, "distill") as writer:
        writer.write(0, {"loss": np.nan})
        raise KeyError("the loop's own")


def test_tensorboard_gets_the_same_scalars(tmp_path):
    pytest.importorskip("tensorboardX", reason="the tensorboard extra is optional")
    with MetricsWriter(tmp_path, 1, "distill") as writer:
        writer.write(0, {"loss": 1.0, "quantiles": np.array([0.25, 0.5])})
    content = next((tmp_path / "tensorboard" / "distill").iterdir()).read_bytes()
    assert b"loss" in content and b"quantiles/1" in content


def test_without_tensorboard_there_is_still_jsonl(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # import raises ImportError
    with MetricsWriter(tmp_path, 1, "distill") as writer:
        writer.write(0, {"loss": 1.0})
    assert not (tmp_path / "tensorboard").exists() and len(read_metrics(tmp_path)) == 1


def test_plain_lines_first_last_and_every_ten_seconds(tmp_path, capfd, monkeypatch):
    with MetricsWriter(tmp_path, 50, "distill") as writer:
        for step in range(50):
            writer.write(step, {"loss": 0.5, "other": 1.0})
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "distill  step 1/50  loss 0.5"
    assert len(lines) == 2 and lines[1].startswith("distill  step 50/50  loss 0.5  ")
    assert lines[1].endswith(" steps/s  0.0 s left")
    monkeypatch.setattr(metrics_lib, "PLAIN_LINE_EVERY", 0.0)
    with MetricsWriter(tmp_path, 50, "again", start=20) as writer:
        for step in range(20, 30):
            writer.write(step, {"loss": 0.5})
    assert len(capfd.readouterr().err.splitlines()) == 10


def test_a_terminal_gets_a_bar(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with MetricsWriter(tmp_path, 4, "distill", start=2) as writer:
        for step in (2, 3):
            writer.write(step, {"loss": 0.25})
    shown = sys.stderr.getvalue()
    assert "distill" in shown and "4/4" in shown and "loss=0.25" in shown


def test_format_seconds():
    spoken = [metrics_lib.format_seconds(s) for s in (8.26, 245, 59.99, 3600 * 2 + 7 * 60 + 1)]
    assert spoken == ["8.3 s", "4 min 05 s", "60.0 s", "2 h 07 min"]


def test_stopwatch_waits_adds_up_and_laps():
    def label(x):
        time.sleep(0.03)
        return x + 1

    watch = Stopwatch()
    method = watch.wrap(Method(sample=jnp.sin, label=label, update=jnp.cos))
    assert float(method.label(jnp.float32(1))) == 2 and float(method.label(1)) == 2
    lap = watch.take()
    assert lap.keys() == {"seconds/label"} and lap["seconds/label"] >= 0.06
    method.sample(jnp.float32(0))
    second = watch.take()
    assert second["seconds/label"] == 0 and second["seconds/sample"] > 0
    assert watch.total["label"] == pytest.approx(lap["seconds/label"])


def test_peak_memory_grows_and_is_in_bytes():
    before = metrics_lib.peak_memory()
    held = np.ones(30_000_000)  # 240 MB
    after = metrics_lib.peak_memory()
    assert before > 50e6 and after >= before and after > 200e6 and held[0] == 1
