"""Every tests/data/*.cluster: each VM goes where the file says, for the reasons it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from controlplane.scheduler.moves import move_request
from controlplane.scheduler.place import place, plan
from controlplane.scheduler.request import request_of
from tests.unit.cluster_text import read_cluster

FILES = sorted((Path(__file__).parent.parent / "data").glob("*.cluster"))


def test_there_are_golden_clusters() -> None:
    assert {path.stem for path in FILES} >= {
        "three_nodes",
        "every_reason",
        "groups",
        "moves",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden_cluster(path: Path) -> None:
    cluster = read_cluster(path)
    assert cluster.cases
    snapshot = cluster.snapshot()
    for case in cluster.cases:
        request = request_of(case.vm)
        if case.source is not None:
            request = move_request(case.vm, case.source)
            snapshot = snapshot.without(case.vm)
        result = plan(snapshot, request)
        assert result.node_name == case.node, f"{case.vm.name}: {result.summary()}"
        assert place(snapshot, request).node == result.node
        reasons = {
            c.node_name: [reason.code.value for reason in c.reasons]
            for c in result.candidates
            if not c.fits
        }
        if case.node is None or case.reasons:
            assert reasons == case.reasons, case.vm.name
        if result.node is not None:
            snapshot = snapshot.with_placement(request, result.node)


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.cluster"
    path.write_text("node n1 cpus=4 memory=1\nserver n2\n")
    with pytest.raises(ValueError, match=r"bad.cluster:2: 'server n2'"):
        read_cluster(path)
