"""Every command doing its work, through `main`."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from uq.cli import main
from uq.commands import quantize
from uq.formats.bundle import open_bundle
from uq.formats.checkpoint import open_checkpoint
from uq.kernels.backends import first_run_note
from uq.quantize.plan import LAYOUT_OF_TARGET, METHODS, RECIPES

TEXT = "the time of the world and the city in which they were not one of the first " * 30

Output = Callable[..., tuple[str, str]]


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str]) -> Output:
    """Runs a command; what it wrote to stdout and stderr."""

    def run(*argv: object, code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        assert main([str(argument) for argument in argv]) == code
        return capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint()


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "tiny"
    assert main(["quantize", str(model), "-o", str(out), "--method", "rtn"]) == 0
    return out


def test_the_offered_choices_are_those_of_the_stage() -> None:
    assert set(quantize.RECIPES) == set(RECIPES)
    assert set(quantize.METHODS) == {"auto", *METHODS}
    assert set(quantize.TARGETS) == set(LAYOUT_OF_TARGET)


def test_quantize_names_the_result_and_what_to_do_next(
    model: Path, tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out, err = output("quantize", model, "--method", "rtn", "--group", 32)
    name = f"{model.name}-int4-g32"
    bundle = open_bundle(tmp_path / name)
    assert out.startswith(f"{name}: ") and out.endswith(f"next: uq validate {name}\n")
    assert f"{bundle.bits_per_weight:.2f} bits per weight" in out
    assert [line for line in err.splitlines() if "2/2" in line or "3/3" in line]
    assert {record.group for record in bundle.manifest.tensors.values()} == {32, 64}


def test_quantize_prints_json(model: Path, tmp_path: Path, output: Output) -> None:
    out, _ = output("quantize", model, "-o", tmp_path / "b", "--method", "rtn", "--json")
    facts = json.loads(out)
    bundle = open_bundle(tmp_path / "b")
    assert facts["path"] == str(tmp_path / "b")
    assert facts["bytes"] == bundle.nbytes
    assert facts["sha256"] == bundle.sha256


def test_quantize_takes_a_calibration_text(model: Path, tmp_path: Path, output: Output) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    limits = ("--calibration-tokens", 64, "--method", "gptq")
    output("quantize", model, "-o", tmp_path / "b", "--calibration", tmp_path / "text.txt", *limits)
    calibration = open_bundle(tmp_path / "b").manifest.calibration
    assert calibration is not None
    assert calibration.name.endswith("text.txt") and calibration.tokens <= 64


def test_quantize_draws_other_calibration_windows(
    model: Path, tmp_path: Path, output: Output
) -> None:
    limits = ("--calibration-tokens", 64, "--method", "gptq", "--calibration-seed", 3)
    output("quantize", model, "-o", tmp_path / "b", *limits)
    assert open_bundle(tmp_path / "b").manifest.options["calibration_seed"] == 3


@pytest.mark.parametrize(("wanted", "found"), [((), "chat"), (("plain",), "plain")])
def test_a_model_of_chats_is_calibrated_on_chats(
    wanted: tuple[str, ...], found: str, model: Path, tmp_path: Path, output: Output
) -> None:
    options = ("--calibration-tokens", 64, "--method", "gptq")
    forced = ("--calibration-format", *wanted) if wanted else ()
    _, err = output("quantize", model, "-o", tmp_path / "b", *options, *forced)
    assert open_bundle(tmp_path / "b").manifest.options["calibration_format"] == found
    assert ("calibration: chats, by the model's own template" in err) is (found == "chat")


def test_a_dry_run_writes_nothing(model: Path, tmp_path: Path, output: Output) -> None:
    out, _ = output("quantize", model, "-o", tmp_path / "b", "--dry-run")
    assert "memory" in out and "disk" in out
    assert list(tmp_path.iterdir()) == []
    out, _ = output("quantize", model, "-o", tmp_path / "b", "--dry-run", "--json")
    assert isinstance(json.loads(out), dict)


def test_inspect_shows_a_checkpoint(model: Path, output: Output) -> None:
    out, _ = output("inspect", model)
    parameters = open_checkpoint(model).config.num_parameters()
    assert out.startswith(f"checkpoint {model}: {parameters:,} parameters, ")
    assert "mlp.down_proj" in out and "bf16" in out

    out, _ = output("inspect", model, "--json")
    contents = json.loads(out)
    assert contents["parameters"] == parameters
    assert contents["bits_per_weight"] == 16
    assert sum(kind["weights"] for kind in contents["kinds"]) == parameters


def test_inspect_shows_a_bundle(bundle: Path, output: Output) -> None:
    opened = open_bundle(bundle)
    out, _ = output("inspect", bundle)
    assert out.startswith("bundle tiny: ")
    assert "int4 g32 igpu rtn" in out and opened.sha256 in out

    contents = json.loads(output("inspect", bundle, "--json")[0])
    assert contents["plan"]["recipe"] == "int4"
    assert contents["bits_per_weight"] == pytest.approx(opened.bits_per_weight)
    errors = {tensor["name"]: tensor["relative_error"] for tensor in contents["tensors"]}
    down = "model.layers.0.mlp.down_proj.weight"
    assert errors[down] == opened.manifest.tensors[down].relative_error


def test_inspect_counts_the_towers_of_a_checkpoint(
    tiny_checkpoint: Callable[..., Path], output: Output
) -> None:
    out, _ = output("inspect", tiny_checkpoint(prefix="language_model.model."))
    assert "towers and projectors: 3 tensors, 144 B, which uq quantize keeps" in out


def test_generate_writes_the_text_alone_to_stdout(bundle: Path, output: Output) -> None:
    options = ("-p", "the time", "--max-tokens", 8, "--temperature", 5, "--top-k", 400)
    first, err = output("generate", bundle, *options, "--seed", 7)
    again, _ = output("generate", bundle, *options, "--seed", 7)
    other, _ = output("generate", bundle, *options, "--seed", 8)
    assert first == again != other
    *_, prefill, decode = err.splitlines()  # a first run also says that it compiles
    assert prefill.startswith("prefill: ") and prefill.endswith(" tokens/s")
    assert decode.startswith("decode: ") and decode.endswith(" tokens/s")


def test_generate_reads_the_prompt_from_stdin(
    bundle: Path, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--max-tokens", 8)
    given, _ = output("generate", bundle, "-p", "the time", *options)
    for data in (b"the time", b"the time\n"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "ascii"))
        assert output("generate", bundle, "-p", "-", *options)[0] == given
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\x00")))
    output("generate", bundle, "-p", "-", *options)


def test_generate_applies_the_chat_template(bundle: Path, output: Output) -> None:
    written = "<start_of_turn>user\nthe time<end_of_turn>\n<start_of_turn>model\n"
    options = ("--max-tokens", 8)
    by_hand, _ = output("generate", bundle, "-p", written, *options)
    assert output("generate", bundle, "--chat", "-p", "the time", *options)[0] == by_hand


def test_ctrl_c_stops_a_text_between_two_tokens(bundle: Path, interruptible: list[str]) -> None:
    argv = [*interruptible, "generate", str(bundle), "-p", "the"]
    with subprocess.Popen(
        [*argv, "--max-tokens", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.stdout.read().endswith(b"\n")
        assert process.stderr.read().endswith(b"uq: interrupted\n")
    assert process.returncode == 130


def test_ctrl_c_while_the_command_is_loaded() -> None:
    """No traceback of whatever was being imported."""
    program = """import sys
from uq.__main__ import main

class Early:
    def find_spec(self, name, path=None, target=None):
        if name == "uq.cli":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Early())
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"uq: interrupted\n")


def test_generated_text_survives_a_narrow_terminal_encoding(bundle: Path) -> None:
    """A random model says anything, among it characters that ASCII has not."""
    argv = [sys.executable, "-m", "uq", "generate", str(bundle), "-p", "the", "--seed", "3"]
    done = subprocess.run(
        [*argv, "--temperature", "3", "--max-tokens", "40"],
        capture_output=True,
        env={"PYTHONIOENCODING": "ascii", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert b"?" in done.stdout and done.stdout.isascii()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def validation(bundle: Path, text: Path) -> tuple[object, ...]:
    """Arguments of a quick validation."""
    return ("validate", bundle, "--text", text, "--context", 32, "--chunks", 4, "--no-speed")


def test_validate_prints_a_table_and_saves_a_report(
    validation: tuple[object, ...], bundle: Path, output: Output
) -> None:
    out, _ = output(*validation)
    assert f"report: {bundle / 'report.html'}" in out
    assert "KL divergence" in out and "perplexity ratio" in out
    assert (bundle / "report.html").is_file()
    open_bundle(bundle)


def test_a_model_of_chats_is_validated_on_chats(
    validation: tuple[object, ...], output: Output
) -> None:
    for forced, found in (((), "chat"), (("--text-format", "plain"), "plain")):
        table, _ = output(*validation, "--no-save", *forced)
        report, _ = output(*validation, "--no-save", "--json", *forced)
        assert json.loads(report)["text"]["format"] == found
        assert ("chunks of 32, as chats" in table) is (found == "chat")


def test_validate_prints_the_saved_report_as_json(
    validation: tuple[object, ...], bundle: Path, output: Output
) -> None:
    out, _ = output(*validation, "--json")
    assert json.loads(out) == json.loads((bundle / "report.json").read_text())


def test_validate_can_leave_the_bundle_alone(
    validation: tuple[object, ...], bundle: Path, output: Output
) -> None:
    before = {path: path.stat().st_mtime_ns for path in bundle.iterdir()}
    output(*validation, "--no-save")
    assert {path: path.stat().st_mtime_ns for path in bundle.iterdir()} == before


@pytest.mark.parametrize("limit", [("--max-kld", 0), ("--max-ppl-ratio", 0.5)])
def test_a_missed_limit_fails_behind_the_table(
    limit: tuple[object, ...], validation: tuple[object, ...], output: Output
) -> None:
    out, err = output(*validation, "--no-save", *limit, code=1)
    assert "MISS" in out
    assert err.splitlines()[-1].startswith(f"uq: tiny: {limit[0]} {limit[1]}")


def test_a_met_limit_passes(validation: tuple[object, ...], output: Output) -> None:
    out, _ = output(*validation, "--no-save", "--max-kld", 100, "--json")
    (threshold,) = json.loads(out)["thresholds"]
    assert threshold["passed"] is True


def test_doctor_prints_json(output: Output) -> None:
    machine: dict[str, Any] = json.loads(output("doctor", "--json")[0])
    assert machine["packages"]["numpy"] is not None
    assert machine["memory"] >= machine["memory_available"] > 0
    assert machine["backends"]["cpu"]["available"] is True
    assert machine["backends"]["npu"]["available"] is False
    keys = {"check", "level", "what", "why", "command", "then", "fixable"}
    assert all(finding.keys() == keys for finding in machine["findings"])


def test_doctor_says_how_to_install_what_is_missing(
    output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uq.machine._version", lambda name: None if name == "numba" else "1.0")
    out, _ = output("doctor", code=1)
    assert "the Python package numba is MISSING" in out
    assert "-m pip install numba\n" in out


def test_a_first_run_announces_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_run_note("vulkan") is None
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: iter(()))
    assert first_run_note("auto") == (
        "compiling the kernels for this processor, once; about half a minute"
    )


def test_a_second_run_says_nothing(bundle: Path, output: Output) -> None:
    output("generate", bundle, "-p", "the city", "--max-tokens", "1")
    assert first_run_note("cpu") is None
