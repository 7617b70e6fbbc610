"""Makes a backup: what etcd has at one revision, and what this replica has of history up to then.

Left out is what belongs to processes: who leads, and which replicas are registered.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import datetime

from controlplane.backup.format import Header, Writing
from controlplane.store import keys
from controlplane.store.history import History
from controlplane.store.port import Listing, Store
from shared.codec import unpack
from shared.errors import Unavailable
from shared.model import Applied, Cluster


async def take(
    store: Store, history: History, cluster: Cluster, release: str, now: datetime
) -> AsyncGenerator[bytes]:
    """Yield the pieces of a backup; ``cluster`` is the record as this replica knows it.

    Raises Unavailable, Compacted and what the store raises, at any point: what was yielded by then
    lacks its end, and is no backup.
    """
    writing = Writing()
    reading = _Content(cluster)
    begun = False
    async with aclosing(store.scan(keys.ROOT)) as pages:
        async for page in pages:
            head = b"" if begun else writing.header(_header(cluster, page.revision, release, now))
            begun = True
            # Of a page nothing may be kept; an empty piece would be the end.
            if piece := head + reading.page(writing, page):
                yield piece
    reading.check()
    after = 0
    while bodies := await history.bodies(after, reading.last_seq):
        after = bodies[-1][0]
        yield b"".join(writing.entry(body) for _, body in bodies)
    yield writing.end()


class _Content:
    """What of the store's pages is kept, and that it is of the cluster that the header names."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._is_as_known = False
        self.last_seq = 0

    def page(self, writing: Writing, page: Listing) -> bytes:
        kept: list[bytes] = []
        for item in page.items:
            if item.key == keys.LEADER or item.key.startswith(keys.REPLICAS):
                continue
            if item.key == keys.CLUSTER:
                self._is_as_known = unpack(item.value, Cluster) == self._cluster
            elif item.key == keys.MARK:
                self.last_seq = unpack(item.value, Applied).seq
            kept.append(writing.key(item.key, item.value))
        return b"".join(kept)

    def check(self) -> None:
        """Raise Unavailable unless the header tells what was found."""
        if not self._is_as_known:
            raise Unavailable("the cluster's own record is being changed: ask again")


def _header(cluster: Cluster, revision: int, release: str, now: datetime) -> Header:
    return Header(
        cluster=cluster.id,
        cell=cluster.cell,
        epoch=cluster.epoch,
        revision=revision,
        schema_level=cluster.schema_level,
        release=release,
        made_at=now,
    )
