"""The API against its own document: whatever is sent, answers are as described, none is a fault.

Requests, good and bad, are made from the OpenAPI document, once with whatever names come to mind,
and once with those of objects that exist: else all would end in a 404.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.config import GenerationConfig, ProjectConfig, ProjectsConfig, SchemathesisConfig
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from controlplane.api.openapi import build_document
from shared.codec import to_json
from shared.version import VERSION
from tests.integration.replica_api import new_vm
from tests.integration.replica_process import ReplicaProcess
from tests.integration.stranger import Stranger
from tests.integration.world import World

pytestmark = pytest.mark.etcd

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    allow_header_conformance,
]
# For each route, beside the systematic ones: together well below a minute.
BOUNDED = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
DOCUMENT: dict[str, Any] = msgspec.json.decode(to_json(build_document(VERSION)))
EXISTING = {"path.vm": "existing", "path.node": "n1"}


def _schema(names: dict[str, Any]) -> Any:
    """Return the document as a source of requests, with these values for parameters in paths."""
    project = ProjectConfig(
        parameters=dict(names), generation=GenerationConfig(with_security_parameters=False)
    )
    config = SchemathesisConfig(projects=ProjectsConfig(default=project))
    return schemathesis.openapi.from_dict(DOCUMENT, config=config)


# Asked to step down again and again the replica leads now and then only, and says so with 503. What
# odd requests of that route come to is for tests/unit/test_step_down.py.
ANY = _schema({}).exclude(path_regex="/actions/step-down$")
ABOUT_EXISTING = _schema(EXISTING).include(path_regex="{(vm|node)}")


def _check(case: Any, client: requests.Session, replica: ReplicaProcess) -> None:
    case.call_and_validate(
        base_url=replica.api_url,
        session=client,
        headers=dict(client.headers),
        verify=client.verify,
        checks=CHECKS,
    )


@pytest.fixture(scope="module")
def client(module_replica: ReplicaProcess) -> Iterator[requests.Session]:
    """A client that is logged in as the administrator."""
    with requests.Session() as session:
        # Else a bundle of the environment's would be trusted instead.
        session.trust_env = False
        session.verify = str(module_replica.cell.files.ca_file)
        session.headers["Authorization"] = f"Bearer {module_replica.token}"
        yield session


@pytest.fixture
async def objects(shared_world: World) -> None:
    """See to it that the VM and the node of EXISTING are there, whatever was done to them."""
    replica = shared_world.replica
    async with Stranger(replica.agents_address, replica.cell.node_tls("n1")) as agent:
        await agent.greet("n1")
    made = await shared_world.api.send("POST", "/api/v1/vms", new_vm("existing"))
    assert made.status_code in (202, 409), made.text


def test_the_replica_serves_this_document(
    module_replica: ReplicaProcess, client: requests.Session
) -> None:
    assert client.get(f"{module_replica.api_url}/openapi.json").json() == DOCUMENT


@ANY.parametrize()  # type: ignore[untyped-decorator]
@BOUNDED
def test_any_request(case: Any, client: requests.Session, module_replica: ReplicaProcess) -> None:
    _check(case, client, module_replica)


@ABOUT_EXISTING.parametrize()  # type: ignore[untyped-decorator]
@BOUNDED
def test_any_request_about_what_exists(
    case: Any, client: requests.Session, module_replica: ReplicaProcess, objects: None
) -> None:
    _check(case, client, module_replica)
