"""What a user can get wrong, and the exit code each kind of mistake ends with.

Exit codes: 0 done, 1 unexpected failure, 2 wrong recipe, data or arguments, 3 a quality gate failed (artefacts kept),
4 it will not fit in memory or on disk, 130 interrupted and resumable.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: what it is, where it stands (file, key or row), and what to do about it."""

    what: str
    where: str = ""
    fix: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n    → {self.fix}" if self.fix else text


class QloraError(Exception):
    """Base of every error that is reported without a traceback. Carries all problems found, not only the first."""

    exit_code = 2
    title = "Something is wrong"

    def __init__(self, problems: str | Problem | Iterable[Problem], where: str = "", fix: str = "") -> None:
        if isinstance(problems, str):
            problems = Problem(problems, where, fix)
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class UserError(QloraError):
    """The recipe, the data or the arguments are wrong."""

    title = "This recipe cannot run as it is"


class GateFailed(QloraError):
    """A quality gate of the recipe failed. The artefacts are kept."""

    exit_code = 3
    title = "A quality gate failed; the artefacts are kept"


class NotAsWritten(QloraError):
    """What `qlora verify` looked at is not what the run made."""

    exit_code = 3
    title = "Not what the run made"


class WillNotFit(QloraError):
    """There is not enough memory or disk for what the recipe asks."""

    exit_code = 4
    title = "This will not fit"


def missing_extra(package: str, extra: str, needed_for: str) -> UserError:
    """The error for an optional dependency that is not installed."""
    return UserError(
        f"{needed_for} needs the package {package}, which is not installed", fix=f'pip install "qlora[{extra}]"'
    )
