# SPDX-License-Identifier: Apache-2.0
"""What happens to a config before step 0: overrides parsed, values checked, the working folder claimed and described.

Everything a user can get wrong here is a `ConfigError`: one line per mistake, with the value and the remedy, and exit
code 2 from `run`. A traceback is left for mistakes that are ours.
"""

import ast
import contextlib
import difflib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

Config = ConfigDict | Mapping[str, Any]
MOVED = {  # keys of former configs, and what says the same now
    "fsdp": "--config.mesh.data=1 --config.mesh.fsdp=-1",
    "mesh.model": "--config.mesh.tensor",
}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "ml_collections")


class ConfigError(ValueError):
    """A mistake in a config, a flag or a path: every line of the message names a value and its remedy."""


# ---- files -----------------------------------------------------------------------------------------------------------


def write_atomic(path: str | os.PathLike, data: bytes | str | Iterable[bytes], mode: int = 0o666) -> Path:
    """Writes a file whole or not at all: readers, and runs killed at any moment, see the old content or the new.

    Of several processes of one run the first alone writes; the others read after `hosts.wait`.

    Args:
        path: the file; its folder is created when missing.
        data: bytes, as one or piece by piece, or text that is stored as UTF-8.
        mode: of the file, less the umask; never wider, not even for a moment.

    Returns:
        The path written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if jax.process_index():
        return path
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same folder, so that the replacement is a rename
    try:
        with open(temporary, "wb", opener=functools.partial(os.open, mode=mode)) as file:
            file.writelines([data.encode()] if isinstance(data, str) else [data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def to_json(obj: Any) -> Any:
    """The same value in JSON's types: what `config.json` holds, and what two configs are compared by.

    Raises:
        ConfigError: a value has no JSON form, such as a function; configs hold numbers, strings and their containers.
    """
    if isinstance(obj, ConfigDict):
        return to_json(obj.to_dict())  # resolves field references
    if isinstance(obj, Mapping):
        return {str(key): to_json(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [to_json(value) for value in obj]
    if isinstance(obj, set | frozenset):
        return sorted(to_json(value) for value in obj)
    if isinstance(obj, np.generic):
        return obj.item()
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    if obj is None or isinstance(obj, bool | int | float | str):
        return obj
    raise ConfigError(f"{obj!r} of type {type(obj).__name__} has no JSON form; configs hold numbers, strings and lists")


def save(path: str | os.PathLike, config: Config) -> Path:
    """Writes a config as readable JSON, atomically."""
    return write_atomic(path, json.dumps(to_json(config), indent=2) + "\n")


def load(path: str | os.PathLike) -> ConfigDict:
    """Reads what `save` wrote, as a locked ConfigDict. JSON has no tuples: they come back as lists.

    Raises:
        ConfigError: the file is missing or is not JSON.
    """
    try:
        return ConfigDict(json.loads(Path(path).read_text())).lock()
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read config {path}: {error}; give the config.json of a finished run") from error


def fingerprint(obj: Any) -> str:
    """SHA-256 of a config or a part of one, in hexadecimal: the same for the same values in any order of keys.

    Names the result of a stage, so that a stage whose settings did not change is looked up and not run again.

    Returns:
        64 hexadecimal digits. Lists equal tuples; `1` differs from `1.0`, and -0.0 from 0.0.
    """
    return hashlib.sha256(json.dumps(to_json(obj), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# ---- values ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def checks() -> Iterator[Callable[[Any, str], bool]]:
    """Collects every mistake and raises them together, so that a user mends a config once.

    ```
    with checks() as check:
        check(config.steps > 0, f"steps={config.steps}: must be positive")
        if check(config.mesh.data > 0, f"mesh.data={config.mesh.data}: must be positive"):
            check(config.batch_size % config.mesh.data == 0, ...)
    ```

    Raises:
        ConfigError: at the end of the block when any condition was false; one line each, in order.
    """
    lines: list[str] = []

    def check(ok: Any, line: str) -> bool:
        if not ok:
            lines.append(line)
        return bool(ok)

    yield check
    if lines:
        raise ConfigError("\n".join(_merged(lines)))


def _merged(lines: Sequence[str]) -> list[str]:
    """Lines that differ by the arm alone that they are about, `(arm NAME)` or `arm NAME:`, as one of all these arms."""
    arms: dict[str, list[str]] = {}
    for line in lines:
        of = re.search(r"\barm (\w+)(?=[):])", line)
        arms.setdefault(line.replace(of[0], "arm *") if of else line, []).extend([of[1]] if of else [])
    named = lambda names: f"arm{'s' * (len(names) > 1)} {', '.join(names)}"
    return [line.replace("arm *", named(names)) for line, names in arms.items()]


def differences(old: Config, new: Config) -> list[str]:
    """Dotted keys whose values differ between two configs, in alphabetical order, as `a.b: old -> new`."""
    old, new = (dict(_leaves(to_json(config))) for config in (old, new))
    missing = object()

    def show(config: dict, key: str) -> str:
        return json.dumps(config[key]) if key in config else "absent"

    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key, missing) != new.get(key, missing)]
    return [f"{key}: {show(old, key)} -> {show(new, key)}" for key in changed]


def suggest(key: str, config: Config) -> str | None:
    """What is wrong with a dotted key, or None when the config has it.

    Returns:
        One line, such as `no key 'studnt' in studnt.lr; did you mean 'student.lr'?`.
    """
    if key in MOVED:
        return f"there is no such key any more; give {MOVED[key]}"
    node, path = config, []
    parts = re.sub(r"\[\d+\]", "", key).split(".")
    for part in parts:
        if not isinstance(node, ConfigDict | Mapping):
            return f"no key {key!r}: {'.'.join(path)} is the value {node!r}; set it by {'.'.join(path)}=..."
        if part not in node:
            keys = sorted(map(str, node))
            near = difflib.get_close_matches(part, keys, n=1)
            where = ".".join(path) or "the config"
            rest = parts[len(path) + 1 :]
            remedy = f"did you mean {'.'.join([*path, *near, *rest])!r}?" if near else f"{where} has {', '.join(keys)}"
            return f"no key {part!r} in {key!r}; {remedy}"
        node, path = node[part], [*path, part]
    return None


def keep_arms(config: ConfigDict) -> None:
    """Leaves of `config.arms` those that `config.only` names; all where it names none, or there are no arms.

    Raises:
        ConfigError: a name that no arm has.
    """
    names = config.get("only", ())
    if not names:
        return
    if unknown := [name for name in names if name not in config.arms]:
        raise ConfigError(f"only={tuple(names)}: there is no arm {unknown[0]!r}; choose of {', '.join(config.arms)}")
    with config.unlocked():
        config.arms = {name: config.arms[name] for name in names}


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, node


# ---- the command line ------------------------------------------------------------------------------------------------


def load_config(spec: str) -> ConfigDict:
    """The config of `configs/flow_opd.py:tiny`: the file's `get_config("tiny")`, locked.

    Raises:
        ConfigError: no such file, no `get_config` in it, or a variant that it does not know.
    """
    path, _, variant = spec.partition(":")
    if not Path(path).is_file():
        folder = Path(path).parent
        near = difflib.get_close_matches(path, map(str, folder.glob("*.py")), n=1)
        remedy = f"did you mean {near[0]}?" if near else "give the path of a file with get_config()"
        raise ConfigError(f"no config file {path!r}; {remedy}")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} defines no get_config(variant); --config takes a file that does")
    try:
        config = module.get_config(*([variant] if variant else []))
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{spec}: {' '.join(map(str, error.args))}") from error
    return config.lock()


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line as absl does, with one line per mistake in place of a traceback.

    Raises:
        ConfigError: an unknown flag, config key, file or variant, or a value of the wrong type.
    """
    argv = list(argv)
    for i in range(len(argv) - 1, 0, -1):  # `--config FILE` is `--config=FILE`
        if argv[i - 1] in ("--config", "-config"):
            argv[i - 1 : i + 1] = [f"--config={argv[i]}"]
    if any(arg.lstrip("-").startswith("help") for arg in argv[1:]):
        return app.parse_flags_with_usage(argv)
    if "config" not in flags.FLAGS:  # a program that takes no config, such as experiments/sample.py
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            raise ConfigError(str(error).strip().splitlines()[-1]) from error
    spec = next((arg.partition("=")[2] for arg in argv if re.match(r"--?config=", arg)), None)
    if spec is None:
        raise ConfigError("no --config; give one, such as --config=configs/flow_opd.py:tiny")
    config = load_config(spec)
    of_arms = {arg: own for arg in argv if (own := _of_arm(arg, config))}
    argv = [arg for arg in argv if arg not in of_arms]
    keys = [match[1] for arg in argv if (match := re.match(r"--?config\.([^=]+)", arg))]
    with checks() as check:
        for key in keys:
            message = suggest(key, config)
            check(message is None, f"--config.{key}: {message}")
    whole, sys.argv = sys.argv, argv  # where config_flags looks for what it is to override
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        raise ConfigError(_describe(error, config)) from error
    finally:
        sys.argv = whole
    for arm, key, value in of_arms.values():
        with flags.FLAGS.config.unlocked():
            flags.FLAGS.config.arms[arm][key] = value
    return rest


def _of_arm(arg: str, config: ConfigDict) -> tuple[str, str, Any] | None:
    """Arm, key and value of `--config.arms.ARM.KEY=VALUE`, where `opd` has the key and the arm, so far, has not.

    Raises:
        ConfigError: a value of another type than that of `opd`.
    """
    match = re.match(r"--?config\.arms\.(\w+)\.(\w+)=(.*)", arg, re.DOTALL)
    arms, opd = config.get("arms", {}), config.get("opd", {})
    if not match or match[1] not in arms or match[2] in arms[match[1]] or match[2] not in opd:
        return None
    arm, key, text = match.groups()
    default, value = opd[key], text
    if not isinstance(default, str):
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    value = float(value) if isinstance(default, float) and type(value) is int else value
    if default is not None and type(value) is not type(default):
        kind = type(default).__name__
        raise ConfigError(f"--config.arms.{arm}.{key}={text}: give a value of type {kind}, as opd's {default!r}")
    return arm, key, value


def _describe(error: Exception, config: ConfigDict) -> str:
    """The last line of an absl error, which is the one about the value, and the default the value replaces."""
    line = str(error).strip().splitlines()[-1]
    if (match := re.match(r"flag --config\.([\w.]+)=", line)) and suggest(match[1], config) is None:
        *path, last = match[1].split(".")
        part = functools.reduce(lambda part, name: part[name], path, config)
        line += f"; give a {part.get_type(last).__name__}, as the default {part[last]!r}"
    return line


def run(main: Callable[[Sequence[str]], Any]) -> None:
    """`absl.app.run(main)`, in which a `ConfigError` is printed line by line and ends the program with exit code 2."""
    app.run(_one_line_errors()(main), flags_parser=_one_line_errors()(parse_flags))


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        sys.exit(2)


# ---- the working folder ----------------------------------------------------------------------------------------------


def command_line(argv: Sequence[str] | None = None) -> str:
    """The command of this process, or another, to be typed again in a shell; lists of names are legible in it."""

    def quoted(arg: str) -> str:
        plain = "'" in arg and not re.search(r'["$`\\!]', arg)
        return f'"{arg}"' if plain else shlex.quote(arg)

    return " ".join(["python", *map(quoted, sys.argv if argv is None else argv)])


def versions() -> dict[str, Any]:
    """Python, packages, git commit, device and command line: what a result is reproduced from."""
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": _commit(),
        "device": f"{jax.device_count()} x {device.device_kind}",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "command": command_line(),
    }


def _commit() -> str | None:
    """Commit of the source tree, with `-dirty` when tracked files differ; None outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _comparable(*configs: Config) -> list[dict[str, Any]]:
    """Configs without what a run may be resumed with otherwise: seeds, and arms that not all of them have."""
    whole = [to_json(config) for config in configs]
    arms = set.intersection(*(set(config.get("arms", {})) for config in whole))
    for config in whole:
        for key in ("seeds", "only", "save_every"):
            config.pop(key, None)
        if "arms" in config:
            config["arms"] = {name: changes for name, changes in config["arms"].items() if name in arms}
    return whole


def prepare_workdir(workdir: str | os.PathLike, config: Config, *, resume: bool) -> Path:
    """Claims the folder of a run and writes `config.json` and `versions.json`, one entry per start, into it.

    An absent or empty folder starts a new run with or without `resume`, so that a job which is restarted after being
    killed can always be given `--resume`. A run may be resumed with other seeds, other arms (`only`) and another
    `save_every`: what is made already is not made again.

    Raises:
        ConfigError: the path is a file or cannot be written; the folder holds something and `resume` is false; or it
            holds another run than this config's (the keys that differ are named).
    """
    workdir = Path(workdir).expanduser().absolute()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomic(workdir / ".writable", b"")
        (workdir / ".writable").unlink()
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"--workdir={workdir}: is or lies under a file; give the path of a folder") from error
    except OSError as error:
        raise ConfigError(f"--workdir={workdir}: cannot be written ({error.strerror}); give another folder") from error
    for leftover in workdir.glob(".*.tmp"):  # of a run killed in the middle of a write
        leftover.unlink(missing_ok=True)
    starts = []
    if any(workdir.iterdir()):
        if not resume:
            raise ConfigError(f"--workdir={workdir}: not empty; add --resume to continue its run, or give a new folder")
        if not (workdir / "config.json").exists():
            raise ConfigError(f"--workdir={workdir}: holds no config.json, so no run to resume; give a new folder")
        if changed := differences(*_comparable(load(workdir / "config.json"), config)):
            raise ConfigError(
                f"--workdir={workdir}: cannot resume with another config ({'; '.join(changed)}); undo, or new folder"
            )
        if (workdir / "versions.json").exists():
            starts = json.loads((workdir / "versions.json").read_text())
    save(workdir / "config.json", config)
    write_atomic(workdir / "versions.json", json.dumps([*starts, versions()], indent=2) + "\n")
    return workdir
