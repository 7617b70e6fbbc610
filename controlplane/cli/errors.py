"""What can go wrong in the CLI: which exit code it means, and the words for it.

Exit codes are an interface that scripts rely on; they never change their meaning. Errors go to
stderr and say what happened, every fault of a request with its pointer, and what to do next.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import ClassVar

from controlplane.cli.views import ProblemView
from shared.errors import NovacronError


class Exit(enum.IntEnum):
    OK = 0
    ERROR = 1
    USAGE = 2
    NOT_FOUND = 3
    CONFLICT = 4
    AUTH = 5
    WAIT_TIMED_OUT = 6
    UNSCHEDULABLE = 7
    UNREACHABLE = 8
    PARTIAL = 9
    INTERRUPTED = 130  # what shells expect after SIGINT


class CliError(NovacronError):
    """An error with an exit code, and a hint that says what to do."""

    exit_code: ClassVar[Exit] = Exit.ERROR

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def exit_with(self) -> Exit:
        return self.exit_code

    def lines(self) -> list[str]:
        """Return the text for stderr: what happened, then what to do."""
        return [f"error: {self}", *([f"  try: {self.hint}"] if self.hint else [])]


class NotLoggedIn(CliError):
    exit_code = Exit.AUTH


class Unreachable(CliError):
    """No endpoint answered."""

    exit_code = Exit.UNREACHABLE


class Interrupted(Unreachable):
    """The connection broke after a write went out: it may or may not have been made."""


class Untrusted(Unreachable):
    """Whoever answers there cannot prove to be a replica of this cell."""

    exit_code = Exit.AUTH


class UnexpectedAnswer(CliError):
    """Something answered that does not speak this API."""


class WaitTimedOut(CliError):
    exit_code = Exit.WAIT_TIMED_OUT


class Detached(CliError):
    """Ctrl-C ended the waiting, or the submitting; what was accepted goes on.

    ``failures`` are those of the same command's other targets, found before.
    """

    exit_code = Exit.INTERRUPTED

    def __init__(
        self,
        message: str,
        hint: str = "",
        undo: str = "",
        failures: Sequence[tuple[str, CliError]] = (),
    ) -> None:
        super().__init__(message, hint)
        self.undo = undo
        self.failures = failures

    def lines(self) -> list[str]:
        again = [f"  wait again: {self.hint}"] if self.hint else []
        undo = [f"  undo it:    {self.undo}"] if self.undo else []
        return [*_told(self.failures), str(self), *again, *undo]


class Unschedulable(CliError):
    exit_code = Exit.UNSCHEDULABLE


class ProblemError(CliError):
    """An error that the API tells as a problem: of a request, or of a failed operation."""

    def __init__(self, problem: ProblemView, about: str = "") -> None:
        super().__init__(problem.detail or problem.title or problem.code, _hint(problem))
        self.problem = problem
        self.about = about

    def exit_with(self) -> Exit:
        return exit_for(self.problem)

    def lines(self) -> list[str]:
        problem = self.problem
        title = problem.title or problem.code or "the request failed"
        about = f"{self.about}: " if self.about else ""
        lines = [f"error: {about}{title} ({problem.code or 'no code'}, status {problem.status})"]
        if problem.detail and problem.detail != problem.title:
            lines.append(f"  {problem.detail}")
        lines += [f"  {e.pointer or '/'}: {e.message} ({e.code})" for e in problem.errors]
        if problem.request_id:
            lines.append(f"  request: {problem.request_id}")
        return [*lines, *([f"  try: {self.hint}"] if self.hint else [])]


class ApiProblem(ProblemError):
    """The API refused a request."""


class OperationFailed(ProblemError):
    """An accepted operation ended without success."""


class Several(CliError):
    """Several targets of one command failed, or some did and others did not."""

    def __init__(self, failures: list[tuple[str, CliError]], targets: int) -> None:
        super().__init__(f"{len(failures)} of {targets} failed")
        self.failures = failures
        self.targets = targets

    def exit_with(self) -> Exit:
        codes = {failure.exit_with() for _, failure in self.failures}
        if len(self.failures) < self.targets:
            return Exit.PARTIAL
        return codes.pop() if len(codes) == 1 else Exit.ERROR

    def lines(self) -> list[str]:
        return [*_told(self.failures), f"error: {self}"]


def _told(failures: Sequence[tuple[str, CliError]]) -> list[str]:
    return [f"{name}: {line}" for name, failure in failures for line in failure.lines()]


def exit_for(problem: ProblemView) -> Exit:
    """Return the exit code that a problem means, by its code first and then by its status."""
    by_code = _EXIT_BY_CODE.get(problem.code)
    return by_code or _EXIT_BY_STATUS.get(problem.status, Exit.ERROR)


_EXIT_BY_CODE = {
    "unschedulable": Exit.UNSCHEDULABLE,
    "quota_exceeded": Exit.UNSCHEDULABLE,
    "drain_incomplete": Exit.PARTIAL,
}
_EXIT_BY_STATUS = {
    401: Exit.AUTH,
    403: Exit.AUTH,
    404: Exit.NOT_FOUND,
    409: Exit.CONFLICT,
    412: Exit.CONFLICT,
    428: Exit.CONFLICT,
    502: Exit.UNREACHABLE,
    503: Exit.UNREACHABLE,
    504: Exit.UNREACHABLE,
}
_HINT_BY_CODE = {
    "outcome_unknown": "look whether it happened before you repeat it",
    "name_taken": "choose another name",
    "upgrade_unfinished": "novacron cluster status, which tells what the upgrade waits for",
    "no_leader": "repeat in a few seconds; `novacron cluster status` shows who leads",
}
_HINT_BY_STATUS = {
    401: "log in with a valid token: novacron login --endpoint URL --ca FILE --token-file FILE",
    403: "ask an administrator for a role that permits this",
    410: "list again from the start; that part of the history is gone",
}


def _hint(problem: ProblemView) -> str:
    hint = _HINT_BY_CODE.get(problem.code) or _HINT_BY_STATUS.get(problem.status)
    if hint is None and problem.retryable:
        hint = "repeat it in a few seconds; nothing was changed"
    return hint or ""
