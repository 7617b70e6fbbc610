"""The cell whose failovers are measured: a real lab, 50,000 VM records, 1,000 agents' sessions,
writers.

Records are put into etcd while no replica runs, as a cell that has grown has them; agents and
writers are processes of their own. Everything goes with the context.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from msgspec.structs import replace

from controlplane.cell_files import CellFiles
from controlplane.cli.views import VmView
from controlplane.store import keys
from controlplane.store.etcd_pool import connect
from controlplane.store.port import Committed, Fence, Put
from shared.clock import SystemClock
from shared.codec import pack, unpack
from shared.ids import IdSource
from shared.model import (
    Applied,
    LeaderKey,
    Power,
    Vm,
)
from tests.lab.agent_crowd import boot_id, node_name
from tests.lab.cluster import Lab, LabPlan, serves
from tests.lab.configs import CELL_DIR
from tests.lab.layout import AGENTS_PORT, API_PORT, LOG_DIR, replica_address
from tests.lab.link import wait_until
from tests.lab.trial import Trial, new_vm
from tests.lab.witness import Witness
from tests.running_vms import running_vm

REPLICAS = 3
MEMBERS = 3
WRITERS = 8
WRITERS_LOG = "writers.log"
GUESTS = ("guest-a", "guest-b", "guest-c")
GROUP = 120
# A thousand greetings on a busy machine; each is a commit.
JOIN_LIMIT_S = 300.0
REPLICA_LIMIT_S = 120.0


class Line(NamedTuple):
    """One request of a writer; status 0 is a connection that broke."""

    writer: int
    number: int
    sent: float
    got: float
    status: int
    code: str


class FailoverCell:
    def __init__(self, scratch: Path, records: int, agents: int) -> None:
        self._scratch = scratch
        self._records = records
        self._agents = agents
        self._inside = ExitStack()
        self.lab = Lab(LabPlan(nodes=3, replicas=REPLICAS, members=MEMBERS), say=_say)

    def __enter__(self) -> FailoverCell:
        with self._inside:
            enter = self._inside.enter_context
            enter(self.lab)
            watching = enter(Witness(self._scratch / "looks"))
            self.trial = Trial(self.lab, watching)
            self.api = enter(closing(self.trial.api))
            for name, zone in zip(GUESTS, "abc", strict=True):
                self.api.wait(self.api.create_vm(new_vm(name, zone=zone)))
            self.trial.wait_counting(self.guests())
            if self._agents:
                self._start_crowd()
                _say(f"{self._agents} agents have joined")
                self._load_records()
                _say(f"{self._records} VM records are there")
            self._start_writers()
            self._stack = self._inside.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def guests(self) -> list[VmView]:
        return [self.api.vm(name) for name in GUESTS]

    def leader(self) -> str:
        """Return the name of the replica that leads, as the API says."""
        view = json.loads(self.api.client.get("/api/v1/cluster").body)
        name: str = view["leader"]["replica"]
        return name

    def etcd_leader(self) -> str:
        """Return the name of the member that leads."""
        view = json.loads(self.api.client.get("/api/v1/cluster").body)
        endpoints = [member.endpoint for member in self.lab.members]
        leading = next(m["endpoint"] for m in view["members"] if m["is_leader"])
        return self.lab.members[endpoints.index(leading)].name

    def lines(self) -> list[Line]:
        """Return all that writers have logged so far."""
        text = (self._scratch / "writes").read_text(encoding="ascii")
        return [Line(*json.loads(line)) for line in text.splitlines() if line.endswith("]")]

    def writers_live(self) -> bool:
        return self._writers.poll() is None

    def written(self, writer: int) -> int:
        """Return the count that a writer's VM has, as the API says."""
        return int(self.api.vm(f"written-{writer}").labels.get("count", "0"))

    def scrapes(self) -> dict[str, str]:
        """Return what each replica exports, by its name."""
        tls = ssl.create_default_context(cafile=self.lab.state().ca)
        texts = {}
        for replica in self.lab.replicas:
            connection = http.client.HTTPSConnection(replica.address, API_PORT, context=tls)
            with closing(connection):
                connection.request("GET", "/metrics", headers={"Authorization": self._bearer()})
                texts[replica.name] = connection.getresponse().read().decode()
        return texts

    def settle(self) -> None:
        """Return once every replica and every node is ready, and writes are accepted."""
        for replica in self.lab.replicas:
            wait_until(
                partial(serves, replica), f"{replica.name} to be ready", limit_s=REPLICA_LIMIT_S
            )
        self._nodes_back()
        self.wait_accepted(WRITERS * 5)

    def wait_accepted(self, count: int) -> None:
        """Return once so many more writes were accepted."""
        before = sum(line.status == 200 for line in self.lines())
        wait_until(
            lambda: sum(line.status == 200 for line in self.lines()) >= before + count,
            f"writes to be accepted (see {LOG_DIR / WRITERS_LOG})",
            limit_s=REPLICA_LIMIT_S,
            alive=self.writers_live,
        )

    def _bearer(self) -> str:
        return f"Bearer {Path(self.lab.state().token).read_text().strip()}"

    def _nodes_away(self) -> int:
        view = json.loads(self.api.client.get("/api/v1/cluster").body)
        return self._agents + 3 - int(view["nodes"]["ready"])

    def _start_crowd(self) -> None:
        files = CellFiles(CELL_DIR, SystemClock(), random.Random(os.urandom(16)))
        for number in range(self._agents):
            files.add_node(node_name(number), "192.0.2.1")
        order = {
            "replicas": [f"{replica_address(i)}:{AGENTS_PORT}" for i in range(REPLICAS)],
            "cell": str(CELL_DIR),
            "count": self._agents,
        }
        self._crowd = self._process("tests.lab.agent_crowd", order, "crowd.log")
        _read_word(self._crowd, "joined", JOIN_LIMIT_S)

    def _load_records(self) -> None:
        """Put the records into etcd while nobody leads."""
        node_ids = {node.name: node.id for node in self.api.nodes()}
        for replica in self.lab.replicas:
            self.lab.link.stop(replica.name)
        asyncio.run(self._put([node_ids[node_name(n)] for n in range(self._agents)]))
        self.lab.start_replicas()
        self._nodes_back()

    def _nodes_back(self) -> None:
        self.trial.eventually(
            self._nodes_away, lambda away: away == 0, "every node to be ready again"
        )

    async def _put(self, node_ids: Sequence[str]) -> None:
        store = connect([member.endpoint for member in self.lab.members], None)
        try:
            lease = await store.grant_lease(60)
            me = LeaderKey(replica="loader", incarnation="loader", url="")
            won = await store.campaign(pack(me), lease)
            assert won.leader.lease == lease, "no replica runs"
            mark = await store.get(keys.MARK)
            assert mark is not None, "the cell has been made"
            seq = unpack(mark.value, Applied).seq
            fence = Fence(won.leader.create_revision, mark.mod_revision)
            for group in _groups(self._vms(node_ids)):
                puts = [Put(keys.record_key(vm), pack(vm)) for vm in group]
                puts.append(Put(keys.MARK, pack(Applied(group="loader", seq=seq))))
                done = await store.commit(fence, puts)
                assert isinstance(done, Committed), "nobody else writes"
                fence = Fence(won.leader.create_revision, done.revision)
            await store.resign(won.leader.create_revision)
        finally:
            await store.close()

    def _vms(self, node_ids: Sequence[str]) -> Iterator[Vm]:
        clock = SystemClock()
        ids = IdSource(self._cell(), clock, random.Random(os.urandom(16)))
        for number in range(self._records):
            place = number % len(node_ids)
            boot, now = boot_id(place), clock.now()
            yield running_vm(ids.new("vm"), number, node_ids[place], boot, now)

    def _cell(self) -> str:
        return str(json.loads((CELL_DIR / "cluster.json").read_text())["cell"])

    def _start_writers(self) -> None:
        for number in range(WRITERS):
            body = new_vm(f"written-{number}")
            stopped = replace(body.spec, power=Power.STOPPED)
            self.api.wait(self.api.create_vm(replace(body, spec=stopped)))
        state = self.lab.state()
        order = {
            "urls": list(state.api),
            "ca": state.ca,
            "token": Path(state.token).read_text().strip(),
            "log": str(self._scratch / "writes"),
            "vms": [f"written-{number}" for number in range(WRITERS)],
        }
        self._writers = self._process("tests.lab.writers", order, WRITERS_LOG)
        _read_word(self._writers, "ready", REPLICA_LIMIT_S)
        self.wait_accepted(WRITERS * 5)

    def _process(self, module: str, order: dict[str, Any], log: str) -> subprocess.Popen[bytes]:
        output = self._inside.enter_context((LOG_DIR / log).open("ab"))
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
        )
        self._inside.callback(_end, process)
        assert process.stdin is not None, "it is a pipe"
        process.stdin.write(json.dumps(order).encode() + b"\n")
        process.stdin.flush()
        return process


def _groups(vms: Iterator[Vm]) -> Iterator[list[Vm]]:
    group: list[Vm] = []
    for vm in vms:
        group.append(vm)
        if len(group) == GROUP:
            yield group
            group = []
    if group:
        yield group


def _read_word(process: subprocess.Popen[bytes], word: str, limit_s: float) -> None:
    assert process.stdout is not None, "it is a pipe"
    os.set_blocking(process.stdout.fileno(), False)
    deadline = time.monotonic() + limit_s
    said = b""
    while word.encode() not in said:
        assert process.poll() is None, f"{process.args!r} ended early"
        assert time.monotonic() < deadline, f"{process.args!r} did not say {word}"
        said += process.stdout.read() or b""
        time.sleep(0.05)


def _end(process: subprocess.Popen[bytes]) -> None:
    for end in (process.stdin, process.stdout):
        if end is not None:
            end.close()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)
