"""Bad input through the command line: one line on stderr, the exit code, nothing half-written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from uq.cli import main

WEIGHTS = "model.safetensors"
DOWN = "model.layers.1.mlp.down_proj.weight"
TEXT = "the time of the world and the city in which they were not " * 40

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must fail; its one line, which must hold all `parts`."""

    def run(argv: list[object], *parts: str, code: int = 1) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in argv]) == code
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = (line for line in err.splitlines() if line.startswith("uq: "))
        assert err.endswith(f"{line}\n") and "Traceback" not in err
        for part in parts:
            assert part in line
        return line

    return run


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "good"
    assert main(["quantize", str(tiny_checkpoint()), "-o", str(out), "--method", "rtn"]) == 0
    return out


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def edit_weights(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def truncate(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 100)


def oversize_header(folder: Path) -> None:
    with (folder / WEIGHTS).open("r+b") as file:
        file.write((1 << 40).to_bytes(8, "little"))


def drop_tensor(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop(DOWN))


def cut_tensor(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({DOWN: tensors[DOWN][:, :64].copy()}))


def integer_tensor(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({DOWN: tensors[DOWN].astype(np.int32)}))


def unknown_architecture(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])


def drop_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (truncate, (WEIGHTS,)),
        (oversize_header, (WEIGHTS, "1099511627776")),
        (drop_tensor, (DOWN, "missing")),
        (cut_tensor, (DOWN, "(128, 64)", "(128, 256)")),
        (integer_tensor, (DOWN, "i32")),
        (unknown_architecture, ("llama", "gemma3")),
        (drop_tokenizer, ("tokenizer.json",)),
    ],
)
def test_a_broken_checkpoint_is_refused_before_anything_is_written(
    damage: Callable[[Path], None],
    parts: tuple[str, ...],
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    refused: Refused,
) -> None:
    model = tiny_checkpoint(dtype="f32")
    damage(model)
    refused(["quantize", model, "-o", tmp_path / "out", "--method", "rtn"], *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", DOWN, "model.norm.weight"])
def test_a_weight_that_is_no_number_is_named(
    value: float,
    name: str,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    refused: Refused,
) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors[name].flat[3] = value

    model = tiny_checkpoint(dtype="f32")
    edit_weights(model, spoil)
    refused(["quantize", model, "-o", tmp_path / "out", "--method", "rtn"], name, str(value))
    assert not (tmp_path / "out").exists()


def test_a_group_that_does_not_divide_is_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, refused: Refused
) -> None:
    model = tiny_checkpoint(hidden=96)
    parts = ("96 columns", "group 64", "--group 32")
    refused(["quantize", model, "-o", tmp_path / "out", "--group", "64"], *parts, code=2)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_does_not_exist_is_refused(tmp_path: Path, refused: Refused) -> None:
    refused(["quantize", tmp_path / "nothing", "-o", tmp_path / "out"], "nothing", code=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("", ("the model's name is empty",)),
        ("org/tiny@main", ("org/tiny --revision main",)),
    ],
)
def test_a_name_that_is_none_says_what_to_type(
    name: str, parts: tuple[str, ...], refused: Refused
) -> None:
    refused(["inspect", name], *parts, code=2)


def test_the_current_folder_is_no_output(
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_checkpoint()
    monkeypatch.chdir(tmp_path)
    refused(["quantize", model, "-o", "."], "-o .: is the current folder", code=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("bpw", "part"),
    [
        ("nan", "expected a number above 0"),
        ("-1", "expected a number above 0"),
        ("3", "the smallest grids take 4."),
        ("100", "the largest grids take 8."),
    ],
)
def test_bits_that_no_grids_have_are_refused(
    bpw: str, part: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path, refused: Refused
) -> None:
    refused(["quantize", tiny_checkpoint(), "-o", tmp_path / "b", "--bpw", bpw], part, code=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", "null", '{"model": {"type": "Unigram"}}'])
def test_a_tokenizer_that_is_no_use_is_refused_without_calibration_too(
    content: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path, refused: Refused
) -> None:
    model = tiny_checkpoint()
    (model / "tokenizer.json").write_text(content)
    refused(["quantize", model, "-o", tmp_path / "b", "--method", "rtn"], "tokenizer.json")
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_cannot_be_saved_is_refused_before_the_work(
    bundle: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uq.validate.validate.validate", None)  # the work
    monkeypatch.setattr("uq.validate.files.os.access", lambda folder, mode: False)
    refused(["validate", bundle], "no report can be written", "--no-save", code=2)


def test_a_disk_that_is_full_behind_the_work_costs_the_report_alone(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(report: object, folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("uq.validate.files.save_report", full)
    assert main(["validate", str(bundle), "--chunks", "1", "--context", "32", "--no-speed"]) == 1
    out, err = capsys.readouterr()
    assert "KL divergence" in out
    assert err.endswith("uq: no space left on the disk; free some and run it again\n")


def test_what_the_model_does_not_use_is_said(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    model = tiny_checkpoint(extra={name: np.full(128, 5, np.float32)})
    assert main(["quantize", str(model), "-o", str(tmp_path / "b"), "--method", "rtn"]) == 0
    line = f"left out: tensors that the model does not use: 1, 256 bytes, e.g. {name}"
    assert line in capsys.readouterr().err.splitlines()
    assert main(["inspect", str(tmp_path / "b")]) == 0
    assert line in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("content", [b"", b"too short", b"\xff\xfe\x00 not UTF-8"])
def test_a_calibration_text_that_is_no_use_is_refused(
    content: bytes, tiny_checkpoint: Callable[..., Path], tmp_path: Path, refused: Refused
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    argv = ["quantize", tiny_checkpoint(), "-o", tmp_path / "out", "--method", "gptq"]
    refused([*argv, "--calibration", text], "text.txt", code=2)
    assert list(tmp_path.iterdir()) == [text]


def test_an_output_that_exists_is_kept(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("keep")
    refused(["quantize", tiny_checkpoint(), "-o", tmp_path / "out"], "out", "exists", code=2)
    assert (tmp_path / "out" / "precious").read_text() == "keep"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_disk_that_fills_up_on_the_way_is_one_line(
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel may find out only when the data are synced; the second shard is hit here."""
    sync, calls = os.fsync, iter(range(1000))

    def full(descriptor: int) -> None:
        if next(calls) == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    argv = ["quantize", tiny_checkpoint(), "-o", tmp_path / "out", "--method", "rtn"]
    monkeypatch.setattr(os, "fsync", full)
    refused(argv, "No space left on device", "bytes needed", "free")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert main([str(argument) for argument in argv]) == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB where we may mount one, else a disk said to be that small."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    # Root in a container may often not mount.
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0:
        yield folder
        subprocess.run(["umount", str(folder)], check=True)
    else:
        usage = shutil.disk_usage(folder)._replace(free=256 << 10)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: usage)
            yield folder


def test_a_disk_that_is_too_small_is_refused_at_once(
    tiny_checkpoint: Callable[..., Path], small_disk: Path, refused: Refused
) -> None:
    model = tiny_checkpoint(ffn=1024)
    line = refused(["quantize", model, "-o", small_disk / "out"], "bytes needed", "free")
    assert "layer" not in line
    assert list(small_disk.iterdir()) == []


def test_ctrl_c_stops_with_one_line_and_the_run_can_go_on(
    tiny_checkpoint: Callable[..., Path], interruptible: list[str], tmp_path: Path
) -> None:
    model = tiny_checkpoint(layers=12, hidden=256, ffn=1024)
    argv = [*interruptible, "quantize", str(model), "--method", "rtn", "-o"]
    with subprocess.Popen(
        [*argv, str(tmp_path / "out")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stderr:
            if " 3/" in line:
                break
        process.send_signal(signal.SIGINT)
        *_, note, last = process.stderr.readlines()
        assert process.stdout.read() == ""
    assert process.returncode == 130
    assert note.startswith(f"{tmp_path}/out.partial keeps ") and last == "uq: interrupted\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]

    for name in ("out", "unbroken"):
        subprocess.run([*argv, str(tmp_path / name)], check=True, capture_output=True)
    sums = [(tmp_path / name / "manifest.sha256").read_text() for name in ("out", "unbroken")]
    assert sums[0] == sums[1]


def test_a_bundle_from_a_newer_uq_asks_for_an_update(copy: Path, refused: Refused) -> None:
    edit_json(copy / "manifest.json", schema=99)
    digest = hashlib.sha256((copy / "manifest.json").read_bytes()).hexdigest()
    (copy / "manifest.sha256").write_text(f"{digest}  manifest.json\n")
    refused(["generate", copy, "-p", "the"], "schema 99", "update uq")
    refused(["inspect", copy], "schema 99", "update uq")


def test_one_flipped_bit_in_any_file_is_found(copy: Path, refused: Refused) -> None:
    for path in sorted(copy.rglob("*")):
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        path.write_bytes(flipped)
        refused(["generate", copy, "-p", "the"], path.name)
        refused(["validate", copy, "--no-save"], path.name)
        path.write_bytes(whole)


def test_a_checkpoint_is_no_bundle(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, refused: Refused
) -> None:
    model = tiny_checkpoint()
    for command in (["generate", model, "-p", "the"], ["validate", model]):
        refused(command, str(model), "uq quantize", code=2)
    refused(["generate", tmp_path / "nothing", "-p", "the"], "nothing", "uq quantize", code=2)


def test_a_text_shorter_than_one_window_is_refused(
    bundle: Path, tmp_path: Path, refused: Refused
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("the time of the world")
    refused(["validate", bundle, "--text", text, "--no-save"], "8 tokens", "512", code=2)


def test_a_text_that_does_not_exist_is_refused(bundle: Path, refused: Refused) -> None:
    refused(["validate", bundle, "--text", "/nowhere.txt", "--no-save"], "/nowhere.txt", code=2)


def test_a_device_that_is_not_there_says_why(bundle: Path, refused: Refused) -> None:
    device = ("--device", "npu")
    refused(
        ["generate", bundle, "-p", "the", *device],
        "XRT's Python module; run: uq doctor; use --device cpu",
    )
    refused(
        ["validate", bundle, *device, "--no-save"],
        "XRT's Python module; run: uq doctor; use --device cpu",
    )


def test_a_gpu_of_another_name_lists_those_that_are_there(bundle: Path, refused: Refused) -> None:
    device = ("--device", "vulkan:nonesuch")
    refused(["generate", bundle, "-p", "x", *device], "'nonesuch'; there are 0: ", code=2)


def test_a_text_beyond_the_context_is_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, refused: Refused
) -> None:
    model = tiny_checkpoint(config={"max_position_embeddings": 64})
    assert main(["quantize", str(model), "-o", str(tmp_path / "out"), "--method", "rtn"]) == 0
    refused(["generate", tmp_path / "out", "-p", "the", "--max-tokens", "64"], "64", code=2)
    refused(["bench", tmp_path / "out"], "576 tokens, but the model's context has 64", code=2)
    refused(["validate", tmp_path / "out"], "--context: 512 tokens, but the model", code=2)
