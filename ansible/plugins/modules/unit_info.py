#!/usr/bin/python
"""Says whether a service is older than what it runs on."""

from __future__ import annotations

DOCUMENTATION = r"""
module: unit_info
short_description: Whether a service is older than what it runs on
description:
  - Compares when a service was started with when its files were last changed.
  - Unlike a handler it also finds out after a run that was cut off before the restart.
version_added: 0.2.0
author:
  - NovaCron
options:
  name:
    description: The service, without its suffix.
    type: str
    required: true
  files:
    description: What it reads when it starts. A link counts as itself; what is missing, not at all.
    type: list
    elements: path
    required: true
attributes:
  check_mode:
    support: full
    description: Changes nothing.
"""

EXAMPLES = r"""
- name: Look whether the agent runs what is configured
  novacron.cluster.unit_info:
    name: novacron-agent
    files:
      - /etc/novacron/agent.toml
  register: found
"""

RETURN = r"""
running:
  description: Whether the service runs.
  returned: always
  type: bool
newer:
  description: The files that have changed since it was started; none when it does not run.
  returned: always
  type: list
"""

import os
import time

from ansible.module_utils.basic import AnsibleModule


def main():
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "files": {"type": "list", "elements": "path", "required": True},
        },
        supports_check_mode=True,
    )
    started = _started(module, module.params["name"])
    newer = []
    if started is not None:
        newer = [path for path in module.params["files"] if _changed(path) > started]
    module.exit_json(changed=False, running=started is not None, newer=newer)


def _started(module, name):
    """Return when a service was started, in seconds since the epoch; None when it does not run."""
    words = ["systemctl", "show", "--property=ActiveState,ExecMainStartTimestampMonotonic"]
    _, told, _ = module.run_command([*words, f"{name}.service"], check_rc=True)
    facts = dict(line.split("=", 1) for line in told.splitlines())
    if facts["ActiveState"] not in ("active", "activating", "reloading"):
        return None
    booted = time.time() - time.monotonic()
    return booted + int(facts["ExecMainStartTimestampMonotonic"]) / 1e6


def _changed(path):
    """Return when something was last changed, also its name or mode; 0 when it is missing."""
    try:
        return os.lstat(path).st_ctime
    except FileNotFoundError:
        return 0


if __name__ == "__main__":
    main()
