"""Tokens that are none, malformed, unknown, wrong or expired: a problem each, and no change."""

from __future__ import annotations

from datetime import timedelta

import pytest

from controlplane.tokens import new_token, parse_token
from tests.contract.etcd_process import EtcdCluster
from tests.integration.replica_api import Api, new_vm, problem_of, until
from tests.integration.replica_process import Cell, ReplicaProcess
from tests.integration.world import World

pytestmark = pytest.mark.etcd

KINDS = ("none", "empty", "malformed", "unknown key", "wrong secret", "not ASCII")


def _token(kind: str, good: str) -> str | None:
    token = parse_token(good)
    tokens = {
        "empty": "",
        "malformed": "nck_" + "x" * 300,
        "unknown key": str(new_token(f"{token.id[:-1]}{'0' if token.id[-1] != '0' else '1'}")),
        "wrong secret": str(new_token(token.id)),
        "not ASCII": "nck_\u00e9_\u00e9",
    }
    return tokens.get(kind)


@pytest.mark.parametrize("kind", KINDS)
async def test_without_a_good_token_nothing_is_read_or_changed(
    shared_world: World, kind: str
) -> None:
    cell, url = shared_world.cell, shared_world.replica.api_url
    async with Api(url, cell, None) as stranger:
        token = _token(kind, cell.token)
        headers = {} if token is None else {b"Authorization": b"Bearer " + token.encode("latin-1")}
        for method, path, body in (
            ("GET", "/api/v1/vms", None),
            ("GET", "/metrics", None),
            ("POST", "/api/v1/vms", new_vm("stolen")),
            ("DELETE", "/api/v1/vms/none", None),
        ):
            answer = await stranger.send(method, path, body, headers=headers)
            problem = problem_of(answer)
            assert (problem.status, problem.code) == (401, "unauthenticated")
            assert answer.headers["www-authenticate"].startswith("Bearer")
    assert await shared_world.api.vms() == ()


async def test_a_token_that_has_expired_is_refused(module_etcd: EtcdCluster) -> None:
    del module_etcd  # its cell has another token; this one has an etcd of its own
    with EtcdCluster() as etcd, Cell(etcd.endpoints, timedelta(seconds=8)) as cell:
        with ReplicaProcess(cell) as replica:
            async with Api(replica.api_url, cell, cell.token) as api:
                operation = await api.create("before")

                async def look() -> bool:
                    return (await api.send("GET", "/api/v1/vms")).status_code == 401

                await until(look, "the end of the token")
                problem = problem_of(await api.send("POST", "/api/v1/vms", new_vm("after")))
                assert (problem.code, problem.detail) == (
                    "unauthenticated",
                    "the token has expired",
                )
                assert operation.target
