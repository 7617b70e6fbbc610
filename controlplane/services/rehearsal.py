"""Dry runs: a command decided on a draft that is thrown away, so that nothing can come of it.

What refuses the real write refuses its rehearsal, in the same words. A request that asks for a dry
run is given a rehearsal for its ``submit``: not even a use case that forgets what was asked for
could change anything.
"""

from __future__ import annotations

from controlplane.commands.draft import Command, Draft
from controlplane.commands.terms import Expected, OnTerms
from controlplane.services.context import Context, Result
from controlplane.state import ClusterState
from shared.clock import Clock


class Rehearsal:
    """Stands for ``submit``: decides, raises what the command raises, and writes nothing."""

    def __init__(self, state: ClusterState, clock: Clock, expected: Expected | None = None) -> None:
        self._state = state
        self._clock = clock
        self._expected = expected

    async def __call__(self, command: Command[Result]) -> Result:
        draft = Draft(self._state, _NoIds(), self._clock.now())
        return OnTerms(command=command, expected=self._expected).decide(draft).result


async def rehearse(context: Context, command: Command[Result]) -> Result:
    """Decide a command for nothing. Raises what deciding it raises."""
    submit = context.submit
    rehearsal = submit if isinstance(submit, Rehearsal) else Rehearsal(context.state, context.clock)
    return await rehearsal(command)


class _NoIds:
    """Names what will never be."""

    def new(self, kind: str) -> str:
        return f"{kind}-rehearsed"
