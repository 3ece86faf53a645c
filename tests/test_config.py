# SPDX-License-Identifier: Apache-2.0
import hashlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from opd_jax import config as config_lib
from opd_jax.config import ConfigError


def example(**changes):
    config = ConfigDict({"seed": 0, "student": {"lr": 1e-3, "width": 8}, "dims": (3, 4), "name": "a"})
    config.update(changes)
    return config.lock()


def test_write_atomic_replaces_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    config_lib.write_atomic(path, "old")
    config_lib.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]
    (tmp_path / "plain").write_text("")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_write_atomic_keeps_the_old_file_when_the_write_fails(tmp_path):
    path = config_lib.write_atomic(tmp_path / "file.txt", "old")
    with pytest.raises(TypeError):
        config_lib.write_atomic(path, 3)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_fingerprint_depends_on_values_and_not_on_order_or_container():
    config = example()
    shuffled = {"name": "a", "dims": [3, 4], "student": {"width": np.int64(8), "lr": 0.001}, "seed": 0}
    assert config_lib.fingerprint(config) == config_lib.fingerprint(shuffled)
    assert config_lib.fingerprint(config.student) != config_lib.fingerprint(config)
    assert config_lib.fingerprint(example(seed=1)) != config_lib.fingerprint(config)
    canonical = b'{"a":1,"b":[2.5,null,true]}'
    assert config_lib.fingerprint({"b": (2.5, None, True), "a": 1}) == hashlib.sha256(canonical).hexdigest()
    with pytest.raises(ConfigError, match="no JSON form"):
        config_lib.fingerprint({"f": print})


def test_save_load_round_trip(tmp_path):
    path = config_lib.save(tmp_path / "config.json", example())
    back = config_lib.load(path)
    assert back.student.lr == 1e-3 and back.dims == [3, 4] and back.is_locked
    assert config_lib.differences(back, example()) == []
    path.write_text("{")
    with pytest.raises(ConfigError, match="cannot read config"):
        config_lib.load(path)


def test_checks_reports_every_mistake_once():
    with pytest.raises(ConfigError) as caught, config_lib.checks() as check:
        check(False, "steps=-1: must be positive")
        if check(True, "never shown"):
            check(False, "lr=0: must be positive")
    assert str(caught.value) == "steps=-1: must be positive\nlr=0: must be positive"
    with config_lib.checks() as check:
        assert check(1, "fine") is True


def test_checks_says_once_what_is_wrong_with_several_arms():
    with pytest.raises(ConfigError) as caught, config_lib.checks() as check:
        for arm in ("a", "b"):
            check(False, f"steps=0 (arm {arm}): give 1 or more")
            check(arm != "b", f"clip=0 (arm {arm}): give more")
    assert str(caught.value) == "steps=0 (arms a, b): give 1 or more\nclip=0 (arm b): give more"


def test_checks_does_not_hide_another_exception():
    with pytest.raises(ZeroDivisionError), config_lib.checks() as check:
        check(False, "line")
        _ = 1 / 0


def test_differences_names_dotted_keys():
    old, new = example(), {"seed": 0, "student": {"lr": 0.01}, "dims": [3, 4], "name": "a", "extra": {}}
    assert config_lib.differences(old, new) == [
        "extra: absent -> {}",
        "student.lr: 0.001 -> 0.01",
        "student.width: 8 -> absent",
    ]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("student.lr", None),
        ("dims[0]", None),
        ("studnt.lr", "did you mean 'student.lr'?"),
        ("student.lrr", "did you mean 'student.lr'?"),
        ("zzz", "the config has dims, name, seed, student"),
        ("student.zzz", "student has lr, width"),
        ("fsdp", "no such key any more; give --config.mesh.data=1 --config.mesh.fsdp=-1"),
        ("student.lr.x", "student.lr is the value 0.001"),
    ],
)
def test_suggest(key, expected):
    message = config_lib.suggest(key, example())
    assert message is None if expected is None else expected in message


MAIN = """
from absl import flags
from ml_collections import config_flags
from opd_jax import config as config_lib
CONFIG = config_flags.DEFINE_config_file("config")
WORKDIR = flags.DEFINE_string("workdir", None, "where")
def main(argv):
    if CONFIG.value.seed < 0:
        raise config_lib.ConfigError("seed=-1: must not be negative\\nname=a: too short")
    print("lr", CONFIG.value.student.lr, CONFIG.value.dims)
if __name__ == "__main__":
    config_lib.run(main)
"""
CONFIG = """
from ml_collections import ConfigDict
def get_config(variant="default"):
    if variant not in ("default", "tiny"):
        raise ValueError(f"variant={variant!r}: choose default or tiny")
    opd = {"rate": 1e-3, "steps": 5, "shuffled": False, "teacher": "expert", "widths": (1,)}
    arms = {"a": {}, "b": {"steps": 7}}
    return ConfigDict({"seed": 0, "student": {"lr": 1e-3}, "dims": (3, 4), "opd": opd, "arms": arms})
"""


def command_line(tmp_path, *args):
    (tmp_path / "main.py").write_text(MAIN)
    (tmp_path / "conf.py").write_text(CONFIG)
    root = Path(config_lib.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "main.py", *args],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_run_accepts_a_good_command_line(tmp_path):
    done = command_line(tmp_path, "--config=conf.py:tiny", "--config.student.lr=1", "--config.dims=(5,6)")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "lr 1.0 (5, 6)\n"


def test_run_prints_one_line_per_mistake_and_exits_2(tmp_path):
    done = command_line(tmp_path, "--config=conf.py", "--config.studnt.lr=1", "--config.sed=3")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: --config.studnt.lr: no key 'studnt' in 'studnt.lr'; did you mean 'student.lr'?",
        "error: --config.sed: no key 'sed' in 'sed'; did you mean 'seed'?",
    ]
    done = command_line(tmp_path, "--config=conf.py", "--config.seed=-1")
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: seed=-1: must not be negative", "error: name=a: too short"]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], "no --config; give one"),
        (["--config=connf.py"], "did you mean conf.py?"),
        (["--config", "connf.py"], "did you mean conf.py?"),
        (["--config=conf.py:wat"], "variant='wat': choose default or tiny"),
        (["--config=conf.py", "--config.student.lr=abc"], "'abc'; give a float, as the default 0.001"),
        (["--config=conf.py", "--config.arms.a.steps=1.5"], "arms.a.steps=1.5: give a value of type int, as opd's 5"),
        (["--config=conf.py", "--config.arms.a.stps=1"], "no key 'stps' in 'arms.a.stps'"),
        (["--config=conf.py", "--config.arms.c.steps=1"], "no key 'c' in 'arms.c.steps'"),
        (["--config=conf.py", "--wrkdir=x"], "Unknown command line flag 'wrkdir'. Did you mean: workdir ?"),
    ],
)
def test_parse_flags_in_this_process(tmp_path, monkeypatch, args, expected):
    from absl import flags
    from ml_collections import config_flags

    (tmp_path / "conf.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    flags.DEFINE_string("workdir", None, "where", flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    monkeypatch.setattr(sys, "argv", ["main.py", *args])  # config_flags looks for overrides there
    with pytest.raises(ConfigError) as caught:
        config_lib.parse_flags(["main.py", *args])
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_an_arm_is_given_what_opd_has(tmp_path, monkeypatch):
    """On the command line; what `opd` and other arms have stays as it is."""
    from absl import flags
    from ml_collections import config_flags

    (tmp_path / "conf.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    own = ("rate=2", "steps=3", "shuffled=true", "teacher=7", "widths=(3,4)")
    args = ["main.py", "--config=conf.py", *(f"--config.arms.a.{one}" for one in own), "--config.arms.b.steps=9"]
    monkeypatch.setattr(sys, "argv", args)
    config_lib.parse_flags(args)
    arms = holder.value.arms.to_dict()
    assert arms == {
        "a": {"rate": 2.0, "steps": 3, "shuffled": True, "teacher": "7", "widths": (3, 4)}, "b": {"steps": 9}
    }  # fmt: skip
    assert isinstance(arms["a"]["rate"], float) and holder.value.opd.steps == 5 and sys.argv == args


def test_a_run_goes_on_with_other_seeds_and_arms_and_not_with_an_arm_that_has_changed(tmp_path):
    config = {"seeds": [0], "only": [], "save_every": 5, "steps": 3, "arms": {"a": {"x": 1}, "b": {"x": 2}}}
    config_lib.prepare_workdir(tmp_path, config, resume=False)
    other = config | {"seeds": [0, 1], "only": ["b", "c"], "save_every": 2, "arms": {"b": {"x": 2}, "c": {"x": 3}}}
    config_lib.prepare_workdir(tmp_path, other, resume=True)
    assert config_lib.load(tmp_path / "config.json").seeds == [0, 1]
    with pytest.raises(ConfigError, match=r"another config \(arms.b.x: 2 -> 9; steps: 3 -> 4\)"):
        config_lib.prepare_workdir(tmp_path, other | {"steps": 4, "arms": {"b": {"x": 9}}}, resume=True)


def test_prepare_workdir_fresh_resume_and_refusals(tmp_path):
    run = tmp_path / "run"
    assert config_lib.prepare_workdir(run, example(), resume=False) == run
    assert json.loads((run / "config.json").read_text())["dims"] == [3, 4]
    assert sorted(p.name for p in run.iterdir()) == ["config.json", "versions.json"]

    with pytest.raises(ConfigError, match="not empty; add --resume"):
        config_lib.prepare_workdir(run, example(), resume=False)
    (run / ".metrics.jsonl.123.tmp").write_text("half")
    config_lib.prepare_workdir(run, example(), resume=True)
    starts = json.loads((run / "versions.json").read_text())
    assert len(starts) == 2 and starts[0]["jax"] and "device" in starts[1] and not list(run.glob(".*"))
    with pytest.raises(ConfigError, match=r"seed: 0 -> 1; student.width: 8 -> 9"):
        config_lib.prepare_workdir(run, example(seed=1, student={"width": 9}), resume=True)
    assert json.loads((run / "config.json").read_text())["seed"] == 0


def test_prepare_workdir_with_resume_starts_an_empty_folder_but_not_a_foreign_one(tmp_path):
    config_lib.prepare_workdir(tmp_path / "new", example(), resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        config_lib.prepare_workdir(tmp_path / "other", example(), resume=True)


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/opd"])
def test_prepare_workdir_refuses_a_file_and_what_cannot_be_written(tmp_path, where):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ConfigError, match=r"--workdir=.*; give (another|the path of a) folder"):
        config_lib.prepare_workdir(tmp_path / where, example(), resume=False)
    assert (tmp_path / "file").read_text() == "kept"


def test_only_the_named_arms_are_kept():
    config = ConfigDict({"only": (), "arms": {"a": {}, "b": {"x": 1}, "c": {}}}).lock()
    config_lib.keep_arms(config)
    assert list(config.arms) == ["a", "b", "c"]
    config.only = ("c", "b")
    config_lib.keep_arms(config)
    assert set(config.arms) == {"b", "c"} and config.arms.b.x == 1 and config.is_locked
    config.only = ("d",)
    with pytest.raises(ConfigError, match="there is no arm 'd'; choose of b, c"):
        config_lib.keep_arms(config)
    config_lib.keep_arms(ConfigDict({"seed": 0}))


def test_a_command_is_legible_and_means_the_same():
    argv = ["main.py", "--config.only=('a', 'b')", "--workdir=my runs", "a'$b", "plain"]
    said = config_lib.command_line(argv)
    assert said.startswith("python main.py \"--config.only=('a', 'b')\" '--workdir=my runs' ")
    assert shlex.split(said) == ["python", *argv]
