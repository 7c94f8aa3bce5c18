"""Every kernel through Mesa's AMD compiler, for chips that are not in this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.amd_shaders import __main__ as amd
from benchmarks.amd_shaders import radv
from benchmarks.amd_shaders.__main__ import (
    CHIPS,
    Chip,
    Compilation,
    compile_cases,
    problems,
    write_page,
)
from benchmarks.amd_shaders.cases import LEAST_SHARED, Case, cases
from benchmarks.amd_shaders.radv import Compiled, find_driver
from uq.errors import DeviceError, ToolMissing
from uq.kernels.vulkan.variants import VARIANTS, Variant

PAGE = Path(__file__).parents[1] / "docs" / "amd.md"
DRIVER = find_driver()  # here, because the tests have a cache folder of their own
NEAT = {"Spilled SGPRs": 0, "Spilled VGPRs": 0, "Scratch size": 0}


@pytest.fixture(scope="module")
def compiled() -> Mapping[Chip, Future[Compilation]]:
    """All chips at the same time, without the validation layer: nothing is executed."""
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor() as pool:
        patch.delenv("VK_INSTANCE_LAYERS")
        return {chip: pool.submit(compile_cases, chip, DRIVER) for chip in CHIPS}


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.family)
def test_no_kernel_spills_and_each_uses_its_instructions(
    chip: Chip, compiled: Mapping[Chip, Future[Compilation]]
) -> None:
    made = zip(cases(), compiled[chip].result().pipelines, strict=True)
    assert [line for pair in made for line in problems(*pair)] == []


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.family)
def test_products_of_any_width_run_on_subgroups_of_one_size(
    chip: Chip, compiled: Mapping[Chip, Future[Compilation]]
) -> None:
    """A column is summed up in the same order on any; here the compiler does not even differ."""
    sizes: dict[str, set[int]] = {}
    for case, one in zip(cases(), compiled[chip].result().pipelines, strict=True):
        if VARIANTS[case.module].subgroup is None:
            sizes.setdefault(case.module.partition("_")[0], set()).add(one.subgroup)
    assert sizes["gemv"] == sizes["norm"] == sizes["attention"] == {64}


def test_calibration_fits_the_shared_memory_of_other_drivers(
    compiled: Mapping[Chip, Future[Compilation]],
) -> None:
    """Behind this driver's 64 KiB: some have half of it, which `systems_cut` knows."""
    made = zip(cases(), compiled[CHIPS[0]].result().pipelines, strict=True)
    shared: dict[object, set[int]] = {}
    for case, one in made:
        if case.module.startswith("dense_"):
            rows = (case.module, dict(case.constants).get("BM"))
            shared.setdefault(rows, set()).add(one.statistics["LDS size"])
    assert max(shared.pop(("dense_systems_matrix", 128))) > LEAST_SHARED
    assert ("dense_systems_matrix", 64) in shared
    assert max(map(max, shared.values())) <= LEAST_SHARED


def test_every_module_that_the_chips_would_pick_is_compiled() -> None:
    """All but the products without the integer dot product and those of calibration without matrix
    instructions, which all three chips have."""
    plain = r"(gemv|experts)_int\dz?|dense_(half|float|systems)"
    without = {name for name in VARIANTS if re.fullmatch(plain, name)}
    assert {case.module for case in cases()} == set(VARIANTS) - without


def test_the_page_lists_every_module_for_every_chip() -> None:
    """If this fails: python -m benchmarks.amd_shaders --write docs/amd.md"""
    tables = PAGE.read_text().split(amd.BEGIN)[1].split(amd.END)[0]
    rows = [line.split(" | ")[0].removeprefix("| ") for line in tables.splitlines()]
    modules = [row for row in rows if row in VARIANTS]
    assert modules == sorted({case.module for case in cases()}) * len(CHIPS)


def test_a_chip_that_the_driver_does_not_know() -> None:
    with pytest.raises(DeviceError, match=r"Radeon 1 \(NONE\): .*NONE.*scripts/mesa fetches it"):
        compile_cases(Chip("Radeon 1", "NONE"), DRIVER)


def test_no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UQ_CACHE", str(tmp_path))
    monkeypatch.setattr(radv, "SYSTEM_DRIVERS", tmp_path)
    with pytest.raises(ToolMissing, match="scripts/mesa"):
        find_driver()


def test_the_cache_of_uq_comes_before_the_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("UQ_CACHE", str(tmp_path))
    manifest = tmp_path / "mesa" / "radeon_icd.json"
    manifest.parent.mkdir()
    manifest.touch()
    assert find_driver() == manifest


@pytest.mark.parametrize("name", sorted(NEAT))
def test_spills_are_problems(name: str) -> None:
    compiled = Compiled(64, {**NEAT, name: 4}, {})
    assert problems(Case("dequantize_int4"), compiled) == [f"dequantize_int4: 4 {name.lower()}"]


@pytest.mark.parametrize(("feature", "opcode"), [("int8dot", "v_dot4"), ("coopmat", "v_wmma")])
def test_a_missing_instruction_is_a_problem(
    feature: str, opcode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Variant("one", "one.comp", features=(feature,))
    monkeypatch.setattr(amd, "VARIANTS", {"one": row})
    without = Compiled(64, NEAT, {"v_add_f32": 3})
    assert problems(Case("one"), without) == [f"one: no {opcode} instruction"]
    assert problems(Case("one"), replace(without, opcodes={f"{opcode}_i32_iu8": 1})) == []


def test_the_page_keeps_what_is_around_the_tables(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{amd.BEGIN}\nold\n{amd.END}\nafter\n")
    write_page(page, ["one", "two"])
    assert page.read_text() == f"before\n{amd.BEGIN}\n\none\n\ntwo\n\n{amd.END}\nafter\n"


def test_an_unusable_driver_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert amd.main(["--driver", str(tmp_path / "none.json")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert capsys.readouterr().err.count("\n") <= 1
