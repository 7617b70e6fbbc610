"""Tokens that are none, malformed, unknown, wrong or expired: a problem each, and no change."""

from __future__ import annotations

from datetime import timedelta

import pytest

from controlplane.tokens import new_token, parse_token
from tests.contract.etcd_process import EtcdCluster
from tests.integration.replica_api import Api, new_vm, problem_of
from tests.integration.replica_process import Cell, ReplicaProcess
from tests.integration.world import World

pytestmark = pytest.mark.etcd

KINDS = (
    "none",
    "no text",
    "another scheme",
    "malformed",
    "unknown key",
    "wrong secret",
    "not ASCII",
)


def _headers(kind: str, good: str) -> dict[bytes, bytes]:
    """Return the Authorization header of a kind, made of a good token."""
    token = parse_token(good)
    other_id = token.id[:-1] + ("0" if token.id[-1] != "0" else "1")
    texts = {
        "no text": b"Bearer",
        "another scheme": b"Basic " + good.encode(),
        "malformed": b"Bearer nck_" + b"x" * 300,
        "unknown key": b"Bearer " + str(new_token(other_id)).encode(),
        "wrong secret": b"Bearer " + str(new_token(token.id)).encode(),
        "not ASCII": b"Bearer nck_\xe9_\xe9",
    }
    return {b"Authorization": texts[kind]} if kind in texts else {}


@pytest.mark.parametrize("kind", KINDS)
async def test_without_a_good_token_nothing_is_read_or_changed(
    shared_world: World, kind: str
) -> None:
    cell, url = shared_world.cell, shared_world.replica.api_url
    headers = _headers(kind, cell.token)
    async with Api(url, cell, None) as stranger:
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


async def test_a_token_that_has_expired_is_refused() -> None:
    # Over long before the replica answers.
    short = timedelta(milliseconds=1)
    with (
        EtcdCluster() as etcd,
        Cell(etcd.endpoints, short) as cell,
        ReplicaProcess(cell) as replica,
    ):
        async with Api(replica.api_url, cell, cell.token) as api:
            problem = problem_of(await api.send("POST", "/api/v1/vms", new_vm("late")))
            assert (problem.status, problem.code) == (401, "unauthenticated")
            # Said only to who knows the secret.
            assert problem.detail == "the token has expired"
