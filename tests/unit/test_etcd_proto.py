"""The committed etcd_pb2 is what etcd.proto generates."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from grpc_tools import protoc

ROOT = Path(__file__).parents[2]
# The path is part of the descriptor's name, which keeps it apart from other clients' etcd.proto.
PROTO = Path("controlplane/store/etcd.proto")


@pytest.mark.parametrize("name", ["etcd_pb2.py", "etcd_pb2.pyi"])
def test_generated_code_is_current(name: str, tmp_path: Path) -> None:
    (tmp_path / PROTO.parent).mkdir(parents=True)
    shutil.copy(ROOT / PROTO, tmp_path / PROTO)

    arguments = [f"-I{tmp_path}", f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", str(PROTO)]
    assert protoc.main(["protoc", *arguments]) == 0

    generated = (tmp_path / PROTO).with_name(name).read_text()
    committed = (ROOT / PROTO).with_name(name).read_text()
    assert committed == generated, (
        "generate anew: python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. " + str(PROTO)
    )
