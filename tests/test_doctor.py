"""Findings on machines that are trees of files; no NPU took part."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.machines import (
    BROKEN,
    LLVMPIPE,
    NPU,
    RADEON,
    REPORTED,
    VENV,
    Broken,
    Tree,
    broken,
    broken_link,
    healthy,
    memlock_of_8_mib,
    not_in_group,
)
from uq.cli import main
from uq.commands.doctor import summary
from uq.doctor import Finding, Level, diagnose
from uq.doctor.display import display
from uq.doctor.install import COMMANDS
from uq.doctor.mend import mend, set_power_mode
from uq.doctor.npu import check_npu
from uq.doctor.resources import check_resources
from uq.doctor.system import this_system
from uq.doctor.toolchain import check_toolchain
from uq.doctor.vulkan import check_vulkan
from uq.errors import DeviceError, ToolMissing, UsageError
from uq.machine import Machine, examine

GOOD = (Level.OK, Level.NOTE)


@pytest.fixture(scope="module")
def machine() -> Machine:
    """One with all packages and much room."""
    found = examine()
    plenty: dict[str, str | None] = dict.fromkeys(found.packages, "1.0")
    return dataclasses.replace(
        found, packages=plenty, memory=32 << 30, memory_available=24 << 30, disk_free=100 << 30
    )


def wrong(findings: Sequence[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level not in GOOD]


def test_nothing_is_wrong_with_a_machine_that_works(tmp_path: Path, machine: Machine) -> None:
    findings = diagnose(healthy(tmp_path).system(), machine)
    assert wrong(findings) == []
    said = {finding.check: finding.what for finding in findings}
    assert said["npu.device"] == "Strix, XDNA 2, at 0000:c5:00.1 (1022:17f0)"
    assert said["npu.driver"] == "driver amdxdna, Linux 6.17.0-14-generic, firmware 1.1.2.64"
    assert said["xrt.libraries"] == "XRT 2.21.75 in /usr/lib/x86_64-linux-gnu"
    assert said["xrt.power"] == "the NPU's power mode is turbo"


def test_sources_that_were_never_installed_are_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uq.machine.DISTRIBUTION", "no-such-package")
    found = {finding.check: finding for finding in diagnose(healthy(tmp_path).system(), examine())}
    assert found["uq.packages"].level == Level.PROBLEM
    assert "no-such-package" in found["uq.packages"].what


def test_ten_machines_and_more_are_as_users_report_them() -> None:
    assert len(REPORTED) >= 10 and all(machine.source for machine in REPORTED)


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.damage.__name__)
def test_a_broken_machine_is_found_out(case: Broken, tmp_path: Path, machine: Machine) -> None:
    found = wrong(diagnose(broken(case, tmp_path), machine))
    assert tuple(finding.check for finding in found) == case.checks
    assert found[0].level == case.level
    assert case.command in found[0].advice
    for finding in found:
        assert finding.what and finding.why and (finding.advice or finding.then)
        assert str(tmp_path) not in json.dumps(finding.to_json())  # paths are the machine's own


def test_a_new_login_is_all_that_is_missing_to_who_joined_the_group(tmp_path: Path) -> None:
    tree = healthy(tmp_path)
    tree.closed.add("dev/accel/accel0")
    (found,) = wrong(list(check_npu(tree.system())))
    assert found.then == "ann joined render: log out and in again"


def test_an_unknown_revision_is_a_warning(tmp_path: Path) -> None:
    tree = healthy(tmp_path)
    tree.write(f"{NPU}/revision", "0x30")
    (found,) = wrong(list(check_npu(tree.system())))
    assert found.what == "unknown revision 0x30, at 0000:c5:00.1 (1022:17f0)"


@pytest.mark.parametrize(
    ("cpu", "version", "level"),
    [
        ("Intel(R) Xeon(R) Processor", "Linux", Level.NOTE),
        ("AMD Ryzen 7 7840HS w/ Radeon 780M Graphics", "Linux", Level.WARNING),
        ("AMD Ryzen 7 7735HS with Radeon 680M Graphics", "Linux", Level.NOTE),
        ("AMD RYZEN AI MAX+ 395 w/ Radeon 8060S", "Linux", Level.WARNING),
        ("AMD Ryzen AI 9 HX 370", "Linux 6.6-microsoft-standard-WSL2", Level.NOTE),
    ],
)
def test_a_processor_that_should_have_an_npu(
    cpu: str, version: str, level: Level, tmp_path: Path
) -> None:
    tree = Tree(tmp_path)
    tree.write("proc/cpuinfo", f"processor: 0\nmodel name\t: {cpu}\n")
    tree.write("proc/version", version)
    (found,) = check_npu(tree.system())
    assert (found.check, found.level) == ("npu.device", level)


@pytest.mark.parametrize(
    ("distribution", "command"),
    [
        ("ID=fedora", "sudo dnf install xrt python3-xrt"),
        ('ID=ubuntu\nVERSION_ID="26.04"', "sudo apt-get install libxrt2 libxrt-npu2"),
        ("ID=cachyos\nID_LIKE=arch", "sudo pacman -S xrt xrt-plugin-amdxdna"),
        ("ID=linuxmint\nID_LIKE=ubuntu", "sudo add-apt-repository ppa:amd-team/xrt"),
        ("ID=nixos", "https://github.com/amd/xdna-driver"),
    ],
)
def test_commands_are_those_of_the_distribution(
    distribution: str, command: str, tmp_path: Path
) -> None:
    tree = healthy(tmp_path)
    tree.write("etc/os-release", distribution)
    tree.remove("usr/lib/x86_64-linux-gnu")
    found = wrong(list(check_npu(tree.system())))
    assert command in found[0].advice
    assert ("ppa:" in found[0].advice) is ("ppa:" in command)


def test_a_machine_without_amd_needs_no_gpu(tmp_path: Path) -> None:
    tree = Tree(tmp_path, gpus=())
    assert [finding.level for finding in check_vulkan(tree.system())] == [Level.NOTE]


def test_a_software_device_is_named_as_such(tmp_path: Path) -> None:
    tree = Tree(tmp_path, gpus=(LLVMPIPE,))
    (found,) = check_vulkan(tree.system())
    assert found.what == "llvmpipe runs the kernels in software, for tests"


def test_old_mesa_lacks_matrices(tmp_path: Path) -> None:
    tree = healthy(tmp_path)
    tree.gpus = (dataclasses.replace(RADEON, matrices=False),)
    assert "vulkan.matrices" in [finding.check for finding in check_vulkan(tree.system())]


def test_a_gpu_that_cannot_run_the_kernels_says_why(tmp_path: Path) -> None:
    tree = healthy(tmp_path)
    tree.gpus = (dataclasses.replace(RADEON, reason="its driver offers Vulkan 1.2"),)
    (found,) = wrong(list(check_vulkan(tree.system())))
    assert found.what == f"{RADEON.name}: its driver offers Vulkan 1.2"


def test_nomodeset_leaves_the_gpu_without_its_driver(tmp_path: Path) -> None:
    tree = healthy(tmp_path)
    tree.remove("sys/devices/pci0000:00/0000:c4:00.0/driver")
    assert [f.check for f in wrong(list(check_vulkan(tree.system())))] == ["vulkan.kernel"]


def test_a_manifest_of_a_driver_that_is_gone(tmp_path: Path) -> None:
    tree = healthy(tmp_path)
    tree.write("usr/share/vulkan/icd.d/amd_icd64.json", '{"ICD": {"library_path": "amdvlk64.so"}}')
    tree.write("usr/share/vulkan/icd.d/torn.json", '{"ICD": ')
    found = wrong(list(check_vulkan(tree.system())))
    assert [finding.what.rpartition("icd.d/")[2] for finding in found] == [
        "amd_icd64.json names amdvlk64.so, which is not there",
        "torn.json is no manifest",
    ]


def test_little_room_and_a_battery_are_warnings(tmp_path: Path, machine: Machine) -> None:
    tree = Tree(tmp_path)
    tree.write("sys/class/power_supply/AC/type", "Mains")
    tree.write("sys/class/power_supply/AC/online", "0")
    tree.write("sys/firmware/acpi/platform_profile", "low-power")
    small = dataclasses.replace(machine, memory_available=1 << 30, disk_free=1 << 30)
    found = wrong(list(check_resources(tree.system(), small)))
    assert [finding.check for finding in found] == ["uq.memory", "uq.disk", "uq.power", "uq.power"]
    assert {finding.level for finding in found} == {Level.WARNING}


def test_the_toolchain_is_looked_for_where_wheels_put_it(tmp_path: Path) -> None:
    tree = healthy(tmp_path)
    assert [f.command.split()[2] for f in check_toolchain(tree.system())] == [
        "mlir_aie",
        "llvm-aie",
    ]
    for tool in (
        "mlir_aie/bin/aiecc",
        "llvm-aie/bin/clang",
        "llvm-aie/bin/opt",
        "llvm-aie/bin/llc",
    ):
        tree.write(f"{VENV}/{tool}", "#!/bin/sh\n")
    (found,) = check_toolchain(tree.system())
    assert found.level is Level.OK
    tree.write("usr/bin/xclbinutil", "#!/bin/sh\nexit 127\n")
    assert [found.check for found in check_toolchain(tree.system())] == [
        "toolchain.packager",
        "toolchain.compiler",
    ]


Commands = list[tuple[str, ...]]


def mended(
    damage: Callable[[Tree], None], root: Path, answer: bool, code: int = 0, uid: int = 1000
) -> Commands:
    """The commands that `--fix` runs."""
    tree = healthy(root)
    damage(tree)
    system = dataclasses.replace(
        tree.system(), user=dataclasses.replace(tree.system().user, uid=uid)
    )
    run: Commands = []

    def execute(argv: Sequence[str]) -> int:
        run.append(tuple(argv))
        return code

    mend(list(check_npu(system)), system, lambda question: answer, execute)
    return run


def test_nothing_is_mended_without_a_yes(tmp_path: Path) -> None:
    assert mended(not_in_group, tmp_path, answer=False) == []


def test_fix_says_what_came_of_it(tmp_path: Path) -> None:
    tree = healthy(tmp_path)
    not_in_group(tree)
    findings = tuple(check_npu(tree.system()))
    assert "mended;" in summary(1, findings)
    assert "nothing was mended" in summary(0, findings)
    assert "nothing to offer" in summary(0, ())


def test_repairs_run_as_root(tmp_path: Path) -> None:
    argv = ("usermod", "--append", "--groups", "render", "ann")
    assert mended(not_in_group, tmp_path / "user", answer=True) == [("sudo", *argv)]
    assert mended(not_in_group, tmp_path / "root", answer=True, uid=0) == [argv]


def test_the_limit_is_written_for_this_user_alone(tmp_path: Path) -> None:
    ((*_, script),) = mended(memlock_of_8_mib, tmp_path, answer=True)
    assert script == ("echo ann - memlock unlimited > /etc/security/limits.d/99-uq-memlock.conf")


def test_a_link_is_mended_when_one_library_fits(tmp_path: Path) -> None:
    (argv,) = mended(broken_link, tmp_path, answer=True)
    assert argv[-2:] == (
        "libxrt_driver_xdna.so.2.21.75",
        "/usr/lib/x86_64-linux-gnu/libxrt_driver_xdna.so.2",
    )


def test_a_link_is_left_alone_when_two_libraries_fit(tmp_path: Path) -> None:
    def damage(tree: Tree) -> None:
        broken_link(tree)
        tree.write("usr/lib/x86_64-linux-gnu/libxrt_driver_xdna.so.2.22.0", "library")

    assert mended(damage, tmp_path, answer=True) == []


def test_a_repair_that_fails_is_the_last(tmp_path: Path) -> None:
    def damage(tree: Tree) -> None:
        memlock_of_8_mib(tree)
        not_in_group(tree)

    with pytest.raises(DeviceError, match="npu.node: sudo usermod .* failed; nothing after it"):
        mended(damage, tmp_path, answer=True, code=1)


def test_without_sudo_repairs_are_refused(tmp_path: Path) -> None:
    def damage(tree: Tree) -> None:
        not_in_group(tree)
        tree.remove("usr/bin/sudo")

    with pytest.raises(UsageError, match="needs root, and there is no sudo"):
        mended(damage, tmp_path, answer=True)


def test_the_power_mode_is_set_on_request_only(tmp_path: Path) -> None:
    tree = healthy(tmp_path)
    argv = ("sudo", f"{tmp_path}/usr/bin/xrt-smi", "configure", "--pmode", "turbo")
    set_power_mode("turbo", tree.system(), lambda asked: asked != argv)
    with pytest.raises(DeviceError, match="did not set the power mode turbo"):
        set_power_mode("turbo", tree.system(), lambda argv: 1)
    tree.remove("usr/bin/xrt-smi")
    with pytest.raises(ToolMissing, match="xrt-smi is not on the PATH"):
        set_power_mode("turbo", tree.system(), lambda argv: 0)


def test_the_display_marks_levels_and_keeps_commands_whole(
    tmp_path: Path, machine: Machine
) -> None:
    findings = diagnose(broken(BROKEN[0], tmp_path), machine)
    shown = display(machine, findings, colour=False)
    assert "  ✗ /dev/accel/accel0 belongs to the group render (mode 0660), and ann may not" in shown
    assert "\n      sudo usermod --append --groups render ann\n" in shown
    assert shown.endswith("1 problem; uq doctor --fix offers to mend 1")
    assert "\x1b[31m✗\x1b[0m" in display(machine, findings, colour=True)
    assert "  x /dev/accel" in display(machine, findings, colour=False, ascii_only=True)


def test_a_problem_is_an_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uq.doctor.this_system", lambda: broken(BROKEN[0], tmp_path))
    assert main(["doctor"]) == 1


@pytest.mark.parametrize(
    "arguments", [("--json", "--fix"), ("--json", "--power-mode", "turbo"), ("--power-mode", "max")]
)
def test_wrong_use_is_refused(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *arguments]) == 2
    assert capsys.readouterr().err.startswith("uq: ")


def test_repairs_are_not_offered_without_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("uq.doctor.this_system", lambda: broken(BROKEN[0], tmp_path))
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert main(["doctor", "--fix"]) == 2
    assert "run it in a terminal" in capsys.readouterr().err


def test_the_pages_explain_every_finding_and_install_the_same() -> None:
    checks = set(re.findall(r"^\| `(\w+\.\w+)` \|", page("troubleshooting"), re.MULTILINE))
    sources = (file.read_text() for file in Path(diagnose.__code__.co_filename).parent.glob("*.py"))
    areas = "uq|vulkan|npu|xrt|toolchain"
    said = {c for text in sources for c in re.findall(rf'"((?:{areas})\.[a-z]+)"', text)}
    assert checks == said
    for part in ("xrt", "module", "vulkan"):
        for distribution in ("ubuntu", "fedora") if part != "module" else ("ubuntu",):
            for command in COMMANDS[part][distribution].split(" && "):
                assert f"\n{command}\n" in page("hardware")


def page(name: str) -> str:
    return (Path(__file__).parents[1] / f"docs/{name}.md").read_text()


def test_this_machine_is_looked_at() -> None:
    system = this_system()
    assert system.release and system.python.startswith("cpython-") and system.user.name
    assert {finding.area for finding in diagnose(system, examine())} >= {"uq", "npu", "vulkan"}
