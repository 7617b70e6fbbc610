"""A watch that outlives its member.

A stream that ends, or that stays silent although it was asked for a sign of life, is given up and
taken up again on another member right after the last revision delivered. So nothing is missed,
and what arrives twice is dropped.

Progress is never taken to mean "complete up to": etcd 3.4 answers a progress request with the
store's revision even while the watch is behind it (etcd issue 15220). It proves that the stream
lives, and nothing more.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator

from controlplane.store.etcd_members import BACKOFF, Members
from controlplane.store.etcd_rpc import (
    Event,
    MemberRpc,
    WatchAnswer,
    WatchStart,
    WatchStream,
    prefix_end,
)
from controlplane.store.port import WatchBatch
from shared.errors import Compacted, OutcomeUnknown, StoreUnavailable, WatchLost


async def watch(
    members: Members, prefix: str, from_revision: int, rng: random.Random
) -> AsyncGenerator[WatchBatch]:
    """Yield one batch for each revision that changed the prefix, and empty ones as heartbeats.

    Goes on for ever. Raises Compacted when ``from_revision``, or what is next after a member
    failed, is gone.
    """
    loop = asyncio.get_running_loop()
    seen = from_revision - 1
    delays = BACKOFF.delays(rng)
    while True:
        try:
            member = await members.choose(loop.time() + members.limits.watch_silence_s)
            start = WatchStart(prefix, prefix_end(prefix), seen + 1)
            async with contextlib.aclosing(_answers(members, member, start)) as answers:
                async for answer in answers:
                    delays = BACKOFF.delays(rng)
                    for batch in _batches(answer, seen):
                        seen = batch.revision
                        yield batch
        except (WatchLost, StoreUnavailable, OutcomeUnknown):
            await asyncio.sleep(next(delays))


async def _answers(
    members: Members, member: MemberRpc, start: WatchStart
) -> AsyncGenerator[WatchAnswer]:
    """Yield what one stream says after its creation. Raises WatchLost and Compacted."""
    try:
        stream = await member.watch(start, members.limits.watch_silence_s)
        try:
            while True:
                answer = await _receive(stream, members.limits.watch_silence_s)
                members.verify_cluster(member, answer.header)
                if answer.compact_revision:
                    raise Compacted(answer.compact_revision)
                if answer.canceled:
                    raise WatchLost(f"{member.endpoint} ended the watch: {answer.reason}")
                if not answer.created:
                    yield answer
        finally:
            await stream.close()
    except (WatchLost, StoreUnavailable, OutcomeUnknown) as error:
        members.failed(member, error)
        raise


async def _receive(stream: WatchStream, silence_s: float) -> WatchAnswer:
    """Return the next message; ask for one after a period of silence, give up after two."""
    reading = asyncio.create_task(_next(stream), name="etcd-watch-read")
    try:
        if not await _done_within(reading, silence_s):
            async with asyncio.timeout(silence_s):
                await stream.send_progress_request()
            if not await _done_within(reading, silence_s):
                raise WatchLost(f"the watch was silent for {2 * silence_s:g} s")
        return reading.result()
    except TimeoutError as error:
        raise WatchLost("the watch takes no progress request") from error
    finally:
        if not reading.done():
            reading.cancel()
            await asyncio.wait({reading})


async def _next(stream: WatchStream) -> WatchAnswer:
    return await stream.receive()


async def _done_within(task: asyncio.Task[WatchAnswer], limit_s: float) -> bool:
    done, _ = await asyncio.wait({task}, timeout=limit_s)
    return bool(done)


def _batches(answer: WatchAnswer, seen: int) -> list[WatchBatch]:
    """Return a batch for each revision after ``seen``, or one without changes as a heartbeat.

    A revision holds a key at most once, so within it the order of puts and deletes says nothing.
    """
    if not answer.events:
        return [WatchBatch(seen, (), ())]
    revisions: dict[int, list[Event]] = {}
    for event in answer.events:
        if event.kv.mod_revision > seen:
            revisions.setdefault(event.kv.mod_revision, []).append(event)
    return [_batch(revision, revisions[revision]) for revision in sorted(revisions)]


def _batch(revision: int, events: list[Event]) -> WatchBatch:
    return WatchBatch(
        revision,
        tuple(event.kv for event in events if not event.deleted),
        tuple(event.kv.key for event in events if event.deleted),
    )
