"""controlplane.cli.client: trust, retries, and what a write may never do."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from controlplane.cell_files import CellFiles
from controlplane.cli.client import ANSWER_BYTES_MAX, ATTEMPTS, Client, path_of
from controlplane.cli.context import Context
from controlplane.cli.errors import ApiProblem, UnexpectedAnswer, Unreachable, Untrusted
from controlplane.cli.views import VmView
from tests.unit.cli_fake_api import (
    Cli,
    FakeApi,
    FakeTerminal,
    Reply,
    a_vm,
    listing,
    make_cell,
    problem,
    served,
)
from tests.unit.cli_fixtures import api, cell, cli

__all__ = ["api", "cell", "cli"]

NOBODY = "https://127.0.0.1:1"


def client_of(cell: CellFiles, *endpoints: str) -> Client:
    context = Context(endpoints, cell.ca_file.read_text(), "nck_key-1_secret")
    return Client(context, FakeTerminal(), random.Random(1))


@pytest.mark.parametrize("status", [502, 503])
def test_a_get_is_repeated_until_somebody_leads(api: FakeApi, cell: CellFiles, status: int) -> None:
    busy = problem(status, "no_leader", retryable=True)
    api.on("GET", "vms/web-1", busy, busy, a_vm())
    client = client_of(cell, api.url)

    assert client.get_as(VmView, path_of("vms", "web-1")).name == "web-1"
    client.close()

    assert len(api.requests) == 3


def test_a_get_is_not_repeated_for_ever(api: FakeApi, cell: CellFiles) -> None:
    api.on("GET", "vms", problem(503, "no_leader"))
    client = client_of(cell, api.url)

    with pytest.raises(ApiProblem):
        client.get("/api/v1/vms")
    client.close()

    assert len(api.requests) == ATTEMPTS


NO_LEADER = problem(503, "no_leader", retryable=True)
UNKNOWN = problem(503, "outcome_unknown", retryable=True)


@pytest.mark.parametrize("method", ["POST", "PATCH", "DELETE"])
def test_a_write_keeps_its_key_when_it_is_sent_again(
    api: FakeApi, cell: CellFiles, method: str
) -> None:
    api.on(method, "vms", NO_LEADER, NO_LEADER, {"id": "op-1"})
    client = client_of(cell, api.url)

    client.write(method, "/api/v1/vms", b"{}")
    client.write(method, "/api/v1/vms", b"{}")
    client.close()

    keys = [request.headers["idempotency-key"] for request in api.sent(method)]
    assert len(keys) == 4
    assert len(set(keys[:3])) == 1
    assert keys[3] != keys[0]


@pytest.mark.parametrize(
    ("version", "sent"), [("0.1.0", 1), ("0.2.0", 2), ("1.0.0", 2), ("", 1), ("newest", 1)]
)
@pytest.mark.parametrize("lost", [UNKNOWN, Reply(b"", 502), Reply(b"cut", cut=True)])
def test_what_may_have_been_made_is_sent_again_only_where_keys_are_kept(
    api: FakeApi, cell: CellFiles, lost: Reply, version: str, sent: int
) -> None:
    api.on("POST", "vms", lost, {"id": "op-1"})
    api.on("GET", "cluster", {"id": "cluster-1", "version": version})
    client = client_of(cell, api.url)

    if sent == 1:
        with pytest.raises((ApiProblem, Unreachable)):
            client.post("/api/v1/vms", {"name": "a"})
    else:
        assert client.post("/api/v1/vms", {"name": "a"}).status == 200
    client.close()

    assert len(api.sent("POST")) == sent


def test_a_refused_write_is_not_sent_again(api: FakeApi, cell: CellFiles) -> None:
    api.on("POST", "vms", problem(409, "name_taken"))
    client = client_of(cell, api.url)

    with pytest.raises(ApiProblem):
        client.post("/api/v1/vms", {"name": "a"})
    client.close()

    assert len(api.requests) == 1


def test_another_endpoint_is_tried_and_then_kept(api: FakeApi, cell: CellFiles) -> None:
    api.on("POST", "vms", {"id": "op-1"})
    client = client_of(cell, NOBODY, api.url)

    client.post("/api/v1/vms", {})
    client.post("/api/v1/vms", {})
    client.close()

    assert len(api.requests) == 2


def test_nobody_there_is_unreachable(cell: CellFiles) -> None:
    client = client_of(cell, NOBODY)

    with pytest.raises(Unreachable) as caught:
        client.delete("/api/v1/vms/a")

    assert NOBODY in str(caught.value)
    assert caught.value.exit_with() == 8


def test_reads_ask_for_what_was_written(api: FakeApi, cell: CellFiles) -> None:
    api.on("POST", "vms", Reply({}, headers={"X-Novacron-Revision": "r41"}))
    api.on("GET", "vms", listing())
    client = client_of(cell, api.url)

    client.post("/api/v1/vms")
    client.collect("/api/v1/vms")
    client.close()

    assert api.requests[-1].headers["x-novacron-min-revision"] == "r41"
    assert api.requests[-1].headers["authorization"] == "Bearer nck_key-1_secret"


def test_a_certificate_of_another_ca_gets_no_token(api: FakeApi, tmp_path: Path) -> None:
    client = client_of(make_cell(tmp_path / "other"), api.url)

    with pytest.raises(Untrusted) as caught:
        client.get("/api/v1/vms")

    assert caught.value.exit_with() == 5
    assert api.requests == []


def test_a_nodes_certificate_gets_no_token(cell: CellFiles) -> None:
    directory = cell.root / "nodes" / "n1"
    fake = FakeApi()
    with served(fake, directory / "agent.crt", directory / "agent.key"):
        client = client_of(cell, fake.url)

        with pytest.raises(Untrusted, match="not of a replica"):
            client.get("/api/v1/vms")

    assert fake.requests == []


def test_lists_are_read_to_their_end(api: FakeApi, cell: CellFiles) -> None:
    api.on("GET", "vms", listing(a_vm("a"), cursor="c1"), listing(a_vm("b")))
    client = client_of(cell, api.url)

    found = client.collect("/api/v1/vms")
    client.close()

    assert len(found.items) == 2
    assert api.requests[1].query["cursor"] == ["c1"]


def test_a_walk_whose_moment_is_forgotten_starts_again(api: FakeApi, cell: CellFiles) -> None:
    gone = problem(410, "cursor_expired")
    api.on("GET", "vms", listing(a_vm("a"), cursor="c1"), gone, listing(a_vm("b")))
    client = client_of(cell, api.url)

    assert len(client.collect("/api/v1/vms").items) == 1
    assert "cursor" not in api.requests[2].query
    api.on("GET", "vms", gone)
    with pytest.raises(ApiProblem, match="Cursor expired"):
        client.collect("/api/v1/vms")
    client.close()


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"items": 5}'])
def test_an_answer_of_something_else_is_told(api: FakeApi, cell: CellFiles, body: bytes) -> None:
    api.on("GET", "vms", Reply(body))
    client = client_of(cell, api.url)

    with pytest.raises(UnexpectedAnswer):
        client.collect("/api/v1/vms")
    client.close()


def test_a_proxys_error_page_is_a_problem(api: FakeApi, cell: CellFiles) -> None:
    api.on("GET", "vms", Reply(b"<h1>no</h1>", 403, {"Content-Type": "text/html"}))
    client = client_of(cell, api.url)

    with pytest.raises(ApiProblem) as caught:
        client.get("/api/v1/vms")
    client.close()

    assert (caught.value.problem.status, caught.value.problem.detail) == (403, "<h1>no</h1>")


def test_an_endless_answer_is_cut_off(api: FakeApi, cell: CellFiles) -> None:
    api.on("GET", "vms", Reply(b" " * (ANSWER_BYTES_MAX + 1)))
    client = client_of(cell, api.url)

    with pytest.raises(UnexpectedAnswer, match="larger"):
        client.get("/api/v1/vms")


def test_no_name_reaches_another_route() -> None:
    assert path_of("vms", "../nodes?x=1", "events") == "/api/v1/vms/..%2Fnodes%3Fx%3D1/events"


def test_a_name_with_strange_characters_is_sent_quoted(cli: Cli, api: FakeApi) -> None:
    assert cli.run("vm", "show", "a/b c") == 3
    assert api.requests[0].path == "/api/v1/vms/a%2Fb%20c"
