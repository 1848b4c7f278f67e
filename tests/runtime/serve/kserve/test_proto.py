"""The committed messages are those of the file, and agree with tritonclient's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tritonclient.grpc import service_pb2

from runtime.serve.kserve.proto import inference_pb2 as pb
from tests import ROOT

PROTO = "runtime/serve/kserve/proto/inference.proto"


def test_generating_again_changes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"]
    subprocess.run([*command, PROTO], cwd=ROOT, check=True)
    for suffix in ("_pb2.py", "_pb2.pyi"):
        name = PROTO.replace(".proto", suffix)
        assert (tmp_path / name).read_text() == (ROOT / name).read_text()


def fields(message: Any) -> dict[int, tuple[Any, ...]]:
    kinds = {one.number: (one.name, one.type, one.is_repeated, one.message_type) for one in message.fields}
    return {n: (name, kind, many, of.name if of else None) for n, (name, kind, many, of) in kinds.items()}


def messages(container: Any, path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, one in container.items():
        found |= {f"{path}{name}": one} | messages(one.nested_types_by_name, f"{path}{name}.")
    return found


@pytest.mark.parametrize("name", messages(pb.DESCRIPTOR.message_types_by_name))
def test_fields_are_those_of_the_client(name: str) -> None:
    ours = messages(pb.DESCRIPTOR.message_types_by_name)[name]
    pool = dict(service_pb2.DESCRIPTOR.message_types_by_name)
    for file in service_pb2.DESCRIPTOR.dependencies:
        pool |= dict(file.message_types_by_name)
    theirs = fields(messages(pool)[name])
    assert fields(ours).items() <= theirs.items()


def test_both_live_in_one_process() -> None:
    assert pb.DESCRIPTOR.package != service_pb2.DESCRIPTOR.package
    sent = service_pb2.ModelInferRequest(model_name="m", id="7")
    sent.parameters["timeout"].int64_param = 5
    assert pb.ModelInferRequest.FromString(sent.SerializeToString()).parameters["timeout"].int64_param == 5
