"""The options of everything that talks to NovaCron's API."""

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  endpoint:
    description:
      - The URLs of the replicas. Any of them answers every call; the next is asked when one does
        not.
      - "C(NOVACRON_ENDPOINT) in the environment (with commas) stands in for it."
    type: list
    elements: str
  ca:
    description:
      - The file with the cell's CA certificate, on the machine that runs the task.
      - "C(NOVACRON_CA) in the environment stands in for it."
    type: path
  token:
    description:
      - An API token.
      - "C(NOVACRON_TOKEN) in the environment stands in for it."
    type: str
"""
