"""Python in processes of their own that need not import the libraries: forked from one that has.

Importing takes several seconds of a core, which is most of what a command on a tiny model takes. One process for a
session imports all that stages use, does nothing else, and forks for every command that it is asked for. The child is
that command from there on: its own arguments, environment, folder and streams, and it can be killed.

`start` and `run` are `python -m qlora`, `start_python` and `python` whatever Python can be. `executable` is a file to
run in place of `sys.executable`, for what starts processes itself; those that its processes start are forked too.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

STAGES = "qlora.training.run, qlora.quantization, qlora.merging, qlora.measuring, qlora.evaluation.ladder, qlora.rungs"
LAUNCHERS = "accelerate.commands.accelerate_cli, torch.distributed.run"
# Modules that whoever starts them looks for under the number of the process started: no fork then, they import little.
KNOWN_BY_NUMBER = ("submitit.local._local",)
HERE = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import warm"


class Process:
    """What `python ARGUMENTS` is: like `subprocess.Popen`, as far as tests need it."""

    def __init__(
        self,
        address: str,
        arguments: Sequence[str],
        env: Mapping[str, str],
        cwd: Any,
        stdout: str,
        stderr: str,
        executable: str = sys.executable,
    ) -> None:
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(address)
        request = {
            "arguments": list(arguments),
            "env": dict(env),
            "cwd": str(cwd or os.getcwd()),
            "stdout": stdout,
            "stderr": stderr,
            "executable": executable,
        }
        self._answers = self._connection.makefile("rw")
        self._answers.write(json.dumps(request) + "\n")
        self._answers.flush()
        self.pid = int(self._answers.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self._connection.setblocking(False)
            try:
                ended = bool(self._connection.recv(1, socket.MSG_PEEK))
            except BlockingIOError:
                ended = False
            self._connection.setblocking(True)
            if ended:
                self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._connection.settimeout(timeout)
            self.returncode = int(self._answers.readline())
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    *arguments: object, env: Mapping[str, str] = os.environ, stdout: str = os.devnull, stderr: str | None = None
) -> Process:
    """`python -m qlora ARGUMENTS`; what it prints goes to files, errors to the same one unless they have their own."""
    return start_python("-m", "qlora", *arguments, env=env, stdout=stdout, stderr=stderr)


def start_python(
    *arguments: object, env: Mapping[str, str] = os.environ, stdout: str = os.devnull, stderr: str | None = None
) -> Process:
    """`python ARGUMENTS`, which begin with `-m MODULE`, `-c CODE` or the file of a script."""
    return Process(_address(), [str(each) for each in arguments], env, None, stdout, stderr or stdout)


def run(
    *arguments: object, env: Mapping[str, str] = os.environ, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """The same, once it has ended."""
    return python("-m", "qlora", *arguments, env=env, cwd=cwd)


def python(
    *arguments: object, env: Mapping[str, str] = os.environ, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` as in `start_python`, once it has ended."""
    with tempfile.TemporaryDirectory() as folder:
        places = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        called = [str(each) for each in arguments]
        code = Process(_address(), called, env, cwd, *places).wait()
        texts = [Path(place).read_text(encoding="utf-8") for place in places]
    return subprocess.CompletedProcess(called, code, *texts)


@cache
def executable() -> str:
    """A file that takes the arguments of `start_python`, and whose `sys.executable` is itself."""
    path = f"{_address()}-python"
    program = f"#!{sys.executable} -IS\n{HERE}; sys.exit(warm.become({_address()!r}))\n"
    Path(path).write_text(program, encoding="utf-8")
    os.chmod(path, 0o755)
    return path


def become(address: str) -> int:
    """What `executable` does: have the command forked, with the streams and signals of this process; its exit code."""
    if sys.argv[2] in KNOWN_BY_NUMBER:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    streams = [f"/proc/{os.getpid()}/fd/{number}" for number in (1, 2)]
    process = Process(address, sys.argv[1:], os.environ, None, *streams, executable=sys.argv[0])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: process.send_signal(number))
    code = process.wait()
    return code if code >= 0 else 128 - code


@cache
def _address() -> str:
    """Of the process that forks, which is started when first needed; one for all workers of pytest-xdist."""
    session, own = os.environ.get("PYTEST_XDIST_TESTRUNUID"), os.getpid()
    folder = os.path.join(tempfile.gettempdir(), f"warm-{session or own}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    address = os.path.join(folder, "warm")
    with open(f"{address}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(address):
            until = os.getppid() if session else own  # workers may end before each other
            command = [sys.executable, "-c", f"{HERE}; warm.serve(*sys.argv[1:])", address, str(until)]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
            while not os.path.exists(address):
                assert process.poll() is None, "the process that forks has ended"
                time.sleep(0.01)
    return address


def serve(address: str, until: str) -> None:
    """Import, then fork for everyone who connects, as long as there is a process of the number `until`."""
    for name in f"{STAGES}, {LAUNCHERS}".split(", "):
        __import__(name)
    import gc

    gc.collect()
    gc.freeze()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"{address}.new")
    listening.listen()
    os.rename(f"{address}.new", address)
    listening.settimeout(2)
    while os.path.exists(f"/proc/{until}"):
        try:
            connection, _ = listening.accept()
        except TimeoutError:
            continue
        connection.setblocking(True)
        if not os.fork():
            listening.close()
            _attend(connection)
            os._exit(0)
        connection.close()
        while _reap():
            pass
    shutil.rmtree(os.path.dirname(address))


def _reap() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG)[0] > 0
    except ChildProcessError:
        return False


def _attend(connection: socket.socket) -> None:
    """Fork the command, tell its number, and, when it has ended, its code."""
    stream = connection.makefile("rw")
    request = json.loads(stream.readline())
    child = os.fork()
    if not child:
        connection.close()
        _become(request)
    stream.write(f"{child}\n")
    stream.flush()
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(BrokenPipeError):  # whoever asked was killed
        stream.write(f"{os.waitstatus_to_exitcode(status)}\n")
        stream.flush()


def _become(request: dict[str, Any]) -> None:
    atexit._clear()  # what the process that forks does at its own end
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    null = os.open(os.devnull, os.O_RDONLY)
    places = [os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) for name in ("stdout", "stderr")]
    for number, place in enumerate((null, *places)):
        os.dup2(place, number)
    sys.executable = request["executable"]
    code = 1
    try:
        _interpret(*request["arguments"])
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _interpret(first: str, *rest: str) -> None:
    """As the interpreter does, from where it finds its modules on."""
    import runpy

    if first == "-u":  # as torch's launcher has it; what is printed comes at the end here
        first, *rest = rest
    search = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry not in sys.path]
    own = os.path.dirname(os.path.abspath(first)) if first not in ("-m", "-c") else os.getcwd()
    sys.path[:0] = [own, *search]
    if first == "-m":
        sys.argv = list(rest)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(rest[0], vars(sys.modules["__main__"]))
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")
