"""Who may import whom, and who may touch clocks, randomness, threads and the network.

Each exception stands in a table with its reason. A new one belongs in a decision record first.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.source_tree import (
    PACKAGES,
    ROOT,
    dotted,
    files,
    imports,
    imports_any,
    module_name,
    tree,
)

CODE = files(*PACKAGES)

# A folder or module, and everything of ours that it may import besides itself.
LAYERS: dict[str, tuple[str, ...]] = {
    "shared": (),
    "agent": ("shared",),
    # Pure: what is placed where follows from records alone.
    "controlplane/scheduler": ("shared.model",),
    "controlplane/telemetry": ("shared",),
    "controlplane/past.py": (),
    "controlplane/state.py": ("controlplane.past", "shared.admission", "shared.model"),
    "controlplane/commands": ("controlplane.state", "shared"),
    "controlplane/store": ("controlplane.commands", "controlplane.state", "shared"),
    # The file of a backup, how it is made of a store, and what a restore writes into one.
    "controlplane/backup": (
        "controlplane.store.history",
        "controlplane.store.keys",
        "controlplane.store.port",
        "shared",
    ),
    "controlplane/sessions": (
        "controlplane.commands",
        # Only to read which certificate an agent has shown.
        "controlplane.pki",
        "controlplane.state",
        "controlplane.store.applier",
        # What peers ask each other for, besides changes.
        "controlplane.store.history",
        "controlplane.telemetry.progress",
        "controlplane.telemetry.windows",
        "shared",
    ),
    "controlplane/election.py": (
        "controlplane.store.keys",
        "controlplane.store.port",
        "shared",
    ),
    "controlplane/services": (
        "controlplane.backup.take",
        "controlplane.commands",
        # The port and the adapter that signs what a use case has let in.
        "controlplane.issuer",
        "controlplane.sagas",
        "controlplane.scheduler",
        "controlplane.state",
        # The port and its projection; who writes is handed in as ``submit``.
        "controlplane.store.port",
        "controlplane.store.history",
        "controlplane.telemetry",
        # The secret of a join token.
        "controlplane.tokens",
        "shared",
    ),
    "controlplane/sagas": (
        "controlplane.commands",
        "controlplane.scheduler",
        "controlplane.state",
        "controlplane.store.applier",
        "shared",
    ),
    "controlplane/reconcilers": (
        "controlplane.commands",
        "controlplane.sagas",
        "controlplane.scheduler",
        "controlplane.services",
        "controlplane.sessions.hub",
        "controlplane.state",
        "controlplane.store.applier",
        "controlplane.store.history",
        "controlplane.store.port",
        # Only to count decisions.
        "controlplane.telemetry.exporter",
        "shared",
    ),
    "controlplane/api": (
        # What the headers of a write come to.
        "controlplane.commands.terms",
        # A patch is the body of a request and part of a command.
        "controlplane.commands.vm_patch",
        "controlplane.services",
        # Only to wait for a revision or a change; what is in it is read by the services.
        "controlplane.state",
        "controlplane.telemetry.exporter",
        "controlplane.tokens",
        "shared",
    ),
    # The command line is a client: it knows the API and, for ``init``, the files of a new cell; it
    # checks the backup that it is sent, and starts the restore of one.
    "controlplane/cli": (
        "controlplane.backup.format",
        "controlplane.cell_files",
        "controlplane.restore",
        "shared",
    ),
}

# A package, and the files that may import it, each with the reason.
RESERVED: dict[str, dict[str, str]] = {
    "grpc": {
        "controlplane/store/etcd": "etcd speaks it",
        "controlplane/sessions/": "agents speak it",
        "agent/session": "the agent's side of the session",
        "agent/telemetry": "the agent's side of telemetry",
        "shared/grpc_channel.py": "a stream as a Channel, for both sides",
    },
    "libvirt": {"agent/libvirt_": "the one driver of libvirt"},
    "time": {
        "shared/clock.py": "the port's adapter",
        "controlplane/cli/terminal.py": "the command line's own clock, a port of its client",
        "agent/libvirt_probe.py": "runs in a thread of the driver, beside any loop",
        "agent/join.py": "a command that waits for a control plane, without a loop",
        "agent/relay_": "relay processes have no loop; and the age of their files",
    },
    "uuid": {
        "shared/ids.py": "UUIDv5 is a hash: nothing is drawn",
        "agent/libvirt_probe.py": "names a throw-away domain that no record knows",
        "agent/__main__.py": "the incarnation of a process",
        "controlplane/__main__.py": "the incarnation of a process",
    },
    "threading": {
        "agent/libvirt_connection.py": "libvirt's event loop wants a thread",
        "agent/libvirt_lane.py": "libvirt's calls block, and their connections are shared out",
    },
    "concurrent": {
        "shared/offload.py": "the port's adapter",
        "agent/libvirt_": "libvirt's calls block",
    },
    "secrets": {
        "controlplane/tokens.py": "what must not be guessed comes from the system, never a seed",
        "shared/durable_files.py": "names a draft file that nobody may foresee",
        "controlplane/cli/client.py": "a request's idempotency key must meet no other's",
        "agent/relay_listener.py": "a one-time token must not be guessed, whatever the seed",
        "controlplane/api/app.py": "the prefix of a process's request ids; no decision reads them",
    },
    "socket": {
        "controlplane/api/server.py": "uvicorn hands its sockets over",
        "agent/relay_": "a relay is two sockets, and a connection is handed to its process",
        "agent/doctor.py": "tries whether libvirt is there",
        "agent/handshake.py": "tries why a replica takes no connection",
        "controlplane/cli/doctor.py": "tries the replicas' ports",
    },
    "ssl": {
        "agent/relay_": "relay processes speak TLS without gRPC, which takes long to load",
        "controlplane/api/server.py": "the API's own TLS",
        "controlplane/cli/client.py": "the command checks the API's certificate",
        "controlplane/cli/doctor.py": "looks at the certificate that a replica shows",
        "agent/handshake.py": "hears what gRPC keeps to itself",
        "agent/join.py": "trusts the CA that a token names, and nobody before",
        "agent/identity_files.py": "reads the dates of a certificate",
    },
    "subprocess": {},
    "sqlite3": {"controlplane/store/history.py": "the projection's file"},
}

# Where a process begins that must start at once, since migrations wait for it.
QUICK_PROCESSES = ("agent/relay_dial.py", "agent/relay_serve.py")
# Of the standard library, what takes as long to load as all that such a process needs.
SLOW_IMPORTS = {"asyncio", "dataclasses", "logging", "subprocess", "unittest", "concurrent"}
# Where processes are started; they are to outlive the one that does.
SPAWNS = {"agent/relay_spawn.py"}

# Where randomness comes from; everybody else is handed a ``random.Random``.
DRAWS: dict[str, str] = {
    "agent/__main__.py": "the agent's wiring",
    "controlplane/__main__.py": "a replica's wiring",
    "controlplane/cli/main.py": "the command line's wiring",
    "controlplane/store/etcd_pool.py": "``connect`` wires the store; only for jitter",
}
# Where the date comes from.
DATES = {"shared/clock.py", "controlplane/cli/terminal.py"}
# Giving way between bounded pieces of work is fine; waiting by turning round and round is not.
TURNS_IN_A_LOOP: dict[str, str] = {}
# What judges the product by what comes out of it, and loads nothing of it: with all of
# ``tests/histories``, the records of what ran on nodes.
WITNESSES = ("tests/lab/pulses.py", "tests/lab/witness.py")
WATCHING_WITH = {"hypothesis", "msgspec", "pytest"}
PURE_IMPORTS = {
    "__future__",
    "collections",
    "enum",
    "math",
    "msgspec",
    "typing",
    "heapq",
    "itertools",
}


def allowed(file: str, layer: str, named: tuple[str, ...], name: str) -> bool:
    own = layer.removesuffix(".py").replace("/", ".")
    return any(name == each or name.startswith(each + ".") for each in (own, *named))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_only_what_lies_below_it(layer: str) -> None:
    inside = [file for file in CODE if file == layer or file.startswith(layer + "/")]
    ours = [
        (file, name)
        for file in inside
        for name in sorted(imports(file))
        if name.split(".")[0] in (*PACKAGES, "tests")
    ]

    assert [each for each in ours if not allowed(each[0], layer, LAYERS[layer], each[1])] == []


def test_every_folder_has_its_rule() -> None:
    """What is not in a layer is wiring, at the top of the control plane."""
    free = {file for file in CODE if not any(file.startswith(layer) for layer in LAYERS)}

    assert {file for file in free if file.count("/") > 1} == set()


@pytest.mark.parametrize("file", files("tests/histories") + list(WITNESSES))
def test_who_watches_the_product_shares_nothing_with_it(file: str) -> None:
    ours = {name for name in imports(file) if name.split(".")[0] in (*PACKAGES, "tests")}
    others = {name.split(".")[0] for name in imports(file)} - {*PACKAGES, "tests"}

    assert {name for name in ours if not name.startswith("tests.histories")} == set()
    assert others - set(sys.stdlib_module_names) <= WATCHING_WITH


def test_no_code_imports_tests() -> None:
    assert [file for file in CODE if imports_any(file, "tests")] == []


def test_the_agent_runs_without_what_signs_requests() -> None:
    """A library of ten megabytes that it needs twice a week: a process of its own loads it."""
    program = "import sys, agent.__main__; sys.exit('cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_agent_and_control_plane_never_meet() -> None:
    for here, there in (("agent", "controlplane"), ("controlplane", "agent")):
        assert [file for file in files(here) if imports_any(file, there)] == []


@pytest.mark.parametrize("package", RESERVED)
def test_some_packages_are_for_adapters_only(package: str) -> None:
    holders = RESERVED[package]
    strangers = [
        file
        for file in CODE
        if imports_any(file, package) and not any(file.startswith(each) for each in holders)
    ]

    assert strangers == []


@pytest.mark.parametrize("package", RESERVED)
def test_no_exception_outlives_its_reason(package: str) -> None:
    unused = [
        holder
        for holder in RESERVED[package]
        if any(file.startswith(holder) for file in CODE)
        and not any(file.startswith(holder) and imports_any(file, package) for file in CODE)
    ]

    # The agent's telemetry may speak gRPC; at present the session's dialler does so for it.
    assert [holder for holder in unused if holder != "agent/telemetry"] == []


@pytest.mark.parametrize("file", QUICK_PROCESSES)
def test_relay_processes_need_the_standard_library_only(file: str) -> None:
    loaded: set[str] = set()
    to_read = [module_name(file)]
    while to_read:
        module = to_read.pop()
        if module not in loaded:
            loaded.add(module)
            to_read += [name for name in imports(file_of(module)) if file_of(name) in CODE]
    others = {
        name.split(".")[0]
        for module in loaded
        for name in imports(file_of(module))
        if name.split(".")[0] not in PACKAGES
    }

    assert len(loaded) > 3
    assert others - set(sys.stdlib_module_names) == set()
    assert others & SLOW_IMPORTS == set()


def file_of(module: str) -> str:
    return module.replace(".", "/") + ".py"


def test_processes_are_started_in_one_place() -> None:
    starters = {
        file
        for file in CODE
        for name, _ in calls(file)
        if name.startswith(("os.posix_spawn", "os.fork", "os.exec", "os.spawn", "os.system"))
    }

    assert starters == SPAWNS


def calls(file: str) -> Iterator[tuple[str, ast.Call]]:
    for found in ast.walk(tree(file)):
        if isinstance(found, ast.Call):
            yield dotted(found.func), found


def test_randomness_is_handed_in() -> None:
    """``random.Random`` is a type everywhere, and made in a few places; nothing else is used."""
    drawn = {
        file
        for file in CODE
        for name, _ in calls(file)
        if name.startswith("random.") or name in ("Random", "SystemRandom", "urandom", "os.urandom")
    }
    named = {
        (file, dotted(found))
        for file in CODE
        for found in ast.walk(tree(file))
        if isinstance(found, ast.Attribute) and dotted(found).startswith("random.")
    }

    assert drawn == set(DRAWS)
    assert {name for _, name in named} <= {"random.Random", "random.SystemRandom"}


def test_the_date_is_handed_in() -> None:
    dated = {
        file
        for file in CODE
        for name, _ in calls(file)
        if name.endswith(("datetime.now", "datetime.utcnow", "date.today", "datetime.today"))
    }

    assert dated == DATES


def test_nothing_waits_by_turning_round() -> None:
    turning = {
        file
        for file in CODE
        for found in ast.walk(tree(file))
        if isinstance(found, ast.While)
        for name, call in _calls_in(found)
        if name == "asyncio.sleep" and _is_zero(call)
    }

    assert turning == set(TURNS_IN_A_LOOP)


def _calls_in(within: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for found in ast.walk(within):
        if isinstance(found, ast.Call):
            yield dotted(found.func), found


def _is_zero(call: ast.Call) -> bool:
    return bool(call.args) and isinstance(call.args[0], ast.Constant) and call.args[0].value == 0


@pytest.mark.parametrize("file", files("controlplane/scheduler"))
def test_the_scheduler_is_pure(file: str) -> None:
    others = {name.split(".")[0] for name in imports(file) if name.split(".")[0] not in PACKAGES}
    found = list(ast.walk(tree(file)))

    assert others <= PURE_IMPORTS
    assert not any(
        isinstance(each, ast.AsyncFunctionDef | ast.Await | ast.Global) for each in found
    )
    assert not {name for name, _ in calls(file)} & {"open", "print", "input"}


def test_only_wiring_reads_the_environment() -> None:
    readers = {
        file
        for file in CODE
        for found in ast.walk(tree(file))
        if isinstance(found, ast.Attribute) and dotted(found) in ("os.environ", "os.getenv")
    }

    # The command line's terminal follows the convention NO_COLOR.
    assert readers - {"controlplane/cli/terminal.py"} <= {
        "agent/__main__.py",
        "controlplane/__main__.py",
        "controlplane/cli/main.py",
    }


def test_reserved_packages_are_spelled_right() -> None:
    """A slip in the table would make a rule that nothing can break."""
    known = set(sys.stdlib_module_names) | {"grpc", "libvirt"}
    assert set(RESERVED) <= known
