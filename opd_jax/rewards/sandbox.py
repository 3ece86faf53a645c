"""Programs nobody vouches for, run where they can do no harm. Linux only; `jail.py` runs them and says how."""

import contextlib
import functools
import marshal
import math
import os
import secrets
import select
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from opd_jax.config import ConfigError
from opd_jax.rewards import jail
from opd_jax.rewards.verify import Unverified

# All of a program's environment: each thread of a library would take memory.
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_OPTIONS = ("-I", "-S", "-B", "-X", "utf8", "-X", "int_max_str_digits=0")
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/ld.so.cache")


@functools.cache
def sandbox_report() -> dict[str, str]:
    """What holds programs back on this machine, by what it protects; an entry that begins with "none" is missing."""
    calls, files, version = f"seccomp on {os.uname().machine}", "Landlock", jail.landlock_version()
    if not jail.has_seccomp():
        calls = f"none: no {calls}, so a program can start others, signal them and use the network"
    if version < 3:
        files = f"none: Landlock {version} where 3 is needed (Linux 6.2), so a program reads and writes what you can"
    return {"processes, network": calls, "files": files, "time, memory, output": "resource limits"}


class Sandbox:
    """A fresh interpreter for one program and its cases, each of them run in a process of its own.

    Use it in a `with`; leaving that ends whatever is running, and so does the end of this process.

    Args:
        seconds: of processor time a case, rounded up to whole ones. A program that neither computes nor waits for a
            processor gets four times as long.
        memory: bytes of address space a case.
        output: most bytes it writes to standard output, or to a file.
        allow_weak: run programs even where `sandbox_report` names a missing protection.

    Raises:
        ConfigError: a protection is missing.
        Unverified: the interpreter does not start.
    """

    def __init__(self, seconds: float, memory: int, output: int, allow_weak: bool = False):
        report = sandbox_report()
        missing = [f"{what}: {how}" for what, how in report.items() if how.startswith("none")]
        if missing and not allow_weak:
            raise ConfigError(f"programs cannot be held back here ({'; '.join(missing)}); allow_weak=True runs them")
        packages = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
        self._limits = {
            "seconds": math.ceil(seconds),
            "idle": 4 * seconds,
            "patience": 40 * math.ceil(seconds),
            "memory": memory,
            "output": output,
            "packages": packages,
            "readable": [*_LIBRARIES, *(f"{prefix}/lib" for prefix in (sys.base_prefix, sys.prefix)), *packages],
            "folder": str(Path(tempfile.gettempdir(), f"opd_jax_{secrets.token_hex(8)}")),
            "landlock": not report["files"].startswith("none"),
            "seccomp": not report["processes, network"].startswith("none"),
        }

    def __enter__(self):
        pipe, command = subprocess.PIPE, [sys.executable, *_OPTIONS, jail.__file__]
        where = {"stdin": pipe, "stdout": pipe, "stderr": subprocess.DEVNULL, "cwd": "/", "start_new_session": True}
        try:
            self._process = subprocess.Popen(command, env=_ENVIRONMENT, **where)
            marshal.dump(self._limits, self._process.stdin)
        except OSError as error:
            raise Unverified(f"sandbox: does not start, {error.strerror}") from error
        return self

    def __exit__(self, *_):
        with contextlib.suppress(BrokenPipeError):
            marshal.dump(None, self._process.stdin)  # at which it ends what runs, and itself
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        shutil.rmtree(self._limits["folder"], ignore_errors=True)  # there only if it was killed

    def run(self, program: str, form: str, payload) -> bytes | None:
        """A case, as `jail._perform` lists them: what was written, or None of a program that failed.

        Raises:
            Unverified: it could not be run, or got too little of a processor, or was killed from outside.
        """
        try:
            marshal.dump((program, form, payload), self._process.stdin)
            self._process.stdin.flush()
            ready = select.poll()
            ready.register(self._process.stdout, select.POLLIN)
            if not ready.poll(60_000 + 1_100 * self._limits["patience"]):
                self._process.kill()
            verdict, written = marshal.load(self._process.stdout)
        except (BrokenPipeError, EOFError) as error:
            raise Unverified("sandbox: ended without a verdict") from error
        if verdict == "unknown":
            raise Unverified(f"sandbox: {written.decode()}")
        return written if verdict == "passed" else None
