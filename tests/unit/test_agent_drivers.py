"""agent.drivers: what the driver is told, from the agent's configuration."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from agent.config import AgentConfig, HypervisorConfig, TlsConfig
from agent.drivers import open_driver
from shared.clock import SystemClock
from shared.errors import ConfigInvalid


def test_a_shared_pool_has_to_be_one_of_the_nodes(tmp_path: Path) -> None:
    file = tmp_path / "file"
    config = AgentConfig(
        node_name="n1",
        state_dir=tmp_path,
        address="10.88.0.11",
        controlplane=(),
        tls=TlsConfig(ca=file, certificate=file, key=file),
        hypervisor=HypervisorConfig(pools=("default",), shared_pools=("nfs",)),
    )

    with pytest.raises(ConfigInvalid, match="nfs: not among pools"):
        open_driver(config, "boot", SystemClock(), random.Random(1))
