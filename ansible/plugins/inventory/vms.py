"""An inventory of the VMs that NovaCron runs."""

from __future__ import annotations

DOCUMENTATION = r"""
name: vms
short_description: VMs of NovaCron as an inventory
description:
  - Lists VMs through the API, in groups by what they are.
  - The file's name has to end in C(novacron.yml) or C(novacron.yaml).
version_added: 0.2.0
author:
  - NovaCron
extends_documentation_fragment:
  - constructed
options:
  plugin:
    description: The name of this plugin.
    required: true
    choices: [novacron.cluster.vms]
  endpoint:
    description: The URLs of the replicas.
    type: list
    elements: str
    env: [{name: NOVACRON_ENDPOINT}]
    required: true
  ca:
    description: The file with the cell's CA certificate.
    type: path
    env: [{name: NOVACRON_CA}]
    required: true
  token:
    description: An API token.
    type: str
    env: [{name: NOVACRON_TOKEN}]
    required: true
  phases:
    description: Only VMs in one of these phases; all when it is empty.
    type: list
    elements: str
    default: [Running]
"""

EXAMPLES = r"""
# prod.novacron.yml
plugin: novacron.cluster.vms
keyed_groups:
  - key: novacron_node
    prefix: node
  - key: novacron_labels.tier
    prefix: tier
"""

from ansible.errors import AnsibleParserError
from ansible_collections.novacron.cluster.plugins.module_utils.api import Api, ApiError

from ansible.plugins.inventory import BaseInventoryPlugin, Constructable


class InventoryModule(BaseInventoryPlugin, Constructable):
    NAME = "novacron.cluster.vms"

    def verify_file(self, path):
        return super().verify_file(path) and path.endswith(("novacron.yml", "novacron.yaml"))

    def parse(self, inventory, loader, path, cache=True):
        super().parse(inventory, loader, path, cache)
        self._read_config_data(path)
        api = Api(*(self.get_option(name) for name in ("endpoint", "ca", "token")))
        try:
            vms = api.items("vms")
            nodes = {node["id"]: node["name"] for node in api.items("nodes")}
        except ApiError as error:
            raise AnsibleParserError(f"{path}: {error}") from error
        phases = self.get_option("phases")
        for vm in vms:
            if not phases or vm["status"]["phase"] in phases:
                self._add(vm, nodes)

    def _add(self, vm, nodes):
        name = self.inventory.add_host(vm["name"])
        addresses = vm["status"]["addresses"]
        facts = {
            "novacron_id": vm["id"],
            "novacron_phase": vm["status"]["phase"],
            "novacron_node": nodes.get(vm["status"]["node"]),
            "novacron_labels": vm["labels"],
            "novacron_addresses": addresses,
        }
        if addresses:
            facts["ansible_host"] = addresses[0]
        for key, value in facts.items():
            self.inventory.set_variable(name, key, value)
        strict = self.get_option("strict")
        self._set_composite_vars(self.get_option("compose"), facts, name, strict=strict)
        self._add_host_to_composed_groups(self.get_option("groups"), facts, name, strict=strict)
        self._add_host_to_keyed_groups(self.get_option("keyed_groups"), facts, name, strict=strict)
