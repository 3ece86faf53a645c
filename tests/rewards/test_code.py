"""Programs that are right, wrong and hostile; what is hostile must be refused, and leave nothing behind."""

import concurrent.futures
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from opd_jax.config import ConfigError
from opd_jax.rewards import code, jail
from opd_jax.rewards.sandbox import Sandbox, sandbox_report
from opd_jax.rewards.verify import Unverified

MISSING = [f"{what}: {how}" for what, how in sandbox_report().items() if how.startswith("none")]
pytestmark = pytest.mark.skipif(bool(MISSING), reason="; ".join(MISSING))
SLEEPER = "import time\nopen('x', 'w')\ntime.sleep(1000)"
DOUBLE = "def double(x):\n    return 2 * x\n"
ECHO = {"inputs": ["a\n"], "outputs": ["a"]}
CALL = {"inputs": [[3], [[1]]], "outputs": [6, [1, 1]], "fn_name": "double"}
THREADS = """import threading, time
threading.stack_size(1 << 15)
for _ in range({}): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
"""
TEXT = CALL | {"inputs": ["3", '"a"'], "outputs": ["6", '"aa"']}


def children(parent: int) -> list[int]:
    """Processes of a process, by whichever of its threads."""
    return [child.pid for child in psutil.Process(parent).children()]


def ended(pid: int) -> bool:
    """Whether a process is gone, but for a parent that has not asked yet."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def wait_for(what, seconds: float = 20.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files; after each test it is empty, and there are no more processes than before."""
    folder, before = tmp_path / "temporary", children(os.getpid())
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())
    assert set(children(os.getpid())) <= set(before)


# ---- what is judged --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x = 1", "x = 1"),
        ("```python\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\nbetter:\n```py\nx = 2\n```\nBye.", "x = 2\n"),
        ("```cpp\nint x;\n```\n```Python title\nx = 3\n```\n```text\nout\n```", "x = 3\n"),
        ("```\nx = 4\n```", "x = 4\n"),
        ("```\n1 2\n```\n```python\nx = 5\n```\n```\n2 3\n```", "x = 5\n"),
        ("```python\nx = 6\n", "x = 6\n"),  # cut off
        ("```python\nx = '```'\n```", "x = '```'\n"),
        ("```python\r\nx = 7\r\n```", "x = 7\r\n"),
        ("", ""),
    ],
)
def test_the_last_block_of_python_is_the_program(text, found):
    assert code.program(text) == found


@pytest.mark.parametrize(
    ("tests", "wrong"),
    [
        ("assert double(2) == 4", "assert double(2) == 5"),
        (["assert double(2) == 4", "assert double('a') == 'aa'"], ["assert double(2) == 4", "assert double(1) == 3"]),
        (json.dumps(["assert double(2) == 4"]), json.dumps(["assert double(2) == 3"])),
        ("def check(f):\n    assert f(2) == 4\ncheck(double)", "def check(f):\n    assert f(2) == 3\ncheck(double)"),
        (CALL, CALL | {"outputs": [6, [1]]}),
        (json.dumps(CALL), json.dumps(CALL | {"outputs": [7, [1, 1]]})),
        (CALL | {"outputs": [[6], [[1, 1]]]}, CALL | {"outputs": [[6, 1], [1, 1]]}),  # APPS wraps; no list is its head
        (TEXT, TEXT | {"outputs": ["6", '"a"']}),
        (CALL | {"inputs": [[0.1]], "outputs": [0.20000001]}, CALL | {"inputs": [[0.1]], "outputs": [0.2001]}),
    ],
)
def test_functions(tests, wrong):
    assert code.correct(f"So:\n```python\n{DOUBLE}```", tests) == 1.0
    assert code.correct(DOUBLE, wrong) == 0.0


@pytest.mark.parametrize(
    ("source", "given", "expected", "reward"),
    [
        ("print(input()[::-1])", "abc\n", "cba\n", 1),
        ("print(input()[::-1])", ["abc", "d"], ["cba"], 1),
        ("print(input())", "cba", "abc", 0),
        ("print('  1   2 \\n\\n3  ')", "", "1 2\n3\n", 1),
        ("print('1 2 3')", "", "1\n2\n3", 0),
        ("print(0.1 + 0.2)", "", "0.3", 1),
        ("print(0.3001)", "", "0.3", 0),
        ("print(2.0)", "", "2", 0),  # whole numbers are exact
        ("print(10**17 + 1)", "", str(10**17), 0),
        ("print(10**6000 % 7)", "", str(10**6000 % 7), 1),
        ("print(10**6000)", "", "1" + "0" * 6000, 1),
        ("print('yes')", "", "YES", 0),
        ("print('nan')", "", "1.0", 0),
        ("print(1)\nraise ValueError", "", "1", 0),
        ("print(1)\nexit()", "", "1", 1),
        ("import sys\nprint(1)\nsys.exit(1)", "", "1", 0),
        ("import os\nprint(1, flush=True)\nos._exit(0)", "", "1", 1),
        ("if __name__ == '__main__':\n    print(1)", "", "1", 1),
        ("import threading\nthreading.Thread(target=lambda: print(1)).start()", "", "1", 1),
        ("import atexit\natexit.register(print, 1)", "", "1", 1),
        ("import sys\nsys.stdout.write(sys.stdin.buffer.read().decode())", "a\nb", "a\nb", 1),
        ("print(open(0).read())", "a", "a", 1),
        ("print(input())", "héllo 🙂", "héllo 🙂", 1),
        ("print(input())", "", "", 0),  # at the end of its input
        ("pass", "", "", 1),
        ("raise ValueError", "", "", 0),
        ("open('x', 'w').write('1')\nprint(open('x').read())", "", "1", 1),
        ("print(1, file=open('/dev/null', 'w'))\nprint(2)", "", "2", 1),
        ("import numpy\nprint(numpy.arange(3).sum())", "", "3", 1),
    ],
)
def test_input_and_output(source, given, expected, reward):
    assert code.correct(source, {"inputs": [given], "outputs": [expected]}) == reward


def test_a_method_of_a_class_with_typing_s_names():
    source = "class Solution:\n    def double(self, x: List[int]) -> Optional[int]:\n        return x + x"
    assert code.correct(source, CALL | {"inputs": [[[1]]], "outputs": [[1, 1]]}) == 1.0


def test_every_input_meets_a_fresh_program():
    tests = {"inputs": ["1", "2"], "outputs": ["1", "2"]}
    source = "import os\nassert not os.listdir()\nopen('x', 'w')\nprint(input())"
    assert code.correct(source, tests) == 1.0
    assert code.correct(source, tests | {"outputs": ["1", "3"]}) == 0.0


@pytest.mark.parametrize("source", ["def f(:", "x = '''", "\ud800", "x\0y", "(" * 10000, "1 +\\", "return 4"])
@pytest.mark.parametrize("tests", ["assert True", ECHO, CALL])
def test_no_python_is_wrong(source, tests):
    assert code.correct(source, tests) == 0.0


NOTHING = [{}, {"inputs": [], "outputs": []}, {"inputs": ["1", "2"], "outputs": ["1"]}]


@pytest.mark.parametrize("tests", ["", "  ", [], "[]", "7", "[3]", "assert (", *NOTHING])
def test_no_tests_prove_nothing(tests):
    with pytest.raises(Unverified, match="tests"):
        code.correct("x = 1", tests)


@pytest.mark.parametrize(
    "source",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "exit()",
        "raise SystemExit",
        "print('ready', 'passed', 'True', 'OK')",
        "import atexit, os; atexit.register(os._exit, 0)",
        "import os; os.write(3, b'passed')",
        "import os; os.closerange(0, 100)",
        "import os\nfor file in range(4, 99):\n    try: os.write(file, b'ready')\n    except OSError: pass",
        "import threading, os; threading.Timer(0.05, os._exit, (0,)).start()",
        "import signal, os; signal.signal(signal.SIGALRM, lambda *_: os._exit(0)); signal.setitimer(0, 0.05)",
        "AssertionError = None",
        "import sys; sys.setrecursionlimit(10**9); f = lambda: f(); f()",
        "import ctypes; ctypes.string_at(0)",
    ],
)
def test_leaving_early_passes_no_tests(source):
    assert code.correct(source, "import time\ntime.sleep(0.1)\nassert False", seconds=1.0) == 0.0
    assert code.correct(source, {"inputs": [[1]], "outputs": [1], "fn_name": "f"}, seconds=1.0) == 0.0


def test_what_a_function_prints_is_not_what_it_returns():
    source = "def double(x):\n    print(6, flush=True)\n    return {} * x"
    assert code.correct(source.format(1), CALL) == 0.0
    assert code.correct(source.format(2), CALL) == 1.0


# ---- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        "9 ** 9 ** 9",
        "import time\ntime.sleep(4)",
        "import signal\nsignal.pause()",
        "import threading\nthreading.Event().wait()",
        THREADS.format(300),
        "for i in range(300): open(str(i), 'w')",
        "for i in range(20): open(str(i), 'w').truncate(1000000)",
        "open('x', 'w').truncate(2 << 20)",
        "x = 'a' * (1 << 30)",
        "x = [[0] * 1000 for _ in range(100000)]",
        "for _ in range(10_000): print('x' * (1 << 20))",  # ten gigabytes
    ],
)
def test_time_memory_and_output_are_limited(source):
    source = f"{source}\nimport time\ntime.sleep(0.1)\nprint(input())"  # which would be right
    assert code.correct(source, ECHO, seconds=0.2) == 0.0


def test_a_few_threads_and_files_are_no_crime():
    source = THREADS.format(40) + "for i in range(40): open(str(i), 'w')\ntime.sleep(0.1)\nprint(input())"
    assert code.correct(source, ECHO) == 1.0


def test_output_up_to_its_limit():
    tests = {"inputs": [""], "outputs": ["x" * 999]}
    assert code.correct("print('x' * 999, end='')", tests, output=1000) == 1.0
    assert code.correct("print('x' * 1000, end='')", tests | {"outputs": ["x" * 1000]}, output=1000) == 0.0


def test_output_beyond_its_limit_goes_nowhere():
    flood = "import os\ntry:\n    while True: os.write(1, bytes(1 << 16))\nexcept OSError: os.truncate(1, 0)\n"
    with Sandbox(0.2, 1 << 29, 1 << 20) as sandbox:
        assert sandbox.run(f"{flood}os.lseek(1, 0, 0)\nprint('refused')", "input", b"") == b"refused\n"


def test_a_busy_machine_makes_no_program_wrong():
    source = "import time\nwhile time.process_time() < 0.3: pass\nprint(input())"
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # each waits longer than it might sleep
        assert list(pool.map(lambda _: code.correct(source, ECHO, seconds=0.1), range(8))) == [1.0] * 8


def test_threads_check_side_by_side():
    check = lambda i: code.correct(DOUBLE, f"assert double({i}) == {2 * i + i % 2}")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(check, range(24))) == [float(i % 2 == 0) for i in range(24)]


# ---- the sandbox -----------------------------------------------------------------------------------------------------


def refused(attempt: str) -> bool:
    """Whether a program that goes on after an attempt's failure finds that it failed, and is judged all the same."""
    lines = "\n".join(f"    {line}" for line in attempt.splitlines())
    source = f"import ctypes, os, sys\ntry:\n{lines}\nexcept (OSError, ValueError): done = False\nelse: done = True"
    return code.correct(source, "assert not done", seconds=1.0) == 1.0


SYSTEM = "number = lambda x86, arm: x86 if os.uname().machine == 'x86_64' else arm\ncall = ctypes.CDLL(None).syscall\n"


@pytest.mark.parametrize(
    "attempt",
    [
        "os.fork()",
        "while True: os.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.execv('/bin/true', ['true'])",
        SYSTEM + "if call(number(57, -1)) < 0: raise OSError",  # fork itself, which libraries do not use
        SYSTEM + "if call(number(56, 220), 17, 0, 0, 0, 0) < 0: raise OSError",  # clone, as fork does
        SYSTEM + "if call(435, (ctypes.c_uint64 * 8)(0, 0, 0, 0, 17), 64) < 0: raise OSError",  # clone3
        SYSTEM + "if call(425, 8, (ctypes.c_uint64 * 15)()) < 0: raise OSError",  # io_uring_setup
        SYSTEM + "if call(0x40000000 + 57) < 0: raise OSError",  # fork by the numbers of x32
        SYSTEM + "if call(number(101, 117), 0, 0, 0, 0) < 0: raise OSError",  # ptrace
        SYSTEM + "if call(number(272, 97), 0x10000000) < 0: raise OSError",  # unshare
        "if ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) < 0: raise OSError",
        "os.kill(os.getppid(), 9)",
        "os.kill(TEST, 9)",
        "os.kill(-1, 9)",
        "os.pidfd_open(TEST)",
        "import fcntl\nfcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, TEST)",
        "os.setpriority(os.PRIO_PROCESS, 0, 19)",
        "os.sched_setaffinity(0, os.sched_getaffinity(0))",
        "import resource\nresource.prlimit(TEST, resource.RLIMIT_NOFILE)",
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "os.setuid(1)",
        "import socket\nsocket.sethostname(socket.gethostname())",
    ],
)
def test_processes_are_refused(attempt):
    assert refused(attempt.replace("TEST", str(os.getpid())))


@pytest.mark.parametrize("kind", ["create_connection(ADDRESS)", "socketpair()", "socket(socket.AF_UNIX)"])
def test_the_network_is_refused(kind):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        assert refused(f"import socket\nsocket.{kind}".replace("ADDRESS", str(server.getsockname())))
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize(
    "attempt",
    [
        "open(PATH + '/new', 'w')",
        "open(PATH + '/old', 'w')",
        "open(PATH + '/old', 'r+')",
        "os.truncate(PATH + '/old', 0)",
        "os.unlink(PATH + '/old')",
        "os.rename(PATH + '/old', 'here')",
        "os.link(PATH + '/old', 'here')",
        "open('new', 'w')\nos.rename('new', PATH + '/new')",
        "os.mkdir(PATH + '/new')",
        "os.mkdir('new')",  # nothing deep can be left to remove
        "os.symlink(PATH, 'link')",
        "os.mkfifo('pipe')",
        "os.chmod(PATH + '/old', 0)",
        "os.chown(PATH + '/old', os.getuid(), os.getgid())",
        "os.utime(PATH + '/old', (1, 1))",
        "os.setxattr(PATH + '/old', 'user.x', b'x')",
    ],
)
def test_files_elsewhere_stay_as_they_are(attempt, tmp_path):
    for path in (tmp_path, Path.home() / f".opd_jax_{os.getpid()}"):
        path.mkdir(exist_ok=True)
        try:
            (path / "old").write_text("kept")
            state = (path / "old").stat()
            assert refused(attempt.replace("PATH", repr(str(path))))
            assert (path / "old").read_text() == "kept" and not (path / "new").exists()
            now = (path / "old").stat()
            assert now[:7] == state[:7] and now.st_mtime == state.st_mtime and not os.listxattr(path / "old")
        finally:
            (path / "old").unlink()
            if path != tmp_path:
                path.rmdir()


@pytest.mark.parametrize("place", ["/tmp", "/dev/shm", "/var/tmp", "/dev", "/proc/self"])
def test_nothing_is_written_to_usual_places(place):
    assert refused(f"open('{place}/opd_jax_test_{os.getpid()}', 'w')")
    assert not os.path.exists(f"{place}/opd_jax_test_{os.getpid()}")


@pytest.mark.parametrize(
    "attempt",
    [
        "open('/etc/passwd')",
        "open('/proc/self/environ')",
        "open('/proc/self/mem')",
        "open(f'/proc/{os.getppid()}/environ')",
        "open('/proc/TEST/environ')",
        "open('/proc/TEST/cmdline')",
        "open(FILE)",
        "os.listdir('/')",
        "os.listdir(HOME)",
        "os.listdir('/tmp')",
    ],
)
def test_nothing_but_libraries_is_read(attempt, monkeypatch):
    attempt = attempt.replace("FILE", repr(__file__)).replace("HOME", repr(str(Path.home())))
    assert refused(attempt.replace("TEST", str(os.getpid())))


def test_the_environment_holds_no_secrets(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    source = (
        "import ctypes, os\nprint(ctypes.CDLL(None).getenv(b'SECRET_TOKEN'))\n"
        "print({name for name in os.environ if not name.endswith('_NUM_THREADS')} - {'LC_CTYPE'})"  # Python's own
    )
    assert code.correct(source, {"inputs": [""], "outputs": ["0\nset()"]}) == 1.0


def test_no_capabilities_are_left():
    source = (
        "import ctypes\nheader, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[1] * 6)\n"
        "assert ctypes.CDLL(None).capget(header, data) == 0\nprint(*data)"
    )
    assert code.correct(source, {"inputs": [""], "outputs": ["0 0 0 0 0 0"]}) == 1.0


# ---- when the sandbox fails ------------------------------------------------------------------------------------------


@pytest.fixture
def asleep():
    """A sandbox whose program sleeps, and a future of its verdict."""
    with Sandbox(10.0, 1 << 29, 1000) as sandbox, concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(sandbox.run, SLEEPER, "input", b"")
        wait_for(lambda: os.path.exists(f"{sandbox._limits['folder']}/x"))
        yield sandbox, future


def test_a_program_killed_by_others_is_unverified(asleep):
    sandbox, future = asleep
    os.kill(children(sandbox._process.pid)[0], signal.SIGKILL)
    with pytest.raises(Unverified, match="killed from outside"):
        future.result()


def test_with_its_sandbox_a_program_ends_unverified(asleep):
    sandbox, future = asleep
    (program,) = children(sandbox._process.pid)
    sandbox._process.kill()
    with pytest.raises(Unverified, match="without a verdict"):
        future.result()
    wait_for(lambda: ended(program))


def test_an_interrupted_check_ends_its_program(monkeypatch):
    programs = []

    class Interrupted:  # by the user, while it waits
        register = staticmethod(lambda *_: None)

        def poll(self, _):
            wait_for(lambda: os.path.exists(f"{sandbox._limits['folder']}/x"))
            programs.extend(children(sandbox._process.pid))
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), Sandbox(10.0, 1 << 29, 1000) as sandbox:
        patch.setattr(select, "poll", Interrupted)
        sandbox.run(SLEEPER, "input", b"")
    assert programs and all(map(ended, programs))


def test_a_killed_run_leaves_nothing(temporary):
    call = "code.correct('import time\\ntime.sleep(1000)', 'x', seconds=10.0)"
    command = [sys.executable, "-c", f"from opd_jax.rewards import code; {call}"]
    run = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(temporary)}, cwd=Path(code.__file__).parents[2])
    wait_for(lambda: list(temporary.iterdir()))
    (supervisor,) = children(run.pid)
    run.kill()
    run.wait()
    wait_for(lambda: ended(supervisor) and not list(temporary.iterdir()))


@pytest.mark.parametrize(
    ("limit", "value", "reason"),
    [("readable", [3.5], "TypeError"), ("patience", 0.05, "processor"), ("packages", None, "without a verdict")],
)
def test_a_sandbox_that_cannot_be_made_is_no_verdict(limit, value, reason):
    sandbox = Sandbox(1.0, 1 << 29, 1000)
    sandbox._limits[limit] = value
    with sandbox, pytest.raises(Unverified, match=reason):
        sandbox.run("while True: pass", "input", b"")


def test_an_interpreter_that_does_not_start_is_no_verdict(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(Unverified, match="does not start"):
        code.correct(DOUBLE, CALL)


@pytest.fixture
def weak(monkeypatch):
    """A machine without protections."""
    sandbox_report.cache_clear()
    monkeypatch.setattr(jail, "landlock_version", lambda: 0)
    monkeypatch.setattr(jail, "has_seccomp", lambda: False)
    yield
    sandbox_report.cache_clear()


def test_missing_protections_are_said_and_programs_not_run(weak):
    assert [how.startswith("none") for how in sandbox_report().values()] == [True, True, False]
    with pytest.raises(ConfigError, match=r"seccomp.*Landlock.*allow_weak") as error:
        code.correct(DOUBLE, CALL)
    assert "\n" not in str(error.value)


def test_without_protections_programs_run_when_told_to(weak, tmp_path):
    assert code.correct(DOUBLE, CALL, allow_weak=True) == 1.0
    assert code.correct(f"open('{tmp_path}/x', 'w')", "assert True", allow_weak=True) == 1.0
    assert (tmp_path / "x").exists()  # what the tests above see refused
    sleeper = (
        f"import os, time\npid = os.fork()\nif pid: open('{tmp_path}/x', 'w').write(str(pid))\nelse: time.sleep(99)"
    )
    assert code.correct(sleeper, "assert True", allow_weak=True) == 1.0
    wait_for(lambda: ended(int((tmp_path / "x").read_text())))
