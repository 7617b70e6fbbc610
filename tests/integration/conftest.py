"""Worlds that tests share: a fresh one each, or one a module where tests change nothing of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.contract.etcd_process import EtcdCluster
from tests.integration.replica_api import Api
from tests.integration.replica_process import Cell, ReplicaProcess
from tests.integration.world import LONG_LEASE, World, new_world


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """Return a world whose term never ends by waiting."""
    async with new_world(LONG_LEASE) as fresh:
        yield fresh


@pytest.fixture(scope="module")
def module_etcd() -> Iterator[EtcdCluster]:
    with EtcdCluster() as etcd:
        yield etcd


@pytest.fixture(scope="module")
def module_replica(module_etcd: EtcdCluster) -> Iterator[ReplicaProcess]:
    with Cell(module_etcd.endpoints) as cell, ReplicaProcess(cell) as replica:
        yield replica


@pytest.fixture
async def shared_world(
    module_etcd: EtcdCluster, module_replica: ReplicaProcess
) -> AsyncIterator[World]:
    """Return the module's world; the client is the test's own."""
    cell = module_replica.cell
    async with Api(module_replica.api_url, cell, cell.token) as api:
        yield World(module_etcd, cell, module_replica, api)
