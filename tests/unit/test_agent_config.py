"""agent.config: what no single field can say."""

from __future__ import annotations

import pytest

from agent.config import HypervisorConfig, check_pools
from shared.errors import ConfigInvalid


def test_a_shared_pool_has_to_be_one_of_the_nodes() -> None:
    check_pools(HypervisorConfig(pools=("default", "nfs"), shared_pools=("nfs",)))

    with pytest.raises(ConfigInvalid, match="nfs: not among pools"):
        check_pools(HypervisorConfig(pools=("default",), shared_pools=("nfs",)))
