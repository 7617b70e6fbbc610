"""`novacron vm create`: options and a file become the body of one request.

The body is a plain JSON document: what is in it is the API's to judge, which tells every fault at
once. Only what was given is sent, so that an older control plane is not told of newer fields.
"""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import click
import msgspec

from controlplane.cli.client import BASE, Answer, path_of
from controlplane.cli.dry_run import DRY_RUN, dry_run_option
from controlplane.cli.errors import ApiProblem, Unschedulable
from controlplane.cli.invocation import (
    Invocation,
    KeyValue,
    output_option,
    pass_invocation,
    wait_options,
)
from controlplane.cli.output import Format, Output
from controlplane.cli.views import DryRunView, OperationView, PlannedVmView, VmView
from controlplane.cli.vm_explain import refusal_summary, show_plan
from controlplane.cli.wait import Waiting, run_operations

Document = dict[str, Any]

_MIB_OF = {"kib": Fraction(1, 1024), "mib": Fraction(1), "gib": Fraction(1024)}
_MIB_OF |= {"tib": Fraction(1024**2)}
_SIZE = re.compile(r"^([0-9]{1,12}(?:\.[0-9]{1,6})?)\s*([kmgt]ib)?\Z", re.IGNORECASE)
_OPTION_OF_POINTER = {
    "/name": "NAME",
    "/labels": "--label",
    "/spec/vcpus": "--vcpus",
    "/spec/memory_mib": "--memory",
    "/spec/boot": "--kernel, --initrd, --cmdline",
    "/spec/disks": "--disk",
    "/spec/nics": "--nic",
    "/spec/placement/node_labels": "--node-label",
    "/spec/placement/affinity": "--affinity",
    "/spec/placement/anti_affinity": "--anti-affinity",
}


class Size(click.ParamType[int]):
    """A size as a whole number of ``unit``; a bare number is in that unit already."""

    name = "size"

    def __init__(self, unit: str) -> None:
        self._unit = unit

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_size(str(value), self._unit)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class DiskOption(click.ParamType[Document]):
    """``name=size[@pool]``, the size in GiB or with a unit."""

    name = "name=size[@pool]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Document:
        if isinstance(value, dict):
            return value
        name, equals, rest = str(value).partition("=")
        size, at, pool = rest.partition("@")
        if not (name and equals and size) or (at and not pool):
            self.fail(f"{value!r} is not of the form {self.name}", param, ctx)
        disk = {"name": name, "size_gib": Size("GiB").convert(size, param, ctx)}
        return disk | ({"pool": pool} if pool else {})


class GroupOption(click.ParamType[Document]):
    """``group[:soft]``; a rule is hard unless it says otherwise."""

    name = "group[:soft]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Document:
        if isinstance(value, dict):
            return value
        group, colon, kind = str(value).partition(":")
        if not group or (colon and kind not in {"soft", "hard"}):
            self.fail(f"{value!r} is not of the form {self.name}", param, ctx)
        return {"group": group, "hard": kind != "soft"}


@click.command()
@click.argument("name", required=False)
@click.option("--vcpus", type=int, help="How many virtual CPUs.")
@click.option("--memory", type=Size("MiB"), help="512MiB, 2GiB, or a number of MiB.")
@click.option("--kernel", help="The kernel artefact to boot.")
@click.option("--initrd", help="The initrd artefact to boot with.")
@click.option("--cmdline", help="The kernel's command line.")
@click.option("--disk", "disks", type=DiskOption(), multiple=True, help="A disk, such as root=20.")
@click.option("--nic", "nics", metavar="NETWORK", multiple=True, help="A NIC on this network.")
@click.option("--label", "labels", type=KeyValue(), multiple=True, help="A label of the VM.")
@click.option(
    "--node-label", "node_labels", type=KeyValue(), multiple=True, help="Only such nodes."
)
@click.option("--affinity", type=GroupOption(), multiple=True, help="Run beside this group.")
@click.option("--anti-affinity", type=GroupOption(), multiple=True, help="Run apart from it.")
@click.option("--stopped", is_flag=True, help="Create it without starting it.")
@click.option("--file", "file", type=Path, help="The body as TOML or JSON; options win over it.")
@dry_run_option
@output_option
@wait_options
@pass_invocation
def create(
    invocation: Invocation,
    /,
    file: Path | None,
    dry_run: bool,
    form: str | None,
    no_wait: bool,
    timeout: float | None,
    **options: Any,
) -> None:
    """Create a VM and wait until it runs."""
    body = read_body(file) if file is not None else {}
    merge(body, body_from_options(options))
    name = body.get("name")
    if not isinstance(name, str) or not name:
        raise click.UsageError("the VM needs a name: give NAME, or name in the file")
    output = invocation.output(form)
    try:
        if dry_run:
            _plan(invocation, output, name, body)
        else:
            waiting = Waiting.begin(invocation.terminal, no_wait=no_wait, timeout=timeout)
            _create(invocation, output, name, body, waiting)
    except ApiProblem as error:
        error.hint = error.hint or _option_hint(error)
        raise


def parse_size(text: str, unit: str) -> int:
    """Return ``text`` as a whole number of ``unit`` (MiB or GiB); raises ValueError."""
    match = _SIZE.match(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size; write 512MiB or 2GiB, or a number of {unit}")
    number, given = match.groups()
    exact = Fraction(number) * _MIB_OF[(given or unit).lower()] / _MIB_OF[unit.lower()]
    if exact.denominator != 1:
        raise ValueError(f"{text!r} is not a whole number of {unit}")
    return int(exact)


def read_body(path: Path) -> Document:
    """Read a body from a file, JSON when its name or first character says so, else TOML."""
    try:
        data = path.read_bytes()
        is_json = path.suffix == ".json" or data.lstrip()[:1] == b"{"
        body = msgspec.json.decode(data) if is_json else msgspec.toml.decode(data)
    except (OSError, msgspec.DecodeError) as error:
        raise click.UsageError(f"cannot read {path}: {error}") from error
    if not isinstance(body, dict):
        raise click.UsageError(f"{path} holds no object with name, labels and spec")
    return body


def body_from_options(options: Document) -> Document:
    """Return the body that the options of ``vm create`` stand for, with nothing made up."""
    boot = _given(kernel=options["kernel"], initrd=options["initrd"], cmdline=options["cmdline"])
    placement = _given(
        node_labels=dict(options["node_labels"]),
        affinity=list(options["affinity"]),
        anti_affinity=list(options["anti_affinity"]),
    )
    spec = _given(
        vcpus=options["vcpus"],
        memory_mib=options["memory"],
        power="stopped" if options["stopped"] else None,
        boot=boot,
        disks=list(options["disks"]),
        nics=[{"network": network} for network in options["nics"]],
        placement=placement,
    )
    return _given(name=options["name"], labels=dict(options["labels"])) | {"spec": spec}


def merge(into: Document, newer: Document) -> None:
    """Put ``newer`` over ``into``: objects are merged, everything else is replaced."""
    for key, value in newer.items():
        there = into.get(key)
        if isinstance(there, dict) and isinstance(value, dict):
            merge(there, value)
        else:
            into[key] = value


def _given(**fields: Any) -> Document:
    return {name: value for name, value in fields.items() if value not in (None, {}, [])}


def _create(
    invocation: Invocation, output: Output, name: str, body: Document, waiting: Waiting
) -> None:
    def submit(_: str) -> Answer:
        return invocation.client.post(f"{BASE}/vms", body)

    def done(_: str, operation: OperationView) -> None:
        if output.form is Format.NAME:
            output.names([name])
            return
        seen = invocation.client.get_as(VmView, path_of("vms", operation.target))
        where = f" on {seen.status.where}" if seen.status.where else ""
        output.line(f"{seen.name} created: {seen.status.phase}{where}")

    run_operations(invocation, output, (name,), submit, done, waiting)


def _plan(invocation: Invocation, output: Output, name: str, body: Document) -> None:
    answer = invocation.client.post(f"{BASE}/vms", body, DRY_RUN)
    (planned,) = answer.decode(DryRunView).vms or (PlannedVmView(),)
    plan = planned.placement
    if plan is None:
        if output.form is Format.JSON:
            output.json(answer.body)
        elif output.form is Format.TABLE:
            output.line(f"{name} would be created stopped, and placed when it is started")
        return
    if output.form is Format.TABLE and plan.node is not None:
        output.line(f"{name} would go to {plan.node_name or plan.node}")
    show_plan(output, answer.body, plan, name)
    if plan.node is None:
        raise Unschedulable(
            f"no node can run {name} now: {refusal_summary(plan)}",
            "make room, or ask for less; created now, it would wait for a node",
        )


def _option_hint(error: ApiProblem) -> str:
    """Return which options the problem's pointers come from."""
    options = []
    for fault in error.problem.errors:
        matches = [p for p in _OPTION_OF_POINTER if (fault.pointer + "/").startswith(p + "/")]
        options += [_OPTION_OF_POINTER[p] for p in matches]
    listed = ", ".join(dict.fromkeys(options))
    return f"correct {listed}" if listed else ""
