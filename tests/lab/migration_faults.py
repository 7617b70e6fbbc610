"""Which fault is done to whom at which moment of a migration: all pairs, and why some cannot be.

`python -m tests.lab.migration_faults` prints the table. Plain data: it does nothing to anybody.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

from msgspec import Struct


class Fault(enum.Enum):
    """What is done; all but a kill is undone again. A hang outlasts libvirt's patience of 30 s."""

    KILL = "kill"
    STOP = "stop"
    HANG = "hang"
    CUT = "cut"
    OUTAGE = "outage"


class Victim(enum.Enum):
    SOURCE_AGENT = "source-agent"
    DESTINATION_AGENT = "destination-agent"
    SOURCE_LIBVIRTD = "source-libvirtd"
    DESTINATION_LIBVIRTD = "destination-libvirtd"
    SOURCE_QEMU = "source-qemu"
    DESTINATION_QEMU = "destination-qemu"
    SOURCE_RELAY = "source-relay"
    DESTINATION_RELAY = "destination-relay"
    REPLICA = "replica"
    ETCD = "etcd"
    NETWORK = "network"


class Moment(enum.Enum):
    """The step whose record has just been written; within the transfer, what libvirt has told."""

    ADMIT = "admit"
    PRECHECK = "precheck"
    CLAIM = "claim"
    PREPARE = "prepare"
    TRANSFER = "transfer"
    MIDDLE = "transfer-middle"
    ARRIVED = "transfer-arrived"
    RESUMED = "transfer-resumed"
    SWITCH = "switch"
    FINALIZE = "finalize"


class Pair(Struct, frozen=True):
    fault: Fault
    victim: Victim
    moment: Moment

    @property
    def id(self) -> str:
        return f"{self.fault.value}-{self.victim.value}-{self.moment.value}"


# How long what is stopped or cut stays so. A session is silent after a few seconds; libvirt gives
# a connection up after 30 s without an answer.
STAYS_S: dict[Fault, float] = {
    Fault.KILL: 0.0,
    Fault.STOP: 8.0,
    Fault.HANG: 40.0,
    Fault.CUT: 8.0,
    Fault.OUTAGE: 40.0,
}
_OF_NETWORK = frozenset({Fault.CUT, Fault.OUTAGE})
_LONG = frozenset({Fault.HANG, Fault.OUTAGE})
# In these libvirt has connections that it may give up.
_UNDER_WAY = frozenset({Moment.MIDDLE, Moment.RESUMED})
_CONNECTED = frozenset(
    {
        Victim.SOURCE_LIBVIRTD,
        Victim.DESTINATION_LIBVIRTD,
        Victim.SOURCE_QEMU,
        Victim.DESTINATION_QEMU,
        Victim.SOURCE_RELAY,
        Victim.DESTINATION_RELAY,
        Victim.NETWORK,
    }
)
_RELAYS = frozenset({Victim.SOURCE_RELAY, Victim.DESTINATION_RELAY})
_BEFORE_TRANSFER = frozenset({Moment.ADMIT, Moment.PRECHECK, Moment.CLAIM, Moment.PREPARE})
# The records of the last two steps are written within milliseconds, the source ends later.
_BEFORE_END_OF_SOURCE = frozenset({Moment.RESUMED, Moment.SWITCH, Moment.FINALIZE})
_BEFORE_CONNECTION = _BEFORE_TRANSFER | {Moment.TRANSFER}

# What runs with every `./dev test`: each victim, each step, each kind of fault at least once.
SAMPLE = frozenset(
    {
        "kill-source-agent-transfer-middle",
        "kill-source-agent-switch",
        "kill-destination-agent-prepare",
        "kill-destination-agent-transfer-resumed",
        "kill-source-libvirtd-transfer-middle",
        "kill-destination-libvirtd-transfer-resumed",
        "kill-source-qemu-transfer",
        "kill-destination-qemu-transfer-middle",
        "kill-replica-claim",
        "kill-etcd-finalize",
        "cut-network-transfer-middle",
    }
)


def all_pairs() -> list[Pair]:
    """Return every combination that makes sense as a question, also those that cannot be."""
    return [
        Pair(fault, victim, moment)
        for victim in Victim
        for fault in Fault
        if (fault in _OF_NETWORK) == (victim is Victim.NETWORK)
        for moment in Moment
        # A few milliseconds before the guest is resumed: for tests of that window alone.
        if moment is not Moment.ARRIVED
        if fault not in _LONG or (moment in _UNDER_WAY and victim in _CONNECTED)
    ]


def possible_pairs() -> list[Pair]:
    return [pair for pair in all_pairs() if not why_impossible(pair)]


def why_impossible(pair: Pair) -> str:
    """Return why there is no such fault; empty when there is."""
    if pair.victim is Victim.DESTINATION_QEMU and pair.moment in _BEFORE_CONNECTION:
        return "the destination's libvirtd starts it only when the source's has connected"
    if pair.victim in _RELAYS and pair.moment in _BEFORE_TRANSFER:
        return "relays are started by the transfer"
    if pair.victim is Victim.SOURCE_RELAY and pair.moment is Moment.TRANSFER:
        return "it is started a few milliseconds after the record of the step"
    if pair.victim is Victim.DESTINATION_RELAY and pair.moment is Moment.TRANSFER:
        return "it is started when the source's relay has connected"
    return ""


def restarts(pair: Pair) -> int:
    """Return how often the guest that moves has to be started again after a fault.

    Its QEMU is the one that it runs in at the moment; killed with it, nothing can save it.
    """
    if pair.fault is not Fault.KILL:
        return 0
    arrived = pair.moment in _BEFORE_END_OF_SOURCE
    if pair.victim is Victim.SOURCE_QEMU:
        return 0 if arrived else 1
    return 1 if pair.victim is Victim.DESTINATION_QEMU and arrived else 0


def may_split(pair: Pair) -> bool:
    """Say whether libvirt itself lets the source's guest go on beside the destination's.

    It does when the way between the two libvirtds ends in that moment; the agent's reflex then
    holds the source's guest within some 10 to 20 ms (`test_migration_windows.py` measures it).
    """
    if pair.moment not in _BEFORE_END_OF_SOURCE:
        return False
    ended = pair.victim in _RELAYS | {Victim.DESTINATION_LIBVIRTD}
    given_up = pair.fault in _LONG and pair.victim in _CONNECTED
    return given_up or (pair.fault is Fault.KILL and ended)


def table(pairs: Iterable[Pair]) -> list[str]:
    """Return a line for each pair: in which suite it runs, or why it cannot be."""
    lines = []
    for pair in pairs:
        why = why_impossible(pair)
        runs = "every test run" if pair.id in SAMPLE else "long suite"
        lines.append(f"{pair.id:48} {f'cannot be: {why}' if why else runs}")
    return lines


if __name__ == "__main__":
    everything = all_pairs()
    print("\n".join(table(everything)))
    print(f"{len(possible_pairs())} of {len(everything)} pairs can be; {len(SAMPLE)} run each time")
