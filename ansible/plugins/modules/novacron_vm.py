#!/usr/bin/python
"""Makes a VM what a playbook says it is."""

from __future__ import annotations

DOCUMENTATION = r"""
module: novacron_vm
short_description: Manage VMs of NovaCron
description:
  - Creates, changes, starts, stops and deletes VMs through the API, and waits until it is done.
  - In check mode the API itself is asked what the change would do, and changes nothing.
version_added: 0.2.0
author:
  - NovaCron
extends_documentation_fragment:
  - novacron.cluster.api
options:
  name:
    description: The VM's name, or its id.
    type: str
    required: true
  state:
    description:
      - C(present) makes it if it is missing, and leaves its power alone otherwise.
    type: str
    choices: [present, running, paused, stopped, absent]
    default: running
  spec:
    description:
      - What the VM is, as the API has it (C(vcpus), C(memory_mib), C(boot), C(disks), C(nics),
        C(placement), C(ha), C(migration)). Needed to make one.
      - Of a VM that exists C(placement), C(ha) and C(migration) are changed in place. Where
        anything else is different, the task fails and nothing is changed.
    type: dict
  labels:
    description: Its labels, all of them; left out, they stay.
    type: dict
  shutdown_s:
    description: So many seconds a guest has to shut down before it is stopped.
    type: int
    default: 60
  timeout:
    description: So many seconds an operation may take.
    type: int
    default: 600
attributes:
  check_mode:
    support: full
    description: The API is asked what the change would do.
  diff_mode:
    support: full
    description: Shows what is different.
"""

EXAMPLES = r"""
- name: A web server that runs
  novacron.cluster.novacron_vm:
    name: web-1
    labels: {tier: gold}
    spec:
      vcpus: 2
      memory_mib: 2048
      boot: {kernel: tiny-kernel, initrd: tiny-initrd}
      disks: [{name: root, size_gib: 20}]

- name: No such VM
  novacron.cluster.novacron_vm:
    name: web-1
    state: absent
"""

RETURN = r"""
vm:
  description: The VM as it is now; null when there is none.
  returned: always
  type: dict
plan:
  description: What the change would do, as the API plans it.
  returned: in check mode, where the API plans
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.novacron.cluster.plugins.module_utils.api import (
    ARGUMENTS,
    ApiError,
    connect,
)

# What of a VM's spec can be changed while it runs.
CHANGEABLE = ("placement", "ha", "migration")
# The action that makes the wanted power of what it is.
ACTIONS = {
    ("running", "stopped"): "start",
    ("running", "paused"): "resume",
    ("paused", "running"): "pause",
    ("stopped", "running"): "shutdown",
    ("stopped", "paused"): "stop",
}


class VmTask:
    def __init__(self, module):
        self.module = module
        self.api = connect(module)
        self.changed = False
        self.plan = None
        self.before = {}
        self.after = {}

    def run(self):
        wanted = self.module.params
        vm = self.api.find("vms", wanted["name"])
        if wanted["state"] == "absent":
            if vm is not None:
                self._delete(vm)
        elif vm is None:
            self._create()
        else:
            self._change(vm)
        if not self.module.check_mode and self.changed:
            vm = self.api.find("vms", wanted["name"])
        return {
            "changed": self.changed,
            "vm": vm,
            "diff": {"before": self.before, "after": self.after},
            **({} if self.plan is None else {"plan": self.plan}),
        }

    def _create(self):
        spec = self.module.params["spec"]
        if spec is None:
            raise ApiError(
                f"there is no VM {self.module.params['name']!r}, and no spec to make one"
            )
        power = self.module.params["state"].replace("present", "running")
        body = {
            "name": self.module.params["name"],
            "labels": self.module.params["labels"] or {},
            "spec": {"power": power, **spec},
        }
        self.after = body
        self._write("POST", "/vms", body, plans=True)

    def _delete(self, vm):
        self.before = {"name": vm["name"], "power": vm["spec"]["power"]}
        self._write("DELETE", f"/vms/{vm['id']}", plans=True)

    def _change(self, vm):
        patch = self._patch(vm)
        power = self.module.params["state"]
        is_now = vm["spec"]["power"]
        action = None if power == "present" else ACTIONS.get((power, is_now))
        if power not in ("present", is_now) and action is None:
            raise ApiError(f"{vm['name']!r} is {is_now}: start it before it can be {power}")
        if patch:
            self._write("PATCH", f"/vms/{vm['id']}", patch)
        if action is not None:
            self.before["power"], self.after["power"] = is_now, power
            body = (
                {"deadline_s": self.module.params["shutdown_s"]} if action == "shutdown" else None
            )
            plans = action in ("start", "stop", "shutdown")
            self._write("POST", f"/vms/{vm['id']}/actions/{action}", body, plans=plans)

    def _patch(self, vm):
        """Return the merge patch that makes the VM what is wanted; fails for what cannot be."""
        patch, fixed = {}, []
        labels = self.module.params["labels"]
        if labels is not None and labels != vm["labels"]:
            gone = {key: None for key in vm["labels"] if key not in labels}
            patch["labels"] = {**gone, **labels}
            self.before["labels"], self.after["labels"] = vm["labels"], labels
        for key, value in (self.module.params["spec"] or {}).items():
            if key == "power" or _covers(vm["spec"].get(key), value):
                continue
            self.before[key], self.after[key] = vm["spec"].get(key), value
            if key in CHANGEABLE:
                patch.setdefault("spec", {})[key] = value
            else:
                fixed.append(key)
        if fixed:
            raise ApiError(
                f"{vm['name']!r} has another {', '.join(sorted(fixed))}, which cannot be changed: "
                "delete it and make it anew, or leave it as it is"
            )
        return patch

    def _write(self, method, path, body=None, plans=False):
        self.changed = True
        if self.module.check_mode:
            if plans:
                self.plan = self.api.request(method, path, body, query={"dry_run": "true"})
            return
        answer = self.api.request(method, path, body)
        if method != "PATCH":
            self.api.wait(answer, self.module.params["timeout"])


def _covers(there, wanted):
    """Tell whether what is there has all that is wanted; what was left out may be anything."""
    if isinstance(wanted, dict):
        return isinstance(there, dict) and all(
            _covers(there.get(key), value) for key, value in wanted.items()
        )
    if isinstance(wanted, list):
        return (
            isinstance(there, list)
            and len(there) == len(wanted)
            and all(_covers(one, other) for one, other in zip(there, wanted, strict=True))
        )
    return there == wanted


def main():
    module = AnsibleModule(
        argument_spec={
            **ARGUMENTS,
            "name": {"type": "str", "required": True},
            "state": {
                "type": "str",
                "choices": ["present", "running", "paused", "stopped", "absent"],
                "default": "running",
            },
            "spec": {"type": "dict"},
            "labels": {"type": "dict"},
            "shutdown_s": {"type": "int", "default": 60},
            "timeout": {"type": "int", "default": 600},
        },
        supports_check_mode=True,
    )
    try:
        module.exit_json(**VmTask(module).run())
    except ApiError as error:
        module.fail_json(msg=str(error), problem=error.problem)


if __name__ == "__main__":
    main()
