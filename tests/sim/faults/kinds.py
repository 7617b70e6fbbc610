"""Every kind of fault, and every pair of one with a step of a saga."""

from __future__ import annotations

from tests.sim.aim import TARGETS, Target
from tests.sim.faults import links, moves, nodes, processes, store, time
from tests.sim.faults.scene import Fault

FAULTS: tuple[Fault, ...] = (
    processes.crash_replica,
    processes.crash_replica_somewhere,
    processes.pause_replica,
    processes.crash_agent,
    processes.crash_agent_somewhere,
    processes.pause_agent,
    nodes.lose_power,
    nodes.lose_libvirtd,
    nodes.hang_libvirtd,
    nodes.lie_of_failure,
    nodes.lie_of_success,
    nodes.lose_events,
    nodes.slow_agent_disk,
    nodes.slow_replica_disk,
    store.crash_member,
    store.pause_member,
    store.slow_member,
    store.lose_answers,
    store.lose_requests,
    store.stale_reads,
    store.silence_watches,
    store.lose_watch_events,
    store.expire_leases,
    store.fill_store,
    links.cut_node,
    links.cut_member,
    links.cut_nodes,
    links.isolate_replica,
    links.slow_links,
    links.break_streams,
    links.half_open_streams,
    time.drift_clock,
    time.jump_date,
    moves.break_relay,
    moves.fail_libvirtd_at_switch,
    moves.isolate_source_at_switch,
)
# Neighbours differ in both, so that no seed is spent on one kind of fault or on one step.
ALL_PAIRS: tuple[tuple[Fault, Target], ...] = tuple(
    (FAULTS[(number + turn) % len(FAULTS)], TARGETS[number])
    for turn in range(len(FAULTS))
    for number in range(len(TARGETS))
)
