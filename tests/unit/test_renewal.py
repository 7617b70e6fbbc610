"""When an agent renews its certificates, and what it does while it gets none."""

from __future__ import annotations

import asyncio
import logging
import random
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from agent.identity_files import IdentityFiles, Validity
from agent.renewal import LOOK_S, RETRY_MAX_S, CertificateRenewal
from shared.admission import Issued, Renewal, RenewalAnswer, RenewalRefused
from shared.errors import ConfigInvalid, Disconnected, FieldError, Unauthenticated
from shared.offload import inline
from shared.problems import problem_of
from tests.sim.virtual_loop import run_virtual

BORN = datetime(2026, 11, 1, tzinfo=UTC)
WEEK = timedelta(days=7)
DAY_S = 86_400.0


class LoopClock:
    """The date goes with the loop, by as much as the machine's clock is off."""

    def __init__(self) -> None:
        self.off = timedelta()

    def now(self) -> datetime:
        return BORN + self.off + timedelta(seconds=asyncio.get_running_loop().time())

    def boottime_s(self) -> float:
        return asyncio.get_running_loop().time()


class Disk:
    """The files of a node, as far as the renewal looks at them."""

    def __init__(self) -> None:
        self.are_own = True
        self.valid = Validity(BORN, BORN + WEEK)
        self.written: list[tuple[str, str, Issued]] = []

    def validity(self) -> Validity:
        return self.valid

    def qemu_key(self) -> str:
        return "QEMU's key"

    def replace(self, key: str, qemu_key: str, issued: Issued) -> None:
        self.written.append((key, qemu_key, issued))
        self.valid = Validity(issued.expires_at - WEEK, issued.expires_at)


class Site:
    """A renewal, and a control plane that answers as the test says."""

    def __init__(self) -> None:
        self.clock, self.disk = LoopClock(), Disk()
        self.asked: list[tuple[float, str]] = []
        self.away = False
        self.refuses = False
        self.used = self.looked = 0
        self.unreadable = False
        self.keys = 0
        self.renewal = CertificateRenewal(
            cast(IdentityFiles, self.disk),
            ("r1:8444", "r2:8444", "r3:8444"),
            self._ask,
            self._make_request,
            self._use,
            inline,
            self.clock,
            random.Random(1),
        )
        self.running = asyncio.ensure_future(self.renewal.run())

    async def _make_request(self, key: str) -> tuple[str, str]:
        self.keys += 1
        made = key or f"key {self.keys}"
        return made, f"request for {made}"

    async def _ask(self, address: str, renewal: Renewal) -> RenewalAnswer:
        self.asked.append((asyncio.get_running_loop().time(), address))
        assert renewal.qemu_request == "request for QEMU's key"
        if self.away:
            raise Disconnected("nobody listens")
        if self.refuses:
            return RenewalRefused(problem=problem_of(Unauthenticated("it was revoked")))
        true_now = BORN + timedelta(seconds=asyncio.get_running_loop().time())
        return Issued(
            certificate="",
            qemu_certificate="",
            ca="",
            peers_ca="",
            qemu_ca="",
            expires_at=true_now + WEEK,
        )

    async def _use(self) -> None:
        self.looked += 1
        if len(self.disk.written) > self.used:
            self.used += 1
        if self.unreadable:
            raise ConfigInvalid("of TLS", (FieldError("/tls/key", "unreadable", "it is gone"),))

    def times(self) -> list[float]:
        return [at / DAY_S for at, _ in self.asked]


def run(test: Any) -> None:
    async def alone() -> None:
        site = Site()
        await test(site)
        site.running.cancel()

    run_virtual(alone())


def test_a_certificate_is_renewed_after_half_of_its_time() -> None:
    async def test(site: Site) -> None:
        await asyncio.sleep(3.4 * DAY_S)
        assert not site.asked
        await asyncio.sleep(1.0 * DAY_S)
        ((at, _),) = site.asked
        assert 3.5 <= at / DAY_S <= 4.2
        assert site.used == 1
        ((key, qemu_key, _),) = site.disk.written
        assert (key, qemu_key) == ("key 1", "QEMU's key")
        await asyncio.sleep(7 * DAY_S)
        assert len({key for key, _, _ in site.disk.written}) == len(site.disk.written) >= 2

    run(test)


def test_an_outage_of_days_is_outlived_with_few_questions(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test(site: Site) -> None:
        site.away = True
        await asyncio.sleep(6.5 * DAY_S)
        assert {address for _, address in site.asked} == {"r1:8444", "r2:8444", "r3:8444"}
        assert len(site.asked) < 3 * 3 * DAY_S / (RETRY_MAX_S / 2)
        site.away = False
        await asyncio.sleep(RETRY_MAX_S)
        assert site.used == 1

    with caplog.at_level(logging.WARNING):
        run(test)
    levels = [record.levelno for record in caplog.records]
    assert levels.count(logging.ERROR) > 1, "a quarter is left, and it is said louder"
    assert levels[0] == logging.WARNING


def test_one_that_has_ended_says_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    async def test(site: Site) -> None:
        site.refuses = True
        await asyncio.sleep(8 * DAY_S)

    with caplog.at_level(logging.ERROR):
        run(test)
    assert "run novacron-agent join" in caplog.records[-1].getMessage()
    assert "it was revoked" in caplog.records[-1].getMessage()


@pytest.mark.parametrize("off_days", [-2, 2, 30], ids=["behind", "ahead", "far ahead"])
def test_a_clock_that_is_days_off_makes_no_storm(off_days: int) -> None:
    async def test(site: Site) -> None:
        site.clock.off = timedelta(days=off_days)
        await asyncio.sleep(14 * DAY_S)
        assert 1 <= site.used <= 9
        true_end = (site.disk.valid.ends_at - BORN).total_seconds()
        assert true_end > asyncio.get_running_loop().time(), "it is good at the control plane"

    run(test)


def test_a_clock_that_jumps_is_noticed_soon() -> None:
    async def test(site: Site) -> None:
        await asyncio.sleep(DAY_S)
        site.clock.off = timedelta(days=4)
        await asyncio.sleep(2 * LOOK_S)
        assert site.used == 1

    run(test)


def test_one_that_is_refused_looks_whether_its_node_has_joined_anew() -> None:
    async def test(site: Site) -> None:
        site.refuses = True
        site.renewal.renew_now()
        await asyncio.sleep(1)
        assert site.looked == 1
        # What is there may be half of a join, and must not end the agent.
        site.unreadable = True
        await asyncio.sleep(DAY_S)
        assert not site.running.done()

    run(test)


def test_it_renews_when_it_is_told_to() -> None:
    async def test(site: Site) -> None:
        await asyncio.sleep(60)
        site.renewal.renew_now()
        await asyncio.sleep(1)
        assert site.used == 1

    run(test)


def test_files_that_somebody_else_writes_are_left_alone_and_their_end_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test(site: Site) -> None:
        site.disk.are_own = False
        site.running.cancel()
        site.running = asyncio.ensure_future(site.renewal.run())
        await asyncio.sleep(5 * DAY_S)
        assert not caplog.records
        await asyncio.sleep(3 * DAY_S)
        assert not site.asked

    with caplog.at_level(logging.WARNING):
        run(test)
    assert "nobody renews it" in caplog.records[0].getMessage()
    assert "ended at" in caplog.records[-1].getMessage()
    assert len(caplog.records) < 4 * 24


def test_a_clock_that_is_behind_its_certificate_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async def test(site: Site) -> None:
        site.clock.off = timedelta(days=-2)
        await asyncio.sleep(60)

    with caplog.at_level(logging.ERROR):
        run(test)
    assert "2026-10-30T00:00:00" in caplog.text
    assert "set the clock" in caplog.text
