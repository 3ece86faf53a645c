"""What a sandbox runs: programs nobody vouches for, each in a forked process that first gives up all it does not need.

`python -I -S jail.py` takes limits and then one case after another on standard input, and answers each on standard
output, in marshal's format; `opd_jax/rewards/sandbox.py` is the other end. It ends when its input is closed. It needs
the standard library, Linux 5.3 or newer, no privileges, and starts in about 20 ms.

| a program that | meets |
| --- | --- |
| starts a process, signals or reads one, opens a socket, changes a file's owner, mode or times | seccomp, EPERM |
| reads anything but libraries and its own folder, writes anywhere else, makes a folder | Landlock, EACCES |
| was started by root | no capabilities |
| computes too long, takes too much memory, writes too much to one file or its output | resource limits |
| sleeps, or has too many threads, files or bytes in its folder | `_watch`, which looks 50 times a second |
"""

import contextlib
import ctypes
import marshal
import os
import resource
import select
import signal
import struct
import sys
import time

THREADS, FILES, FOLDER = 64, 256, 16 << 20  # most of a program; FILES open or in its folder, FOLDER bytes there
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
_DENIED = (  # of the system calls that need no capability: name, number on x86_64, number on aarch64
    "fork 57 - vfork 58 - execve 59 221 execveat 322 281 "  # to start processes
    "kill 62 129 tkill 200 130 tgkill 234 131 rt_sigqueueinfo 129 138 rt_tgsigqueueinfo 297 240 "  # to meet others
    "ptrace 101 117 process_vm_readv 310 270 process_vm_writev 311 271 kcmp 312 272 setpriority 141 140 "
    "ioprio_set 251 30 sched_setparam 142 118 sched_setscheduler 144 119 sched_setaffinity 203 122 "
    "sched_setattr 314 274 migrate_pages 256 238 move_pages 279 239 prctl 157 167 "
    "socket 41 198 socketpair 53 199 "  # to reach the network, and servers on this machine
    "shmget 29 194 semget 64 190 msgget 68 186 mq_open 240 180 "  # to leave memory behind
    "chmod 90 - fchmod 91 52 fchmodat 268 53 chown 92 - fchown 93 55 lchown 94 - fchownat 260 54 "  # not Landlock's
    "utime 132 - utimes 235 - futimesat 261 - utimensat 280 88 setxattr 188 5 lsetxattr 189 6 fsetxattr 190 7 "
    "removexattr 197 14 lremovexattr 198 15 fremovexattr 199 16 "
    "bpf 321 280 perf_event_open 298 241 userfaultfd 323 282 keyctl 250 219 add_key 248 217 "  # the kernel's inside
    "request_key 249 218 unshare 272 97"
)
_NEWER = 424  # from here on numbers are the same everywhere; libraries do without: pidfds, io_uring, clone3, mount API
_WRITE, _READ, _LIST, _REMOVE, _MAKE, _TRUNCATE = (1 << bit for bit in (1, 2, 3, 5, 8, 14))  # linux/landlock.h
_HANDLED = (1 << 15) - 1  # all rights that its third version knows
_libc = ctypes.CDLL(None, use_errno=True)


def _system(number: int, *arguments) -> int:
    """One system call by its number."""
    result = _libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"system call {number}: {os.strerror(ctypes.get_errno())}")
    return result


def _prctl(option: int, *arguments: int) -> None:
    values = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    if _libc.prctl(option, *values) < 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}: {os.strerror(ctypes.get_errno())}")


# ---- what a process gives up -----------------------------------------------------------------------------------------


def landlock_version() -> int:
    """0 where the kernel has none."""
    try:
        return _system(444, 0, 0, 1)
    except OSError:
        return 0


def has_seccomp() -> bool:
    """Whether filters can be set; asks with one that is nowhere."""
    try:
        _prctl(22, 2, 0)
    except OSError as error:
        return error.errno == 14 and os.uname().machine in ARCHITECTURES
    return False


def _limit(limits: dict) -> None:
    """Resource limits; none is put above what this process itself may have."""
    seconds = limits["seconds"]
    for name, (soft, hard) in {
        "CPU": (seconds, seconds + 1),  # a signal, and for who ignores it, the end
        "AS": (limits["memory"],) * 2,
        "FSIZE": (limits["output"],) * 2,
        "NOFILE": (FILES,) * 2,
        "CORE": (0, 0),
    }.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        most = resource.getrlimit(kind)[1]
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        resource.setrlimit(kind, (soft, hard))


def _lock_files(readable: list[str], folder: str) -> None:
    """Landlock: nothing can be opened but these, nothing be written but in the folder."""
    handled = struct.pack("=Q", _HANDLED)
    ruleset = _system(444, handled, len(handled), 0)
    allowed = dict.fromkeys(readable, _READ | _LIST)
    allowed |= {"/dev/null": _READ | _WRITE, "/dev/zero": _READ, "/dev/urandom": _READ}
    allowed[folder] = _READ | _LIST | _WRITE | _REMOVE | _MAKE | _TRUNCATE
    for path, access in allowed.items():
        if os.path.exists(path):
            place = os.open(path, os.O_PATH)
            access &= _HANDLED if os.path.isdir(path) else ~_LIST
            _system(445, ruleset, 1, struct.pack("=Qi", access, place), 0)
    _system(446, ruleset, 0)


def _filter_calls() -> None:
    """Seccomp: a program in classic BPF that the kernel runs before every system call of this process."""
    which = list(ARCHITECTURES).index(os.uname().machine)
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, deny, missing, end = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000  # EPERM, ENOSYS, the process's end
    code = [(load, 0, 0, 4), (equal, 1, 0, ARCHITECTURES[os.uname().machine]), (answer, 0, 0, end), (load, 0, 0, 0)]
    code += [(at_least, 0, 1, _NEWER), (answer, 0, 0, missing)]
    for number in _DENIED.split()[1 + which :: 3]:
        code += [(equal, 0, 1, int(number)), (answer, 0, 0, deny)] if number != "-" else []
    for numbers, argument, test, value, denied in (
        ((56, 220), 0, any_bit, 0x10000, False),  # clone, unless it makes a thread
        ((302, 261), 0, equal, 0, False),  # prlimit64, unless of the caller itself
        ((302, 261), 1, equal, 0, True),  # and setrlimit, of processor time: a limit reached is told from a kill
        ((160, 164), 0, equal, 0, True),
        ((72, 25), 1, any_bit, 8, True),  # fcntl with F_SETOWN and its like, which have another process signalled
    ):
        skip = (0, 1) if denied else (1, 0)
        code += [(load, 0, 0, 0), (equal, 0, 3, numbers[which])]
        code += [(load, 0, 0, 16 + 8 * argument), (test, *skip, value), (answer, 0, 0, deny)]
    code += [(answer, 0, 0, allow)]
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in code))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(code), ctypes.addressof(instructions)))
    _prctl(22, 2, ctypes.addressof(program))


def confine(limits: dict, folder: str) -> None:
    """Takes from this process, for good, what the table above says."""
    _limit(limits)
    _prctl(1, signal.SIGKILL)  # ends with its parent
    _prctl(38, 1)  # no new privileges
    if limits["landlock"]:
        _lock_files(limits["readable"], folder)
    if capset := {"x86_64": 126, "aarch64": 91}.get(os.uname().machine):
        _system(capset, struct.pack("=Ii", 0x20080522, 0), bytes(24))
    if limits["seccomp"]:
        _filter_calls()


# ---- a case ----------------------------------------------------------------------------------------------------------


def _perform(program: str, form: str, payload: tuple, private: int) -> None:
    """Runs a program, and then what asks for its result, which goes to a file of ours.

    | form | payload | written by |
    | --- | --- | --- |
    | `input` | what it reads | the program, on standard output |
    | `call` | name and arguments of a function, in JSON | us: what it returns, in JSON |
    | `tests` | statements and a token | us: the token, once the last statement is done |
    """
    module = type(sys)("__main__" if form == "input" else "program")
    sys.modules[module.__name__] = module
    if form == "call" and "class Solution" in program:
        exec("from typing import *", vars(module))
    exec(compile(program, "program", "exec", dont_inherit=True), vars(module))
    if form == "input":
        return
    if form == "tests":
        exec(compile(payload[0], "tests", "exec", dont_inherit=True), vars(module))
        os.write(private, payload[1])
    else:
        import json

        name, arguments = payload
        owner = module if hasattr(module, name) else module.Solution()
        os.write(private, json.dumps(getattr(owner, name)(*json.loads(arguments))).encode())
    os._exit(0)


def _child(case: tuple, limits: dict, folder: str, files: tuple[int, int, int]) -> None:
    """The forked process. It returns only to end as an interpreter does: threads, exit functions, output."""
    program, form, payload = case
    source, output, tell = files
    try:
        os.setsid()
        os.chdir(folder)
        confine(limits, folder)
        os.dup2(source, 0)
        os.dup2(output if form == "input" else 2, 1)  # 2 goes nowhere
    except BaseException as error:
        os.write(tell, repr(error).encode())
        os._exit(1)
    os.write(tell, b"ready")
    os.dup2(output, 3)
    os.closerange(4, FILES)
    import builtins

    builtins.exit = builtins.quit = sys.exit  # which -S leaves out
    try:
        _perform(program, form, payload, 3)
    except BaseException:
        if form != "input":
            os._exit(1)  # also where it left by sys.exit: its tests were not done
        raise


def _watch(child: int, folder: str, limits: dict) -> str:
    """Waits for a program to end or ends it: "ended", "killed", "unknown" where it had no processor, or "left"."""
    began, busy = time.monotonic(), {}  # seconds of every thread on a processor and waiting for one, ended ones too
    ended = os.pidfd_open(child)
    watched = select.poll()
    watched.register(ended, select.POLLIN)
    watched.register(0, select.POLLIN)  # nobody wants to know any more
    verdict = ""
    while not verdict and not (events := watched.poll(20)):
        passed, threads, files, written = time.monotonic() - began, [], [], 0
        with contextlib.suppress(OSError):
            threads = os.listdir(f"/proc/{child}/task")
        for thread in threads:
            with contextlib.suppress(OSError), open(f"/proc/{child}/task/{thread}/schedstat") as file:
                busy[thread] = sum(map(int, file.read().split()[:2])) / 1e9
        with contextlib.suppress(OSError):
            files = os.listdir(folder)
            written = sum(os.stat(f"{folder}/{name}").st_size for name in files[:FILES])
        idle = passed - sum(busy.values())
        if idle > limits["idle"] or len(threads) > THREADS or len(files) > FILES or written > FOLDER:
            verdict = "killed"
        elif passed > limits["patience"]:
            verdict = "unknown"
    os.close(ended)
    return verdict or ("left" if any(file == 0 for file, _ in events) else "ended")


def _try(case: tuple, limits: dict) -> tuple[str, bytes]:
    """("passed", output), ("failed", nothing), or ("unknown", why)."""
    folder, (told, tell) = limits["folder"], os.pipe()
    source, output = os.memfd_create("input"), os.memfd_create("output")
    if case[1] == "input":
        with open(source, "wb", closefd=False) as file:
            file.write(case[2])
        os.lseek(source, 0, os.SEEK_SET)
    os.mkdir(folder, 0o700)
    child = os.fork()
    if child == 0:
        _child(case, limits, folder, (source, output, tell))
        sys.exit()
    os.close(tell)
    verdict = _watch(child, folder, limits)
    for kill in (os.kill, os.killpg):  # where processes can be started, those that kept to its group end as well
        with contextlib.suppress(ProcessLookupError):
            kill(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    started, written = os.read(told, 4096), os.pread(output, limits["output"], 0)
    for file in (told, source, output):
        os.close(file)
    try:
        os.rmdir(folder)
    except OSError:  # not empty
        import shutil

        shutil.rmtree(folder, ignore_errors=True)
    if verdict == "left":
        sys.exit()
    if started != b"ready":
        return "unknown", started or b"killed while it started"
    if verdict == "unknown":
        return "unknown", b"too little of a processor"
    within = used.ru_utime + used.ru_stime < limits["seconds"]
    if verdict == "ended" and os.waitstatus_to_exitcode(status) == -signal.SIGKILL and within:
        return "unknown", b"killed from outside"
    passed = verdict == "ended" and status == 0 and len(written) < limits["output"]
    return ("passed", written) if passed else ("failed", b"")


def serve() -> None:
    limits = marshal.load(sys.stdin.buffer)
    sys.path += limits["packages"]
    while case := marshal.load(sys.stdin.buffer):
        marshal.dump(_try(case, limits), sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve()
