#!/usr/bin/python
"""Reads several files of the cell at once."""

from __future__ import annotations

DOCUMENTATION = r"""
module: kept_files_info
short_description: Read several files of the cell at once
description:
  - Reads files where the cell's keys and certificates are kept, for handed_files to write.
  - What it returns is secret; the task has to say C(no_log).
version_added: 0.2.0
author:
  - NovaCron
options:
  directory:
    description: Where they are kept.
    type: path
    required: true
  names:
    description: Their names below it.
    type: list
    elements: str
    required: true
attributes:
  check_mode:
    support: full
    description: Changes nothing.
"""

EXAMPLES = r"""
- name: Read the CA's certificate
  novacron.cluster.kept_files_info:
    directory: /etc/novacron/pki
    names:
      - ca.crt
  register: kept
  no_log: true
"""

RETURN = r"""
contents:
  description: What is in each file, in base64, by its name.
  returned: always
  type: dict
missing:
  description: The names that there is no file of.
  returned: always
  type: list
"""

import base64
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule


def main():
    module = AnsibleModule(
        argument_spec={
            "directory": {"type": "path", "required": True},
            "names": {"type": "list", "elements": "str", "required": True},
        },
        supports_check_mode=True,
    )
    contents, missing = {}, []
    for name in module.params["names"]:
        path = Path(module.params["directory"], name)
        try:
            contents[name] = base64.b64encode(path.read_bytes()).decode()
        except FileNotFoundError:
            missing.append(name)
        except OSError as error:
            module.fail_json(msg=f"{path} cannot be read: {error.strerror}")
    module.exit_json(changed=False, contents=contents, missing=missing)


if __name__ == "__main__":
    main()
