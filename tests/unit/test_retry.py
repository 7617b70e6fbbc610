"""Back-off: bounded, growing, and never together."""

from __future__ import annotations

import random
from itertools import islice

from shared.retry import Backoff


def test_delays_double_up_to_the_cap() -> None:
    bounds = [0.0] * 8
    for seed in range(2000):
        delays = Backoff(first_s=1.0, cap_s=30.0).delays(random.Random(seed))
        bounds = [max(pair) for pair in zip(bounds, islice(delays, 8), strict=True)]

    assert [round(bound) for bound in bounds] == [1, 2, 4, 8, 16, 30, 30, 30]


def test_two_that_fail_together_do_not_try_again_together() -> None:
    first, second = (Backoff(1.0, 30.0).delays(random.Random(seed)) for seed in (1, 2))
    assert list(islice(first, 5)) != list(islice(second, 5))
