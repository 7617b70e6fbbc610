"""What was ever written to etcd, read from its first revision on: nothing was compacted here."""

from __future__ import annotations

from collections import Counter

from controlplane.store import keys
from controlplane.store.etcd_pool import EtcdStore
from shared.codec import unpack
from shared.model import FinishedOperation, HistoryEntry


async def history_written(store: EtcdStore) -> list[tuple[int, HistoryEntry]]:
    """Return all entries of history with their ``seq``, in the order they were written.

    An entry that was written twice is there twice.
    """
    last_revision = (await store.list(keys.MARK)).revision
    written: list[tuple[int, HistoryEntry]] = []
    batches = store.watch(keys.ROOT, 1)
    try:
        async for batch in batches:
            for item in sorted(batch.puts, key=lambda item: (item.mod_revision, item.key)):
                if item.key.startswith(keys.HISTORY):
                    entry: HistoryEntry = unpack(item.value, HistoryEntry)  # type: ignore[arg-type]
                    written.append((keys.history_seq(item.key), entry))
            if batch.revision >= last_revision:
                break
    finally:
        await batches.aclose()
    return written


async def check_history(store: EtcdStore) -> Counter[str]:
    """Check that history is dense and return how often each operation ended."""
    written = await history_written(store)
    numbers = list(range(1, len(written) + 1))
    assert [seq for seq, _ in written] == [entry.seq for _, entry in written] == numbers
    return Counter(e.operation.id for _, e in written if isinstance(e, FinishedOperation))
