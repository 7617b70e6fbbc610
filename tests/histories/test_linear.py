"""The search for an order: right histories have one, wrong ones are judged as by brute force.

Histories are made from an order that there was: each step happens at a moment, and its beginning
and its end lie before and after that.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.histories.linear import Act, SearchTooLong, Step, find_order, least
from tests.histories.promises import (
    ABSENT,
    Changed,
    Created,
    Deleted,
    Register,
    Saw,
    SawOther,
)
from tests.histories.registers import coming_back, sharpened

Steps = list[Step[Register]]
SEEDS = st.integers(min_value=0, max_value=2**32)


def made(seed: int, length: int, reach: int = 30, unknown: float = 0.2) -> Steps:
    """Return steps that happened in the order of their ids, ten apart.

    They begin and end up to ``reach`` away; some that changed something have no end, some others
    that have none did not happen at all.
    """
    rng = random.Random(seed)
    now = ABSENT
    steps: Steps = []
    for number in range(length):
        act = _possible(rng, now, f"v{number}")
        happens = rng.random() > unknown / 2 or not act.changes
        after = act.follow(now) if happens else now
        assert after is not None
        now = after
        moment = number * 10
        end: int | None = moment + rng.randrange(reach)
        if act.changes and (not happens or rng.random() < unknown):
            end = None
        steps.append(Step(id=number, act=act, begin=moment - rng.randrange(reach), end=end))
    return steps


def _possible(rng: random.Random, now: Register, value: str) -> Act[Register]:
    """Return a step that fits the state."""
    other = Register("v0", "v0") if now != Register("v0", "v0") else ABSENT
    acts: list[Act[Register]] = [Saw(now), SawOther(other)]
    if now == ABSENT:
        acts += [Created(value)] * 3
    else:
        acts += [Changed(value), Changed(value, now), Changed(value, now), Deleted(), Deleted(now)]
    return rng.choice(acts)


def has_order(steps: Sequence[Step[Register]]) -> bool:
    """Search as histories are searched, with all that is known of registers."""
    sharp = sharpened(steps)
    return find_order(sharp, ABSENT, coming_back(sharp)) is None


def has_order_by_brute_force(steps: Sequence[Step[Register]]) -> bool:
    """Try every order of every choice of the steps that may not have happened."""
    sure = [step for step in steps if step.end is not None]
    unsure = [step for step in steps if step.end is None]
    choices = (some for size in range(len(unsure) + 1) for some in combinations(unsure, size))
    return any(_fits(order) for some in choices for order in permutations([*sure, *some]))


def _fits(order: Sequence[Step[Register]]) -> bool:
    state: Register | None = ABSENT
    for position, step in enumerate(order):
        later = order[position + 1 :]
        if any(each.end is not None and each.end < step.begin for each in later):
            return False
        if any(each.id in step.after for each in later):
            return False
        state = step.act.follow(state) if state is not None else None
    return state is not None


@given(SEEDS, st.integers(min_value=0, max_value=40))
@settings(max_examples=300, deadline=None)
def test_what_happened_in_an_order_has_one(seed: int, length: int) -> None:
    assert has_order(made(seed, length))


@given(SEEDS, st.integers(min_value=1, max_value=7), st.data())
@settings(max_examples=400, deadline=None)
def test_spoilt_histories_are_judged_as_by_brute_force(
    seed: int, length: int, data: st.DataObject
) -> None:
    steps = made(seed, length)
    rng = random.Random(seed)
    for _ in range(data.draw(st.integers(min_value=1, max_value=3))):
        _spoil(rng, steps)
    by_brute_force = has_order_by_brute_force(steps)
    assert has_order(steps) == by_brute_force
    assert (find_order(steps, ABSENT) is None) == by_brute_force


def _spoil(rng: random.Random, steps: Steps) -> None:
    """Change what one step did, saw, when, or after which others."""
    at = rng.randrange(len(steps))
    step = steps[at]
    other = rng.choice(steps)
    values = [f"v{number}" for number in range(len(steps))]
    state = rng.choice([ABSENT, Register(rng.choice(values), rng.choice(values))])
    end = step.end or step.begin + 20
    steps[at] = rng.choice(
        [
            replace(step, act=Saw(state), end=end),
            replace(step, act=SawOther(state), end=end),
            replace(step, act=Deleted(rng.choice([None, state]))),
            replace(step, act=Changed(rng.choice(values), rng.choice([None, state]))),
            replace(step, act=Created(rng.choice(values))),
            replace(step, act=other.act, end=end),
            replace(step, begin=other.begin, end=max(end, other.begin)),
            replace(step, after=(other.id,) if other is not step and other.end else ()),
        ]
    )


@given(SEEDS)
@settings(max_examples=100, deadline=None)
def test_few_steps_tell_of_a_violation(seed: int) -> None:
    steps = made(seed, 60)
    steps.append(Step(id=60, act=Saw(Register("never", "never")), begin=605, end=610))
    few = least(sharpened(steps), ABSENT, coming_back(steps))
    assert not has_order(few)
    assert [step.id for step in few if not step.act.changes] == [60]


def test_a_violation_says_where_it_got_stuck() -> None:
    steps: Steps = [
        Step(id=1, act=Created("v1"), begin=0, end=1),
        Step(id=2, act=Saw(Register("v2", "v2")), begin=2, end=3),
        Step(id=3, act=Deleted(), begin=4, end=5),
    ]
    stuck = find_order(steps, ABSENT)
    assert stuck is not None
    assert (stuck.taken, stuck.state, stuck.step.id) == ((1,), Register("v1", "v1"), 2)


@pytest.mark.parametrize("seed", range(5))
def test_a_long_history_of_one_name_takes_few_looks(seed: int) -> None:
    """500 steps, some four of them at a time, every sixth write of unknown outcome."""
    steps = sharpened(made(seed, 500, reach=40, unknown=0.17))
    assert find_order(steps, ABSENT, coming_back(steps), looks_max=20_000) is None


def test_a_search_that_goes_astray_says_so() -> None:
    steps: Steps = [Step(id=i, act=Created(f"v{i}"), begin=0, end=None) for i in range(12)]
    steps += [Step(id=20 + i, act=Deleted(), begin=0, end=None) for i in range(12)]
    steps.append(Step(id=50, act=Saw(Register("never", "never")), begin=1, end=2))
    with pytest.raises(SearchTooLong):
        find_order(steps, ABSENT, looks_max=1000)
