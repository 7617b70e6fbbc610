"""When a transfer may take more downtime, and when it is given up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.convergence import (
    DOWNTIME_FIRST_MS,
    DOWNTIME_STEPS,
    PASSES_BEFORE_STEPS,
    STALL_LIMIT_S,
    STEP_COOLDOWN_S,
    Convergence,
    Surrender,
)
from agent.hypervisor import Transfer

TOTAL = 1000
LOOK_PERIOD_S = 0.5


def at(remaining: int, *, total: int = TOTAL, iteration: int = PASSES_BEFORE_STEPS) -> Transfer:
    return Transfer(
        bytes_done=total - remaining,
        bytes_total=total,
        bytes_remaining=remaining,
        iteration=iteration,
        bytes_per_s=1.0,
    )


NOTHING_KNOWN = at(0, total=0, iteration=0)


def convergence(max_downtime_ms: int = 500, timeout_s: float = 10_000.0) -> Convergence:
    return Convergence(max_downtime_ms=max_downtime_ms, timeout_s=timeout_s, began_s=0.0)


def ladder(it: Convergence, iteration: int = PASSES_BEFORE_STEPS) -> list[int]:
    """Return each downtime that is allowed over ten cool-downs, with always less to move."""
    seen = [it.downtime_ms]
    looks = int(10 * STEP_COOLDOWN_S / LOOK_PERIOD_S)
    for look in range(1, looks + 1):
        assert it.take(at(TOTAL - look, iteration=iteration), look * LOOK_PERIOD_S) is None
        if it.downtime_ms != seen[-1]:
            seen.append(it.downtime_ms)
    return seen


def test_the_downtime_rises_in_equal_steps_to_the_limit() -> None:
    assert ladder(convergence(500)) == [150, 220, 290, 360, 430, 500]
    assert len(ladder(convergence(1000))) == DOWNTIME_STEPS + 1


def test_steps_have_a_cooldown_between_them() -> None:
    it = convergence()
    assert it.take(at(900), STEP_COOLDOWN_S - 0.1) is None
    assert it.downtime_ms == DOWNTIME_FIRST_MS
    it.take(at(899), STEP_COOLDOWN_S)
    first = it.downtime_ms
    assert first > DOWNTIME_FIRST_MS
    it.take(at(898), 2 * STEP_COOLDOWN_S - 0.1)
    assert it.downtime_ms == first


def test_the_first_passes_say_nothing_about_the_guest() -> None:
    assert ladder(convergence(), iteration=PASSES_BEFORE_STEPS - 1) == [DOWNTIME_FIRST_MS]


@pytest.mark.parametrize("limit_ms", [1, 100, 149, 150])
def test_a_limit_below_the_first_step_is_all_that_is_ever_allowed(limit_ms: int) -> None:
    assert ladder(convergence(limit_ms)) == [limit_ms]


@given(
    limit_ms=st.integers(1, 10_000),
    looks=st.lists(
        st.tuples(
            st.floats(0.0, 60.0), st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 9)
        ),
        max_size=60,
    ),
)
def test_never_is_more_allowed_than_the_limit_and_never_less_than_before(
    limit_ms: int, looks: list[tuple[float, int, int, int]]
) -> None:
    it = convergence(limit_ms)
    before, now_s = it.downtime_ms, 0.0
    assert 0 < before <= limit_ms
    for passed_s, remaining, total, iteration in looks:
        now_s += passed_s
        it.take(at(remaining, total=total, iteration=iteration), now_s)
        assert before <= it.downtime_ms <= limit_ms
        before = it.downtime_ms


def test_what_takes_too_long_is_given_up() -> None:
    it = convergence(timeout_s=60.0)
    assert it.take(at(10), 59.9) is None
    assert it.take(at(9), 60.0) is Surrender.TIMED_OUT


def test_what_comes_no_closer_is_given_up() -> None:
    it = convergence()
    assert it.take(at(500), 10.0) is None
    assert it.take(at(500), 10.0 + STALL_LIMIT_S - 0.1) is None
    assert it.take(at(501), 10.0 + STALL_LIMIT_S) is Surrender.STALLED


def test_any_step_closer_starts_the_wait_anew() -> None:
    it = convergence()
    for round_number in range(5):
        now_s = round_number * (STALL_LIMIT_S - 1.0)
        assert it.take(at(500 - round_number), now_s) is None
    assert it.take(at(700), now_s + STALL_LIMIT_S - 1.0) is None, "a new pass begins higher"


def test_while_nothing_is_known_nothing_stalls() -> None:
    """libvirt tells of nothing to move until the destination is ready; that is not "all moved"."""
    it = convergence()
    for look in range(4):
        assert it.take(NOTHING_KNOWN, look * STALL_LIMIT_S) is None
    began_s = 3 * STALL_LIMIT_S
    assert it.take(at(900, iteration=1), began_s) is None
    assert it.take(at(800, iteration=1), began_s + STALL_LIMIT_S) is None


def test_memory_that_follows_disks_is_measured_by_itself() -> None:
    """The last of the disks leaves less to move than memory does for a long time."""
    it = convergence()
    assert it.take(at(TOTAL, iteration=0), 0.0) is None
    assert it.take(at(1, iteration=0), 1.0) is None
    assert it.take(at(TOTAL, total=2 * TOTAL, iteration=1), 1.5) is None
    assert it.take(at(TOTAL - 1, total=2 * TOTAL, iteration=1), STALL_LIMIT_S) is None
    assert it.take(at(TOTAL - 2, total=2 * TOTAL, iteration=1), 2 * STALL_LIMIT_S - 1) is None
    assert it.take(at(TOTAL, iteration=2), 3 * STALL_LIMIT_S) is Surrender.STALLED


def test_disks_that_come_no_closer_are_given_up_too() -> None:
    it = convergence()
    assert it.take(at(500, iteration=0), 0.0) is None
    assert it.take(at(500, iteration=0), STALL_LIMIT_S) is Surrender.STALLED
