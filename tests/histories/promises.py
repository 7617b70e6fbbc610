"""What the API promises of a VM, as a register that each answer either fits or does not.

Taken from docs/api.md and docs/problems.md, and from the design that they describe:

- **Writes are linearizable, each VM's name being a register.** A create, change or delete that is
  answered with success takes effect once, at one moment between request and answer; a name is
  taken by one VM at a time. One whose outcome is unknown takes effect once, at any moment after
  the request, or never. One that is answered with 503 (but ``outcome_unknown``), or never reached
  a replica, has no effect at all.
- **If-Match is compared where the change is made.** Such a write succeeds only on the very version
  that the ETag names. An ETag names one version.
- **A refusal is true**: what is refused was not done. ``name_taken`` is decided by the leader: the
  name is taken at a moment between request and answer. ``not_found`` and ``precondition_failed``
  also depend on which VM the name means to the replica that is asked: they are as fresh as a read
  there.
- **A read shows a state that was committed** before its answer. A replica answers from its own
  memory, so without X-Novacron-Min-Revision it may be any earlier state, on the leader too: a
  leader that was suspended does not know at once that it leads no more. With the header the answer
  is not older than the moment that the revision stands for. A client that sends the newest revision
  it has seen (SESSION) never sees anything older than it has seen; one that sends the newest that
  anybody has seen (LATEST) sees all that was acknowledged or seen before it asked.
- **An answer to a change shows the VM after it**, perhaps with later changes; or says that it has
  been deleted since (``deleted_since``).
- **An answer's X-Novacron-Revision is the moment that it shows**: the state at a revision is one
  state, whoever is asked. Revisions and the numbers in ETags grow in the order of the commits, and
  an acknowledgement's is not before its commit. (For clients they are opaque; that they are ordered
  is what SESSION and LATEST rest on.)
- **A list is one moment**, named by its revision; so is a walk through its pages, at whichever
  replicas they are asked for.
- **A key is one change.** A request that is sent again with its Idempotency-Key is done once, and
  each answer tells of the same operation or VM; once one was acknowledged, every later one says
  that it is replayed.

The acts below are the steps of the register; ``registers.py`` makes them of a history's attempts.
Values are written once each, so a version is known by its value.
"""

from __future__ import annotations

from msgspec import Struct


class Register(Struct, frozen=True):
    """What a name is: the VM born as ``born``, last changed to ``value``; both empty: no VM."""

    born: str = ""
    value: str = ""

    def __str__(self) -> str:
        if not self.born:
            return "absent"
        return self.value if self.born == self.value else f"{self.value} (born {self.born})"


ABSENT = Register()


class Created(Struct, frozen=True):
    value: str

    @property
    def changes(self) -> bool:
        return True

    @property
    def needs(self) -> Register | None:
        return ABSENT

    def follow(self, now: Register) -> Register | None:
        return Register(self.value, self.value) if now == ABSENT else None

    def __str__(self) -> str:
        return f"creates {self.value}"


class Changed(Struct, frozen=True):
    """``only``: the version that it was for."""

    value: str
    only: Register | None = None

    @property
    def changes(self) -> bool:
        return True

    @property
    def needs(self) -> Register | None:
        return self.only

    def follow(self, now: Register) -> Register | None:
        if now == ABSENT or self.only not in (None, now):
            return None
        return Register(now.born, self.value)

    def __str__(self) -> str:
        return f"changes {self.only or 'whatever is there'} to {self.value}"


class Deleted(Struct, frozen=True):
    only: Register | None = None

    @property
    def changes(self) -> bool:
        return True

    @property
    def needs(self) -> Register | None:
        return self.only

    def follow(self, now: Register) -> Register | None:
        return None if now == ABSENT or self.only not in (None, now) else ABSENT

    def __str__(self) -> str:
        return f"deletes {self.only or 'whatever is there'}"


class Saw(Struct, frozen=True):
    """The state was this one."""

    state: Register

    @property
    def changes(self) -> bool:
        return False

    @property
    def needs(self) -> Register | None:
        return self.state

    def follow(self, now: Register) -> Register | None:
        return now if now == self.state else None

    def __str__(self) -> str:
        return f"sees {self.state}"


class SawOther(Struct, frozen=True):
    """The state was any but this one."""

    state: Register

    @property
    def changes(self) -> bool:
        return False

    @property
    def needs(self) -> Register | None:
        return None

    def follow(self, now: Register) -> Register | None:
        return now if now != self.state else None

    def __str__(self) -> str:
        return f"is told that it is not {self.state}"


Act = Created | Changed | Deleted | Saw | SawOther
