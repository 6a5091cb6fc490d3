"""The command in a process of its own that need not import the libraries: forked from one that has.

Importing takes several seconds of a core, which is most of what a command on a tiny model takes. One process for a
session imports all that stages use, does nothing else, and forks for every command that it is asked for. The child is
`python -m qlora` from there on: its own arguments, environment, folder and streams, and it can be killed.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

STAGES = "qlora.training.run, qlora.quantization, qlora.merging, qlora.measuring, qlora.evaluation.ladder, qlora.rungs"
SERVE = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import warm; warm.serve(sys.argv[1])"


class Process:
    """A command that was started: like `subprocess.Popen`, as far as tests need it."""

    def __init__(self, arguments: list[str], env: Mapping[str, str], cwd: Any, stdout: str, stderr: str) -> None:
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(_address())
        request = {
            "arguments": arguments,
            "env": dict(env),
            "cwd": str(cwd or os.getcwd()),
            "stdout": stdout,
            "stderr": stderr,
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


def start(*arguments: object, env: Mapping[str, str] = os.environ, stdout: str = os.devnull) -> Process:
    """`python -m qlora ARGUMENTS`; what it prints goes to a file."""
    return Process([str(each) for each in arguments], env, None, stdout, stdout)


def run(
    *arguments: object, env: Mapping[str, str] = os.environ, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """The same, once it has ended."""
    with tempfile.TemporaryDirectory() as folder:
        places = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        called = [str(each) for each in arguments]
        code = Process(called, env, cwd, *places).wait()
        texts = [Path(place).read_text(encoding="utf-8") for place in places]
    return subprocess.CompletedProcess(called, code, *texts)


@cache
def _address() -> str:
    """Of the process that forks, which is started when first needed and ends with this one."""
    folder = tempfile.mkdtemp()
    address = os.path.join(folder, "warm")
    process = subprocess.Popen([sys.executable, "-c", SERVE, address], stdin=subprocess.PIPE)
    atexit.register(process.kill)
    while not os.path.exists(address):
        assert process.poll() is None, "the process that forks has ended"
        time.sleep(0.01)
    return address


def serve(address: str) -> None:
    """Import, then fork for everyone who connects; ends when its parent does."""
    for name in STAGES.split(", "):
        __import__(name)
    import gc

    gc.collect()
    gc.freeze()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"{address}.new")
    listening.listen()
    os.rename(f"{address}.new", address)
    parent = os.getppid()
    listening.settimeout(2)
    while os.getppid() == parent:
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
    stream.write(f"{os.waitstatus_to_exitcode(status)}\n")
    stream.flush()


def _become(request: dict[str, Any]) -> None:
    import runpy

    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    null = os.open(os.devnull, os.O_RDONLY)
    places = [os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) for name in ("stdout", "stderr")]
    for number, place in enumerate((null, *places)):
        os.dup2(place, number)
    sys.argv = ["qlora", *request["arguments"]]
    code = 1
    try:
        runpy.run_module("qlora", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
