"""A machine that joins a cell: its configuration and files, and `novacron-agent join` on it."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from pathlib import Path

import tomli_w

from agent.config import AgentConfig
from agent.identity_files import IdentityFiles
from shared.config import load_config
from shared.tls import TlsMaterial, load_material
from tests.integration.replica_process import ROOT

LIMIT_S = 60.0


class JoiningNode:
    def __init__(self, directory: Path, name: str, agents_address: str) -> None:
        self.name = name
        self.tls = directory / "tls"
        self.qemu = directory / "qemu"
        self.config_file = directory / "agent.toml"
        for each in (self.tls, self.qemu):
            each.mkdir(parents=True)
        identity = str(self.tls / "agent.pem")
        self.config_file.write_text(
            tomli_w.dumps(
                {
                    "node_name": name,
                    "address": f"{name}.example",
                    "state_dir": str(directory / "state"),
                    "controlplane": [agents_address],
                    "tls": {
                        "ca": str(self.tls / "ca.crt"),
                        "peers_ca": str(self.tls / "peers.crt"),
                        "certificate": identity,
                        "key": identity,
                    },
                    "hypervisor": {"qemu_tls_dir": str(self.qemu)},
                }
            )
        )

    @property
    def config(self) -> AgentConfig:
        return load_config(self.config_file, AgentConfig, {})

    @property
    def files(self) -> IdentityFiles:
        return IdentityFiles(self.config)

    @property
    def material(self) -> TlsMaterial:
        tls = self.config.tls
        return load_material(tls.ca, tls.certificate, tls.key)

    async def start_join(self, token: str, endpoints: Sequence[str], wait_s: float) -> Process:
        """Start the command; the token goes in on its standard input."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "agent", "--config", str(self.config_file), "join"),
            *("--token-file", "-", "--wait", str(wait_s)),
            *(part for url in endpoints for part in ("--endpoint", url)),
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            cwd=ROOT,
            env={"PATH": os.environ["PATH"]},
        )
        assert process.stdin is not None
        process.stdin.write(token.encode())
        process.stdin.close()
        return process

    async def join(
        self, token: str, endpoints: Sequence[str], wait_s: float = 0.0
    ) -> tuple[int, str]:
        """Run the command; returns its status and all that it said."""
        process = await self.start_join(token, endpoints, wait_s)
        async with asyncio.timeout(LIMIT_S):
            output, complaints = await process.communicate()
        return process.returncode or 0, (output + complaints).decode()
