"""Waiting for operations: progress on stderr, and a way back when the waiting ends early.

An operation belongs to the control plane, not to whoever waits for it: Ctrl-C, a timeout or a lost
connection ends the waiting only, and says how to take it up again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec
from msgspec import Struct

from controlplane.cli.client import Answer, path_of
from controlplane.cli.errors import (
    ApiProblem,
    CliError,
    Detached,
    Exit,
    OperationFailed,
    Several,
    Unreachable,
    WaitTimedOut,
)
from controlplane.cli.invocation import Invocation
from controlplane.cli.output import Format, Output, printable
from controlplane.cli.terminal import Terminal
from controlplane.cli.views import OperationView, ProblemView

# One long poll: short enough for a person to see phases pass, long enough to be no load.
POLL_S = 2
# Elections and restarts of a replica pass within this; an answer may be missing that long.
PATIENCE_S = 60.0
# Looks at an operation are at least this far apart, also when an answer is not held back.
LOOK_PERIOD_S = 0.5
# A placement that takes longer than this waits for room.
PLACING_S = 3.0

SUCCEEDED = frozenset({"succeeded"})

Done = Callable[[str, OperationView], None]


class Waiting(Struct, frozen=True):
    """How a command waits: ``until_s`` is on the terminal's monotonic clock."""

    wait: bool
    until_s: float | None

    @classmethod
    def begin(cls, terminal: Terminal, *, no_wait: bool, timeout: float | None) -> Waiting:
        return cls(not no_wait, None if timeout is None else terminal.monotonic_s() + timeout)


class Started(Struct, frozen=True):
    """An operation that was accepted; ``name`` is what the user called its target."""

    name: str
    answer: Answer
    operation: OperationView


def run_operations(
    invocation: Invocation,
    output: Output,
    names: Sequence[str],
    submit: Callable[[str], Answer],
    done: Done,
    waiting: Waiting,
    wanted: frozenset[str] = SUCCEEDED,
    *,
    looks_only: bool = False,
) -> None:
    """Submit one operation for each name, wait for all, and print what became of them.

    ``wanted`` are the states in which one may end without being a failure. ``done`` prints the
    sentence for such a one, in the formats for people. With ``looks_only`` the names are those of
    operations, and ``submit`` changes nothing. Raises the error of a single target as it is, and
    ``Several`` when there were more; Detached.
    """
    failures: list[tuple[str, CliError]] = []
    started: list[Started] = []
    for index, name in enumerate(names):
        try:
            answer = submit(name)
            started.append(Started(name, answer, answer.decode(OperationView)))
        except CliError as error:
            failures.append((name, error))
        except KeyboardInterrupt:
            left = names[index:]
            cut = _cut_looking if looks_only else _cut_submitting
            raise cut(started, left, failures) from None
    if waiting.wait:
        bodies = _await_all(invocation, output, started, done, waiting, failures, wanted)
    else:
        bodies = [each.answer.body for each in started]
        if output.form is not Format.JSON:
            output.names([each.operation.id for each in started])
    if output.form is Format.JSON:
        _print_json(output, bodies, single=len(names) == 1)
    if failures:
        raise failures[0][1] if len(names) == 1 else Several(failures, len(names))


def await_operation(invocation: Invocation, started: Started, until_s: float | None) -> Answer:
    """Wait until one operation has ended and return its last state, whatever that is.

    Raises WaitTimedOut, Detached, Unreachable, ApiProblem.
    """
    progress = _Progress(invocation.terminal, started)
    try:
        return _until_ended(invocation, started, until_s, progress)
    except KeyboardInterrupt:
        raise Detached(
            f"detached; {_title(started)} goes on",
            resume(started.operation.id),
            undo((started.operation,)),
        ) from None
    finally:
        progress.close()


def check_ended_in(name: str, operation: OperationView, wanted: frozenset[str]) -> None:
    """Raise OperationFailed unless the operation ended in a state that was wanted."""
    if operation.state in wanted:
        return
    problem = operation.error or ProblemView(title=f"the operation was {operation.state}")
    raise OperationFailed(problem, f"{operation.kind} of {name}")


def resume(*operation_ids: str) -> str:
    return f"novacron op wait {' '.join(operation_ids)}"


def undo(operations: Sequence[OperationView]) -> str:
    """Return the command that undoes those of the operations that can be; empty for none."""
    ids = [operation.id for operation in operations if operation.cancellable]
    return f"novacron op cancel {' '.join(ids)}" if ids else ""


def _await_all(
    invocation: Invocation,
    output: Output,
    started: Sequence[Started],
    done: Done,
    waiting: Waiting,
    failures: list[tuple[str, CliError]],
    wanted: frozenset[str],
) -> list[bytes]:
    bodies = []
    for index, each in enumerate(started):
        try:
            answer = await_operation(invocation, each, waiting.until_s)
            bodies.append(answer.body)
            operation = answer.decode(OperationView)
            check_ended_in(each.name, operation, wanted)
            if output.form is not Format.JSON:
                done(each.name, operation)
        except Detached as error:
            rest = [later.operation for later in started[index:]]
            again = resume(*(operation.id for operation in rest))
            raise Detached(str(error), again, undo(rest), failures) from None
        except CliError as error:
            failures.append((each.name, error))
    return bodies


def _cut_submitting(
    started: Sequence[Started], left: Sequence[str], failures: Sequence[tuple[str, CliError]]
) -> Detached:
    """Return what to say of Ctrl-C while the first of ``left`` was being submitted."""
    unsure, *later = left
    operations = [each.operation for each in started]
    told = [f"interrupted; {_title(each)} goes on" for each in started] or ["interrupted"]
    told.append(f"{unsure} may or may not have been accepted: look before you repeat it")
    if later:
        told.append(f"not submitted: {' '.join(later)}")
    again = resume(*(operation.id for operation in operations)) if operations else ""
    return Detached("\n".join(told), again, undo(operations), failures)


def _cut_looking(
    started: Sequence[Started], left: Sequence[str], failures: Sequence[tuple[str, CliError]]
) -> Detached:
    """Return what to say of Ctrl-C before the waiting for operations began."""
    operations = [each.operation for each in started]
    again = resume(*(operation.id for operation in operations), *left)
    return Detached("detached; nothing was changed", again, undo(operations), failures)


def _until_ended(
    invocation: Invocation, started: Started, until_s: float | None, progress: _Progress
) -> Answer:
    terminal = invocation.terminal
    answer, heard_at_s = started.answer, terminal.monotonic_s()
    while True:
        operation = answer.decode(OperationView)
        progress.show(operation)
        if operation.ended:
            return answer
        now_s = terminal.monotonic_s()
        if until_s is not None and now_s >= until_s:
            ended = _ended_meanwhile(invocation, operation.id)
            if ended is not None:
                return ended
            raise WaitTimedOut(
                f"{_title(started)} has not ended in time; it goes on", resume(operation.id)
            )
        if now_s > heard_at_s + PATIENCE_S:
            raise Unreachable(
                f"nobody has answered for {now_s - heard_at_s:.0f} s; {_title(started)} goes on",
                resume(operation.id),
            )
        fresh = _look(invocation, operation.id, until_s, now_s)
        if fresh is not None:
            answer, heard_at_s = fresh, terminal.monotonic_s()


def _look(
    invocation: Invocation, operation_id: str, until_s: float | None, now_s: float
) -> Answer | None:
    """Ask once, and let the API hold the answer back; None while nobody can answer."""
    left_s = math.inf if until_s is None else until_s - now_s
    wait_s = POLL_S if left_s >= POLL_S else max(1, math.ceil(left_s))
    path, query = path_of("operations", operation_id), (("wait", wait_s),)
    answer = _answer_of(lambda: invocation.client.get(path, query, wait_s))
    hurried = invocation.terminal.monotonic_s() - now_s < LOOK_PERIOD_S
    if hurried and (answer is None or not answer.decode(OperationView).ended):
        invocation.terminal.sleep(LOOK_PERIOD_S)
    return answer


def _ended_meanwhile(invocation: Invocation, operation_id: str) -> Answer | None:
    """Look once, without waiting, and return the answer if the operation has ended.

    The time of several targets may pass while the first is waited for: what is known of the others
    is then as old as their submission.
    """
    answer = _answer_of(lambda: invocation.client.get_once(path_of("operations", operation_id)))
    return answer if answer is not None and answer.decode(OperationView).ended else None


def _answer_of(ask: Callable[[], Answer]) -> Answer | None:
    """Return an answer, or None while nobody can answer; raises what does not pass by waiting."""
    try:
        return ask()
    except (Unreachable, ApiProblem) as error:
        if error.exit_with() is not Exit.UNREACHABLE:
            raise
    return None


def _print_json(output: Output, bodies: Sequence[bytes], *, single: bool) -> None:
    if not single:
        items = [msgspec.Raw(body) for body in bodies]
        output.json(msgspec.json.encode({"items": items}))
    elif bodies:
        output.json(bodies[0])


def _title(started: Started) -> str:
    return f"{started.operation.kind} of {started.name} ({started.operation.id})"


class _Progress:
    """One line that is rewritten on a terminal; elsewhere a line for each new phase."""

    def __init__(self, terminal: Terminal, started: Started) -> None:
        self._terminal = terminal
        self._head = f"{started.operation.kind} {started.name}"
        self._name = started.name
        self._began_s = terminal.monotonic_s()
        self._told: set[str] = set()

    def show(self, operation: OperationView) -> None:
        elapsed_s = self._terminal.monotonic_s() - self._began_s
        text = f"{self._head}: {_describe(operation)}"
        if self._terminal.stderr_is_tty:
            self._terminal.status(f"{text}  {elapsed_s:.0f}s")
        elif not operation.ended:
            self._tell_once(text)
        if operation.phase in {"place", "pending"} and elapsed_s >= PLACING_S:
            self._tell_once(
                f"{self._name} waits for a node that can run it: novacron vm explain {self._name}"
            )

    def close(self) -> None:
        if self._terminal.stderr_is_tty:
            self._terminal.status("")

    def _tell_once(self, text: str) -> None:
        if text in self._told:
            return
        self._told.add(text)
        if self._terminal.stderr_is_tty:
            self._terminal.status("")
        self._terminal.tell(text)


def _describe(operation: OperationView) -> str:
    words = [operation.state]
    if operation.phase and not operation.ended:
        done = sum(step.state == "done" for step in operation.steps)
        steps = f" ({done}/{len(operation.steps)})" if operation.steps else ""
        words.append(printable(operation.phase) + steps)
    progress = operation.progress
    if progress is not None and progress.percent is not None:
        words.append(f"{progress.percent:.0f}%")
    if progress is not None and progress.eta_s is not None:
        words.append(f"about {progress.eta_s:.0f}s left")
    return ", ".join(words)
