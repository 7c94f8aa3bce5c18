"""`uq npu run` with the emulator, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from uq.cli import main
from uq.kernels.npu.kernels.passthrough.design import passthrough
from uq.kernels.npu.source import print_design


def test_the_command_runs_in_the_emulator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    design = tmp_path / "passthrough.mlir"
    design.write_text(print_design(passthrough("npu1", 1024)))
    assert main(["npu", "run", str(design), "--device", "npu-emulator", "--json"]) == 0
    ran = json.loads(capsys.readouterr().out)
    assert ran["device"] == "emulated npu1, which has no clock"
    assert ran["buffers"][1] == {"buffer": 1, "bytes": 1024, "written": True, "equals": 0}


def test_a_deadlock_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The core waits for whole objects, and the sequence sends half of one."""
    text = print_design(passthrough("npu1", 1024))
    design = tmp_path / "starved.mlir"
    starved = text.replace("[1, 1, 1, 256]", "[1, 1, 1, 128]", 1)
    assert starved != text
    design.write_text(starved)
    assert main(["npu", "run", str(design), "--device", "npu-emulator"]) == 1
    assert "waits for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.mlir"], "an NPU runs a folder made by uq npu build"),
        ([".", "--device", "npu-emulator"], "the emulator runs a design, FILE.mlir"),
        (["{design}", "--device", "npu-emulator", "--input", "{design}"], "is no .npy file"),
        (["{design}", "--device", "npu-emulator", "--input", "{small}"], "its buffer has 1,024"),
        (
            ["{design}", "--device", "npu-emulator", *["--input", "{small}"] * 3],
            "3 inputs for a design of 2 buffers",
        ),
    ],
)
def test_wrong_use_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    design, small = tmp_path / "design.mlir", tmp_path / "small.npy"
    design.write_text(print_design(passthrough("npu1", 1024)))
    np.save(small, np.zeros(3))
    named = [word.format(design=design, small=small) for word in arguments]
    assert main(["npu", "run", *named]) == 2
    assert message in capsys.readouterr().err


def test_a_raw_kernel_is_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw.bin"
    raw.write_bytes(b"AUPN" + bytes(40))
    assert main(["npu", "run", str(raw)]) == 1
    assert "a raw kernel (magic 0x4e505541) says nothing of buffers" in capsys.readouterr().err
