"""Designs in bundles, compiled by strict doubles of the tools."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import fake_tools
from uq.cli import main
from uq.errors import BundleError, UsageError
from uq.formats.bundle import open_bundle
from uq.kernels.npu.toolchain.carried import carried, device_of

NAMES = ["passthrough", *(f"attention-{f}-int{b}" for f in ("prefill", "decode") for b in (8, 4))]
TOOLS = ("aiecc", "clang", "opt", "llc")


@pytest.fixture(scope="module")
def carrying(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A bundle with heads of 128 for npu2 that carries its designs, and what was said of it."""
    out = tmp_path_factory.mktemp("npu") / "tiny"
    checkpoint = tiny_checkpoint(head_dim=128)
    options = ["--method", "rtn", "--target", "npu-aie2p"]
    assert main(["quantize", str(checkpoint), "-o", str(out), *options]) == 0
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert main(["npu", "build", str(out)]) == 1
    return out, said.getvalue()


@pytest.fixture
def bundle(carrying: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UQ_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(carrying[0], tmp_path / "tiny"))


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TOOLS:
        wheel = "mlir_aie" if name == "aiecc" else "llvm-aie"
        tool = tmp_path / "site" / wheel / "bin" / name
        tool.parent.mkdir(parents=True, exist_ok=True)
        tool.write_text(fake_tools.SCRIPT)
        tool.chmod(0o755)
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "calls.log"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "site")])


def index(bundle: Path) -> dict[str, Any]:
    return dict(json.loads((bundle / "npu/npu.json").read_text())["designs"])


def test_without_a_compiler_a_bundle_carries_its_designs(
    bundle: Path, carrying: tuple[Path, str]
) -> None:
    _, said = carrying
    assert "designs for npu2, not compiled" in said and "Peano not found; run: pip" in said
    assert {name: state for name, (_, state) in carried(bundle).items()} == dict.fromkeys(
        NAMES, "not compiled"
    )
    attention = bundle / "npu/attention-decode-int4"
    assert {path.name for path in attention.iterdir()} >= {"design.mlir", "attention.cc"}
    assert index(bundle)["attention-decode-int4"]["objects"]["attention.o"]["defines"]["DIM"] == 128
    open_bundle(bundle, verify="full")


def test_a_machine_with_a_compiler_adds_the_binaries(bundle: Path, tools: None) -> None:
    assert main(["npu", "build", str(bundle)]) == 0
    for name in NAMES:
        assert index(bundle)[name]["state"] == "compiled"
        assert {"aie.xclbin", "insts.bin", "build.json"} <= set(index(bundle)[name]["files"])
    open_bundle(bundle, verify="full")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "passthrough/design.mlir").write_text("module {}"), "was changed"),
        (lambda root: (root / "attention-decode-int8/attention.cc").unlink(), "is missing or"),
        (lambda root: (root / "npu.json").write_text("{"), "is no index of designs"),
        (lambda root: (root / "npu.json").write_text('{"schema": 2}'), "schema 2 is not known"),
        (
            lambda root: (root / "npu.json").write_text(
                '{"schema": 1, "designs": {"..": {"files": {}, "objects": {}, "state": ""}}}'
            ),
            "'..' is no name of a file",
        ),
        (lambda root: shutil.rmtree(root), "carries no designs"),
    ],
)
def test_damaged_designs_are_refused(
    damage: Callable[[Path], object], message: str, bundle: Path
) -> None:
    damage(bundle / "npu")
    with pytest.raises(BundleError, match=message):
        carried(bundle)


def test_a_head_size_without_a_kernel_is_named(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    assert main(["quantize", str(tiny_checkpoint()), "-o", str(out), "--method", "rtn"]) == 0
    assert main(["npu", "build", str(out), "--device", "npu1"]) == 2
    assert "no attention kernel for head size" in capsys.readouterr().err
    assert not (out / "npu").exists()


def test_a_bundle_for_a_gpu_needs_a_device() -> None:
    assert device_of(["npu-aie2", "row"], None) == "npu1"
    assert device_of(["row"], "npu2") == "npu2"
    with pytest.raises(UsageError, match="say --device npu1 or npu2"):
        device_of(["row", "igpu"], None)


def test_options_of_one_design_are_not_for_bundles(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["npu", "build", str(bundle), "-o", "elsewhere"]) == 2
    assert "a bundle takes --device, --dry-run and --json" in capsys.readouterr().err


def test_a_dry_run_shows_the_commands_of_every_design(
    bundle: Path, tools: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of those that the bundle would get for the other NPU; it keeps what it carries."""
    before = (bundle / "npu/npu.json").read_bytes()
    assert main(["npu", "build", str(bundle), "--device", "npu1", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    titles = [line[2:] for line in lines if line.startswith("# ")]
    assert [title for title in titles if not title.startswith("uq: ")] == NAMES
    compiled = [line for line in lines if "attention.cc" in line]
    assert len(compiled) == 4 and all("--target=aie2-none" in line for line in compiled)
    assert (bundle / "npu/npu.json").read_bytes() == before
