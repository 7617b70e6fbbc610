"""`novacron cluster restore`, wired: it runs in the place of a replica that is stopped.

Nothing is written before every fault has been looked for, and whoever asked has agreed to what is
going to be done.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from msgspec import Struct

from controlplane.backup.file import BackupFile
from controlplane.backup.format import Summary
from controlplane.backup.into_etcd import Present, look, refusals, write
from controlplane.backup.restoration import Restoration, make_restoration, new_epoch
from controlplane.config import DEFAULT_CONFIG, ControlPlaneConfig
from controlplane.replica_files import etcd_tls, history_file, only_process, read_founding
from controlplane.store.etcd_pool import connect
from controlplane.store.history import History
from shared.clock import Clock
from shared.config import load_config
from shared.errors import (
    ConfigInvalid,
    FieldError,
    RecordUnreadable,
    RestoreRefused,
    StoreUnavailable,
)
from shared.ids import IdSource
from shared.model import Cluster
from shared.offload import inline


class Asked(Struct, frozen=True, kw_only=True):
    """What to restore, and how: ``also_awaited`` names nodes that joined after the backup."""

    file: Path
    config_file: Path | None = None
    replace: bool = False
    also_awaited: tuple[str, ...] = ()


class Plan(Struct, frozen=True, kw_only=True):
    """What a restore is going to do."""

    summary: Summary
    present: Present
    restoration: Restoration


Agree = Callable[[Plan], None]


def restore(
    asked: Asked, environ: Mapping[str, str], clock: Clock, rng: random.Random, agree: Agree
) -> Plan:
    """Restore, and return what was done; ``agree`` is told before anything is written, or raises.

    Raises ConfigInvalid; RestoreRefused with every fault that was found; OSError, and what writing
    to etcd or to the copy of history raises: then it is run again.
    """
    config = load_config(asked.config_file or DEFAULT_CONFIG, ControlPlaneConfig, environ)
    own = read_founding(config.bootstrap).cluster
    faults: list[FieldError] = []
    summary = _checked(asked.file, faults)
    with ExitStack() as held:
        try:
            held.enter_context(only_process(config.data_dir))
        except ConfigInvalid as in_use:
            faults += in_use.errors
        return asyncio.run(_Restore(asked, config, own, clock, rng).run(summary, faults, agree))


class _Restore:
    def __init__(
        self,
        asked: Asked,
        config: ControlPlaneConfig,
        own: Cluster,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self._asked = asked
        self._config = config
        self._own = own
        self._clock = clock
        self._rng = rng

    async def run(self, summary: Summary | None, faults: list[FieldError], agree: Agree) -> Plan:
        etcd = self._config.etcd
        store = connect(etcd.endpoints, etcd_tls(etcd.tls))
        try:
            try:
                present = await look(store)
            except StoreUnavailable as error:
                raise RestoreRefused((*faults, _fault("/etcd", "unreachable", error))) from error
            header = None if summary is None else summary.header
            now = self._clock.now()
            faults += refusals(header, present, self._own, now, replace=self._asked.replace)
            if faults or summary is None:
                raise RestoreRefused(tuple(faults))
            plan = self._plan(summary, present)
            agree(plan)
            await self._write_history()
            await write(store, plan.restoration, f"{self._rng.getrandbits(128):032x}")
            return plan
        finally:
            await store.close()

    def _plan(self, summary: Summary, present: Present) -> Plan:
        now = self._clock.now()
        known = [summary.header.epoch]
        if present.cluster is not None:
            known.append(present.cluster.epoch)
        restoration = make_restoration(
            summary.header,
            BackupFile(self._asked.file).keys(),
            new_epoch(known, now),
            now,
            IdSource(self._own.cell, self._clock, self._rng),
            self._asked.also_awaited,
        )
        return Plan(summary=summary, present=present, restoration=restoration)

    async def _write_history(self) -> None:
        """Add to this replica's copy what it lacks; what it has of after the backup stays."""
        file = history_file(self._config.data_dir)
        history = History(file, inline)
        try:
            for entries in BackupFile(self._asked.file).history():
                await history.append(entries)
        finally:
            await history.close()
        _hand_over(self._config.data_dir)


def _checked(file: Path, faults: list[FieldError]) -> Summary | None:
    try:
        return BackupFile(file).check()
    except OSError as error:
        faults.append(_fault("/file", "unreadable", error))
    except RecordUnreadable as error:
        faults.append(_fault("/file", "damaged", error))
    return None


def _fault(pointer: str, code: str, error: Exception) -> FieldError:
    return FieldError(pointer, code, str(error))


def _hand_over(data_dir: Path) -> None:
    """Give what root has made here to whom the directory belongs: the replica is not root."""
    if os.geteuid() != 0:
        return
    owner = data_dir.stat()
    for path in data_dir.iterdir():
        os.chown(path, owner.st_uid, owner.st_gid)
