"""Where the code of an answer runs: a subprocess that can compute, and as little else as this system lets us forbid.

    always            python -I -S (no site, no user paths), empty environment, no stdin, output thrown away, a new session, a temporary
                      folder that is removed; limits on CPU seconds, address space, file size, open files, processes, core dumps; after
                      the wall clock the whole process group is killed
    network: none     a network namespace without any interface: no address can be reached
    files: read-only  a mount namespace in which nothing can be written except an empty folder in memory, gone with the process
    processes: own    a process namespace: when its first process ends, the kernel kills whatever it left behind, daemons too

The last three need Linux with unprivileged user namespaces. Containers and some distributions forbid them; `guarantees` tries
once and says which hold, the record keeps it, and `--allow-code` is the reader's consent to what is left: without them the code runs
with your network and your right to write. What is never forbidden: to *read* what you may read. The limit on processes does not
bind root; a fork bomb then lives until the wall clock.

A program has passed when it wrote a number to a pipe that its last line alone does; an exit code would not do, because an
answer may call `exit(0)` before its tests. The number is drawn anew each time. An answer that reads its own source to find it would
pass: this is a grade for models, not for opponents.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from halfbyte.errors import UsageError

#: wall clock, seconds; CPU seconds; bytes of address space; bytes a file
SECONDS, CPU_SECONDS, MEMORY, FILE_BYTES, FILES, PROCESSES = 15, 10, 1 << 30, 16 << 20, 64, 32
MAX_PROGRAM = 1 << 20
NAMESPACES = ("network", "files", "processes")
_PROOF = "import os as _os; _os.write({fd}, b'{token}')"
#: runs as `python -I -S -c`, argv: pipe, folder, limits as JSON, namespaces as JSON; the program comes on file descriptor 0
_LAUNCHER = r"""
import ctypes, json, os, resource, signal, sys
pipe, folder, limits, wanted = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
program = open(0, 'rb', closefd=False).read()
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
libc = ctypes.CDLL(None, use_errno=True)
flags = {'network': 0x40000000, 'files': 0x00020000, 'processes': 0x20000000}
def need(result):
    if result:
        os._exit(97)
if wanted:
    user, group = os.getuid(), os.getgid()
    need(libc.unshare(0x10000000 | sum(flags[name] for name in wanted)))
    # nobody inside: what is started by exec then has no capability with which to undo any of this
    for name, line in (('setgroups', 'deny'), ('uid_map', f'65534 {user} 1'), ('gid_map', f'65534 {group} 1')):
        with open('/proc/self/' + name, 'w') as file:
            file.write(line)
if 'processes' in wanted:
    child = os.fork()
    if child:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255)
    libc.prctl(1, signal.SIGKILL)
if 'files' in wanted:
    class Attributes(ctypes.Structure):
        _fields_ = [(name, ctypes.c_uint64) for name in ('set', 'clear', 'propagation', 'userns')]
    need(libc.mount(None, b'/', None, 0x4000 | 0x40000, None))
    read_only = Attributes(1, 0, 0, 0)
    need(libc.syscall(442, -100, b'/', 0x8000, ctypes.byref(read_only), 32))
    need(libc.mount(b'tmpfs', folder.encode(), b'tmpfs', 2 | 4, b'size=16m,mode=0700'))
os.chdir(folder)
for name, value in limits.items():
    resource.setrlimit(getattr(resource, 'RLIMIT_' + name), (value, value))
with open('answer.py', 'wb') as file:
    file.write(program)
os.execve(sys.executable, [sys.executable, '-I', '-S', 'answer.py'], {})
"""


@dataclass(frozen=True)
class Outcome:
    """How a program ended. passed: its last line was reached. timed_out: the wall clock ended it."""

    passed: bool
    timed_out: bool


def run_program(program: str, *, seconds: float = SECONDS) -> Outcome:
    """Run a Python program to its last line, in the sandbox.

    raises  UsageError where there is none: this needs POSIX limits and process groups
    """
    return _run(program, guarantees(), seconds)


@functools.cache
def guarantees() -> tuple[str, ...]:
    """Which of NAMESPACES this system grants, tried once: all of them together, else one by one.

    raises UsageError if not even the plain sandbox runs a program
    """
    if os.name != "posix":
        raise UsageError("no sandbox on this system", where="--allow-code", todo="run MBPP on Linux or macOS")
    if _run("pass", NAMESPACES, SECONDS).passed:
        return NAMESPACES
    found: tuple[str, ...] = ()
    for name in NAMESPACES:
        if _run("pass", (*found, name), SECONDS).passed:
            found = (*found, name)
    if not found and not _run("pass", (), SECONDS).passed:
        raise UsageError("the sandbox runs nothing", where="--allow-code", todo="leave the task out")
    return found


def facts() -> dict[str, str]:
    """What the sandbox enforces here, for the record."""
    held = guarantees()
    return {
        "network": "none" if "network" in held else "NOT cut off",
        "files": "read-only" if "files" in held else "NOT protected from writing",
        "processes": "own" if "processes" in held else "killed by group",
        "limits": f"{SECONDS} s, {CPU_SECONDS} s of CPU, {MEMORY >> 20} MiB, {PROCESSES} processes",
    }


def _run(program: str, namespaces: tuple[str, ...], seconds: float) -> Outcome:
    token = secrets.token_hex(16)
    reading, writing = os.pipe()
    try:
        with tempfile.TemporaryDirectory(prefix="halfbyte-answer-", ignore_cleanup_errors=True) as folder:
            source = f"{program}\n{_PROOF.format(fd=writing, token=token)}\n".encode("utf-8", "replace")
            timed_out = len(source) > MAX_PROGRAM or _execute(source, Path(folder), namespaces, (writing, seconds))
        os.set_blocking(reading, False)
        try:
            said = os.read(reading, 64)
        except BlockingIOError:  # something still holds the pipe, and nothing was written
            said = b""
        return Outcome(said == token.encode(), timed_out)
    finally:
        os.close(reading)
        os.close(writing)


def _execute(source: bytes, folder: Path, namespaces: tuple[str, ...], how: tuple[int, float]) -> bool:
    """Run and wait; the group is dead afterwards. Returns whether the clock had to end it."""
    writing, seconds = how
    limits = {"CPU": CPU_SECONDS, "AS": MEMORY, "FSIZE": FILE_BYTES, "NOFILE": FILES, "CORE": 0}
    if sys.platform == "linux":
        limits["NPROC"] = PROCESSES if "processes" in namespaces else max(PROCESSES, _own_processes() + PROCESSES)
    command = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(writing), str(folder), json.dumps(limits), json.dumps(namespaces)]  # fmt: skip
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder, env={},
        pass_fds=(writing,), start_new_session=True,
    )  # fmt: skip
    try:
        process.communicate(source, timeout=seconds)
        return False
    except subprocess.TimeoutExpired:
        return True
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _own_processes() -> int:
    """Processes and threads that this user has already: RLIMIT_NPROC counts them all."""
    found = 0
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and entry.stat().st_uid == os.getuid():
                found += len(os.listdir(entry / "task"))
        except OSError:
            continue
    return found
