#!/usr/bin/python
"""Cordons and drains nodes, and waits until they are empty."""

from __future__ import annotations

DOCUMENTATION = r"""
module: novacron_node
short_description: Manage nodes of NovaCron
description:
  - Cordons, uncordons and drains nodes through the API.
version_added: 0.2.0
author:
  - NovaCron
extends_documentation_fragment:
  - novacron.cluster.api
options:
  name:
    description: The node's name, or its id.
    type: str
    required: true
  state:
    description:
      - C(ready) waits until the control plane hears it, and leaves its cordon alone.
      - C(drained) cordons it and moves its VMs away.
    type: str
    choices: [ready, cordoned, uncordoned, drained]
    default: ready
  reason:
    description: Why, for whoever looks.
    type: str
    default: ""
  skip:
    description: VMs that stay on a node that is drained.
    type: list
    elements: str
    default: []
  timeout:
    description: So many seconds it may take.
    type: int
    default: 3600
attributes:
  check_mode:
    support: full
    description: The API is asked what a drain would do.
  diff_mode:
    support: full
    description: Shows what is different.
"""

EXAMPLES = r"""
- name: An empty node
  novacron.cluster.novacron_node:
    name: node1
    state: drained
    reason: new memory

- name: In use again
  novacron.cluster.novacron_node:
    name: node1
    state: uncordoned
"""

RETURN = r"""
node:
  description: The node as it is now.
  returned: always
  type: dict
plan:
  description: Where each VM would go, as the API plans it.
  returned: in check mode, of a node that would be drained
  type: dict
"""

import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.novacron.cluster.plugins.module_utils.api import (
    ARGUMENTS,
    ApiError,
    connect,
)

POLL_S = 1


class NodeTask:
    def __init__(self, module):
        self.module = module
        self.api = connect(module)

    def run(self):
        node = self._node()
        state = self.module.params["state"]
        if state == "ready":
            return {"changed": False, "node": self._until_ready(node)}
        before = _shown(node)
        wanted = {"cordoned": state != "uncordoned"}
        if state == "drained":
            wanted["vms"] = len(self.module.params["skip"])
        result = {"changed": any(before[key] > value for key, value in wanted.items())}
        result["changed"] |= before["cordoned"] != wanted["cordoned"]
        result["diff"] = {"before": before, "after": {**before, **wanted}}
        if result["changed"]:
            result.update(self._change(node, state))
        return {"node": self._node(), **result}

    def _change(self, node, state):
        path = f"/nodes/{node['id']}/actions"
        reason = {"reason": self.module.params["reason"]}
        if state != "drained":
            if not self.module.check_mode:
                verb = "uncordon" if state == "uncordoned" else "cordon"
                self.api.request("POST", f"{path}/{verb}", reason)
            return {}
        order = {**reason, "skip": self.module.params["skip"]}
        if self.module.check_mode:
            query = {"dry_run": "true"}
            return {"plan": self.api.request("POST", f"{path}/drain", order, query=query)}
        operation = self.api.request("POST", f"{path}/drain", order)
        try:
            self.api.wait(operation, self.module.params["timeout"])
        except ApiError as error:
            if not self._only_skipped_are_left(error.problem):
                raise
        return {}

    def _only_skipped_are_left(self, problem):
        """Tell whether a drain is incomplete for nothing but what it was told to leave."""
        if problem.get("code") != "drain_incomplete":
            return False
        skipped = [self.api.find("vms", reference) for reference in self.module.params["skip"]]
        names = {vm["name"] for vm in skipped if vm is not None}
        return all(fault["pointer"].removeprefix("/vms/") in names for fault in problem["errors"])

    def _until_ready(self, node):
        until = time.monotonic() + self.module.params["timeout"]
        while node["state"] != "ready":
            if time.monotonic() > until:
                raise ApiError(f"node {node['name']!r} is still {node['state']}")
            time.sleep(POLL_S)
            node = self._node()
        return node

    def _node(self):
        node = self.api.find("nodes", self.module.params["name"])
        if node is None:
            raise ApiError(f"there is no node {self.module.params['name']!r}")
        return node


def _shown(node):
    return {"cordoned": node["cordoned"], "vms": node["allocated"]["vms"]}


def main():
    module = AnsibleModule(
        argument_spec={
            **ARGUMENTS,
            "name": {"type": "str", "required": True},
            "state": {
                "type": "str",
                "choices": ["ready", "cordoned", "uncordoned", "drained"],
                "default": "ready",
            },
            "reason": {"type": "str", "default": ""},
            "skip": {"type": "list", "elements": "str", "default": []},
            "timeout": {"type": "int", "default": 3600},
        },
        supports_check_mode=True,
    )
    try:
        module.exit_json(**NodeTask(module).run())
    except ApiError as error:
        module.fail_json(msg=str(error), problem=error.problem)


if __name__ == "__main__":
    main()
