"""Plans: what a run holds and needs, exit codes, errors of one line, and a TPU's compiler where it is installed."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from configs import flow_opd, lightning_opd, opd
from experiments import plan, plan_models, plan_steps
from opd_jax import chips, cost, sharding
from opd_jax.chips import CHIPS, Topology
from opd_jax.config import ConfigError


def tiny(only, mesh, **arm):
    config = lightning_opd.get_config("tiny")
    with config.unlocked():
        config.arms = {only: config.arms[only]}
        config.arms[only].update(arm)
        config.mesh = mesh
    return config


def setup(config, where, **changes):
    models = plan_models.student_and_teacher(config, "tiny", "", "")
    with config.unlocked():
        config.compute.update(changes)
    return plan_steps.Setup(config, sharding.make_mesh(dict(config.mesh), where.devices), *models)


def cpus(count, memory=1e9):
    return Topology(CHIPS["h100"]._replace(memory=memory), jax.devices()[:count], False)


def test_public_models_have_the_size_in_their_name():
    billions = {"qwen3-0.6b": 0.6, "qwen3-1.7b": 1.72, "qwen3-4b": 4.02, "qwen3-8b": 8.19, "qwen3-32b": 32.8}
    billions |= {"qwen3-30b-a3b": 30.5, "llama-3-8b": 8.03}
    assert billions.keys() == plan_models.PUBLIC.keys()
    for name, expected in billions.items():
        shapes = plan_steps.shapes_of(plan_models.module_of(name, "--student"), jnp.bfloat16)
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e9 == pytest.approx(expected, rel=0.01)


def test_the_bytes_of_a_device_are_those_of_its_parts():
    config = tiny("online", {"data": 8})
    with config.unlocked():
        config.fsdp = True
    made = setup(config, cpus(8))
    tree = {
        "embed_tokens": {"embedding": jax.ShapeDtypeStruct((64, 32), jnp.bfloat16)},
        "norm": {"scale": jnp.zeros(32)},
    }
    assert plan_steps.bytes_of(made.place(tree)) == 64 * 32 * 2 // 8 + 32 * 4


def test_an_online_arm_fits_or_does_not(capsys, monkeypatch):
    """Every step is compiled and counted once; the table says what is held meanwhile."""
    monkeypatch.setattr(plan, "setup_of", lambda config, mesh: setup(config, where))
    where = cpus(2)
    config = tiny("online", {"data": 2})
    assert plan.plan_run(config, where)
    said = capsys.readouterr().out
    assert "AN ESTIMATE" in said and "whole run" in said and " NO " not in said
    params = setup(config, where).params
    own, taught = (plan_steps.bytes_of(params[name]) for name in ("student", "teacher"))
    found = {one.step.name: one for one in plan.plan_arm(setup(config, where), "online", 8, where)}
    assert list(found) == ["sample", "label", "update"]
    counters = 3 * 4  # of the step, and of Adam and its schedule
    assert found["update"].step.held == taught
    assert found["sample"].step.held == pytest.approx(taught + 3 * own, abs=counters)  # two moments, and the average
    assert found["label"].step.held == pytest.approx(4 * own, abs=counters)
    records = 2 * 2 * (20 + 12)  # of a device: two prompts, two answers each, padded tokens
    assert found["update"].memory.arguments == pytest.approx(4 * own, rel=0.01, abs=32 * records)
    assert found["sample"].step.trips == 12 and found["sample"].step.times == config.opd.steps
    few = [one._replace(needed=2.0) for one in found.values()]
    assert not any(one.fits(1.0) for one in few)
    assert plan.hours(few) == pytest.approx(sum(one.roofline.seconds * 2 for one in few) / 3600)
    assert "dollars" in plan.summary(few, 2, 3.0)


def test_an_offline_arm_has_a_store_to_write():
    config = tiny("lightning", {"data": 2})
    steps = plan_steps.plan(setup(config, cpus(2)), "lightning", stored=10)
    assert [step.name for step in steps] == ["store: sample", "store: label", "store: reference", "update"]
    assert [step.times for step in steps] == [3, 3, 3, config.opd.steps]  # in waves of 4 slots, shards of 4


def test_a_step_that_the_compiler_refuses_says_what_it_needs():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 121.50G of 95.74G hbm. Exceeded"
    assert plan.exhausted(message) == 121.5 * chips.GIB
    message = "E1000: the total memory required for HLO temporaries (210.33G) exceeds available HBM (95.73G)"
    assert plan.exhausted(message) == 210.33 * chips.GIB
    assert plan.exhausted("INTERNAL: another reason") is None


def test_the_last_program_of_a_dump_is_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="no program"):
        plan.dumped(tmp_path)
    (tmp_path / "m.after_optimizations_before_buffer_assignment.txt").write_text("before")
    assert plan.dumped(tmp_path) == "before"
    (tmp_path / "m.after_optimizations.txt").write_text("last")
    assert plan.dumped(tmp_path) == "last"


def test_search_lists_what_fits_by_time(capsys, monkeypatch):
    where = cpus(2)
    monkeypatch.setattr(plan, "setup_of", lambda config, mesh: type("S", (), {"mesh": mesh}))
    config = tiny("online", {"data": -1})

    def steps(made, name, stored):
        parts = config.arms[name].micro_batches
        if made.mesh.shape["data"] == 1 and parts > 2:
            raise ConfigError("no")
        return [(made.mesh.shape["data"], parts)]

    def counted(step, mesh, where):
        data, parts = step
        needed, line = 1.5e9 / parts / data, chips.Roofline(parts / data, 0.0, 0.0)
        one = plan_steps.Step("update", None, 1, 0, 3600, 1, True)
        return plan.Priced(one, None, needed, cost.Cost(0.0, 0.0, {}), line, 0.0)

    monkeypatch.setattr(plan_steps, "plan", steps)
    monkeypatch.setattr(plan, "priced", counted)
    assert plan.search(config, where)
    rows = [line.split("|")[2:7] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["2", "1", "1", "0.700", "0.50"],
        ["1", "2", "2", "0.700", "2.00"],
    ]


def planned(only, **arm):
    return plan_steps.plan(setup(tiny(only, {"data": 2}, **arm), cpus(2)), only, 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: plan_models.module_of("qwen9", "--student"), "--student=qwen9: neither a directory"),
        (lambda: planned("grpo"), "method 'grpo' cannot be planned yet"),
        (lambda: planned("online", micro_batches=4), "records of a micro-batch=1: does not split over 2 devices"),
        (lambda: plan.checked(flow_opd.get_config("tiny"), "h100:2"), "cannot be planned yet"),
        (lambda: plan.checked(opd.get_config("tiny"), None), "no --topology"),
        (lambda: plan_models.student_and_teacher(tiny_paths(), "tiny", "", "qwen3-8b"), "--student='': give"),
    ],
)
def test_mistakes_are_told_in_one_line(wrong, message):
    with pytest.raises(ConfigError) as error:
        wrong()
    assert message in str(error.value) and "\n" not in str(error.value)


def tiny_paths():
    config = tiny("online", {"data": 2})
    with config.unlocked():
        config.problems.path = "problems.jsonl"
    return config


def test_the_command_ends_with_2_after_a_mistake():
    flags = ["--config=configs/vla_opd.py:tiny", "--topology=v5p:4x4x4"]
    done = subprocess.run([sys.executable, "experiments/plan.py", *flags], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: experiment='vla'"), done.stderr
    assert done.stderr.count("\n") == 1


def test_a_step_is_compiled_for_tpus_that_are_not_here():
    pytest.importorskip("libtpu")
    where = chips.topology("v5e:2x2")
    assert len(where.devices) == 4 and where.exact
    config = tiny("online", {"data": 4}, batch_size=4)
    with config.unlocked():
        config.fsdp = True
    made = setup(config, where)
    label = plan_steps.plan(made, "online", 1)[1]
    found = plan.priced(label, made.mesh, where)
    assert found.fits(where.chip.memory) and found.cost.flops > 0 and found.cost.collectives
