"""`./dev lab` and `./dev demo`: the commands over the lab.

Progress goes to standard error, so that ``--json`` can be piped. Exit codes: 0 done, 1 refused or
failed with a reason; Interrupted passes through.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import msgspec

from controlplane.cli.errors import CliError
from tests.lab import layout, leftovers, machine, signals, state
from tests.lab.cluster import Lab, LabPlan
from tests.lab.demo import run_demo
from tests.lab.layout import LabError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except LabError as error:
        _say(f"error: {error}")
    except CliError as error:
        _say("\n".join(error.lines()))
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="./dev", description=__doc__)
    commands = parser.add_subparsers(required=True)
    lab = commands.add_parser("lab", help="a real cluster on this machine").add_subparsers(
        required=True
    )
    up = lab.add_parser("up", help="build it; it stays until `lab down`")
    up.add_argument("--nodes", type=int, default=3)
    up.add_argument("--replicas", type=int, default=1, help="0 builds nodes only, without agents")
    up.add_argument("--etcd", type=int, default=1, metavar="MEMBERS")
    up.add_argument("--json", action="store_true")
    up.set_defaults(run=_up)
    status = lab.add_parser("status", help="what runs")
    status.add_argument("--json", action="store_true")
    status.set_defaults(run=_status)
    lab.add_parser("down", help="end it and remove all it left").set_defaults(run=_down)
    demo = commands.add_parser("demo", help="three nodes, some VMs, and what happens to them")
    demo.add_argument("--simulated", action="store_true", help="without root, libvirt and etcd")
    demo.add_argument("--once", action="store_true", help="end after the story")
    demo.set_defaults(run=_demo)
    return parser


def _up(options: argparse.Namespace) -> int:
    started = time.monotonic()
    plan = LabPlan(nodes=options.nodes, replicas=options.replicas, members=options.etcd)
    lab = Lab(plan, _say)
    built = lab.up()
    with signals.held():
        lab.release()
    _say(f"the lab is up after {time.monotonic() - started:.1f} s; `./dev lab down` ends it")
    _print(built, as_json=options.json)
    return 0


def _status(options: argparse.Namespace) -> int:
    found = state.read_state()
    if found is None:
        left = leftovers.find()
        _say("no lab" + "".join(f"\n  left over: {line}" for line in left))
        return 1
    _print(found, as_json=options.json)
    return 0


def _down(options: argparse.Namespace) -> int:
    layout.require_root()
    if not leftovers.find():
        _say("there is no lab")
        return 0
    machine.clear()
    _say("the lab is gone")
    return 0


def _demo(options: argparse.Namespace) -> int:
    if options.simulated:
        # Imported here: the lab's other commands need none of the simulation.
        from tests.lab.simulated_cell import serve
        from tests.lab.simulated_demo import run_simulated

        return run_simulated(_say, serve, once=options.once)
    return run_demo(_say, once=options.once)


def _print(found: state.LabState, *, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
        return
    for line in summary(found):
        print(line)


def summary(found: state.LabState) -> list[str]:
    """Return what a person needs to use a lab: parts, addresses, ready-to-paste settings."""
    lines = [f"{'node':8} {'address':12} {'agent':>8} {'libvirtd':>8}  libvirt"]
    lines += [
        f"{n.name:8} {n.address:12} {n.agent_pid or '-':>8} {n.libvirtd_pid or '-':>8}  "
        f"{n.libvirt_uri}"
        for n in found.nodes
    ]
    lines += [f"replica {r.name}  {r.url}  pid {r.pid or '-'}" for r in found.replicas]
    lines += [f"etcd {', '.join(found.etcd)}"] if found.etcd else []
    return lines + (state.login_lines(found) if found.api else [])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
