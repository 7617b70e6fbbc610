#!/usr/bin/python
"""Writes several files of the cell at once."""

from __future__ import annotations

DOCUMENTATION = r"""
module: handed_files
short_description: Write several files of the cell at once
description:
  - Writes what kept_files_info has read, each file all at once, readable to nobody else meanwhile.
  - Their contents are secret; the task has to say C(no_log).
version_added: 0.2.0
author:
  - NovaCron
options:
  contents:
    description: What is in each file, in base64, by its name.
    type: dict
    required: true
  files:
    description: Where each of them goes.
    type: list
    elements: dict
    required: true
    suboptions:
      from:
        description: Its name in O(contents).
        type: str
        required: true
      to:
        description: Its path; the directory has to be there.
        type: path
        required: true
      group:
        description: Who may read it beside root.
        type: str
        default: root
      mode:
        description: Its mode.
        type: str
        default: "0640"
attributes:
  check_mode:
    support: full
    description: Says what would be written.
"""

EXAMPLES = r"""
- name: Write the CA's certificate
  novacron.cluster.handed_files:
    contents: "{{ kept.contents }}"
    files:
      - from: ca.crt
        to: /etc/novacron/tls/ca.crt
        mode: "0644"
  no_log: true
"""

RETURN = r"""
written:
  description: The paths of what was, or would be, written or given another mode or group.
  returned: always
  type: list
"""

import base64
import os
import shutil
import tempfile
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule


def main():
    module = AnsibleModule(
        argument_spec={
            "contents": {"type": "dict", "required": True, "no_log": True},
            "files": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "from": {"type": "str", "required": True},
                    "to": {"type": "path", "required": True},
                    "group": {"type": "str", "default": "root"},
                    "mode": {"type": "str", "default": "0640"},
                },
            },
        },
        supports_check_mode=True,
    )
    written = []
    for file in module.params["files"]:
        content = base64.b64decode(module.params["contents"][file["from"]])
        if _write(module, content, file):
            written.append(file["to"])
    module.exit_json(changed=bool(written), written=written)


def _write(module, content, file):
    """Make one file what it is to be; returns whether it was, or would be, changed."""
    path = Path(file["to"])
    differs = _content(path) != content
    if differs and not module.check_mode:
        # Made for nobody else to read, and of its final mode before it has its name.
        descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=".novacron-")
        with os.fdopen(descriptor, "wb") as made:
            made.write(content)
            made.flush()
            os.fsync(made.fileno())
        shutil.chown(draft, "root", file["group"])
        Path(draft).chmod(int(file["mode"], 8))
        module.atomic_move(draft, str(path), keep_dest_attrs=False)
    if differs and module.check_mode:
        return True
    changed = module.set_owner_if_different(str(path), "root", differs)
    changed = module.set_group_if_different(str(path), file["group"], changed)
    return module.set_mode_if_different(str(path), file["mode"], changed)


def _content(path):
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


if __name__ == "__main__":
    main()
