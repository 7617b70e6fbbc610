"""The etcd clusters that contract tests share; each test empties the one it uses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.contract.etcd_process import EtcdCluster


@pytest.fixture(scope="session")
def etcd_one() -> Iterator[EtcdCluster]:
    with EtcdCluster(members=1) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def etcd_three() -> Iterator[EtcdCluster]:
    with EtcdCluster(members=3) as cluster:
        yield cluster
