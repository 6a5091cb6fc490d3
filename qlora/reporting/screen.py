"""Where a conversation is typed and shown: a terminal with colours and line editing, or plain lines through pipes.

Through pipes, prompts and answers go to standard output as plain text, and all that is said about them to standard
error, so that what is kept in a file is the conversation alone.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import TextIO

from rich.console import Console

# What would move a terminal's cursor or change its colours, if a model said it.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Screen:
    """Standard input, output and error as they are when it is made, unless others are given."""

    def __init__(self, stdin: TextIO | None = None, stdout: TextIO | None = None, stderr: TextIO | None = None) -> None:
        self._in, self._out = stdin or sys.stdin, stdout or sys.stdout
        self.is_terminal = self._in.isatty() and self._out.isatty()
        told = self._out if self.is_terminal else stderr or sys.stderr
        self._console = Console(file=told, highlight=False, soft_wrap=True)
        if self.is_terminal:
            with contextlib.suppress(ImportError):  # there is none on some systems
                import readline  # noqa: F401  input() then edits lines and remembers them

    def ask(self, name: str) -> str | None:
        """The next line that is typed, None where there are no more. Raises KeyboardInterrupt for Ctrl-C."""
        if self.is_terminal:
            try:
                return input(self._prompt(name))
            except EOFError:
                self.write("\n")
                return None
        line = self._in.readline()
        if line:
            self.write(f"> {line.rstrip()}\n")
        return line.rstrip("\r\n") if line else None

    def _prompt(self, name: str) -> str:
        if self._console.no_color or not self._console.is_terminal:
            return f"{name}> "
        # readline must be told what takes no room on the line.
        return f"\001\033[1;36m\002{name}>\001\033[0m\002 "

    def write(self, text: str) -> None:
        """Text of the conversation, at once and as it is."""
        self._out.write(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", text) if self.is_terminal else text)
        self._out.flush()

    def note(self, text: str) -> None:
        """Something about the conversation."""
        self._console.print(text, style="dim", markup=False)

    def problem(self, text: str) -> None:
        self._console.print(text, style="yellow", markup=False)

    @contextlib.contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Show that something takes a while, as long as it does."""
        with self._console.status(f"[dim]{text} …") if self.is_terminal else contextlib.nullcontext():
            yield
