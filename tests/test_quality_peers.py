"""The quantizers that uq is compared with: commands, results, and reasons for their absence."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from numpy.typing import NDArray

from benchmarks.quality.calibration import Draw, draw
from benchmarks.quality.errors import NotRun
from benchmarks.quality.models import open_gguf_model
from benchmarks.quality.peers.foreign import CHILDREN, Foreign
from benchmarks.quality.peers.llama_cpp import LlamaCpp
from benchmarks.quality.rows import Row, llama_row
from benchmarks.quality.source import prepare, require_same_weights
from benchmarks.quality.steps import OUT, run
from uq.formats.checkpoint import Checkpoint, open_checkpoint
from uq.formats.config import EMBEDDING, FINAL_NORM, layer_tensor
from uq.formats.spec import Spec
from uq.quantize.scales import quantize_rtn

Tiny = Callable[..., Path]
ROW = Row("row", "peer", (), calibrated=True)


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Tiny) -> Path:
    return tiny_checkpoint(dtype="f16")


@pytest.fixture
def drawn(folder: Path, tmp_path: Path) -> Draw:
    return draw(1, open_checkpoint(folder).tokenizer(), 128, tmp_path)


# llama.cpp, played by scripts

TOOLS = {
    "llama-quantize": "shutil.copy(sys.argv[-4], sys.argv[-3])",
    "llama-imatrix": "shutil.copy(*(sys.argv[sys.argv.index(word) + 1] for word in ('-f', '-o')))",
}


@pytest.fixture
def llama(tmp_path: Path, folder: Path) -> LlamaCpp:
    """Tools that copy their input, beside a GGUF file of the tiny model."""
    for name, code in TOOLS.items():
        tool = tmp_path / name
        tool.write_text(f"#!{sys.executable} -S\nimport shutil, sys\n{code}\n")
        tool.chmod(0o755)
    path = write_gguf(open_checkpoint(folder), tmp_path / "tiny.gguf")
    return LlamaCpp(prepare(str(path), tmp_path), tmp_path, tmp_path, "here", 2)


def write_gguf(
    checkpoint: Checkpoint, path: Path, kind: GGMLQuantizationType = GGMLQuantizationType.F16
) -> Path:
    """The model with matrices of one kind and a vocabulary of bytes."""
    config = checkpoint.config
    writer = GGUFWriter(path, "gemma3")
    writer.add_context_length(1024)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [f"<unused{n}>" for n in range(config.vocab_size - len(pieces))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * len(pieces))
    writer.add_token_types([3, 3, 3, 2, *([6] * 256), *([1] * (len(pieces) - 260))])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_layers)
    for name, weight in tensors_of(checkpoint):
        matrix = weight.ndim == 2
        data = gguf.quants.quantize(weight, kind) if matrix else weight
        stored = f"{names.get_name(name.removesuffix('.weight'))}.weight"
        writer.add_tensor(stored, data, raw_dtype=kind if matrix else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors_of(checkpoint: Checkpoint) -> Iterator[tuple[str, NDArray[np.float32]]]:
    yield EMBEDDING, checkpoint.embedding(0, checkpoint.config.vocab_size)
    yield FINAL_NORM, checkpoint.final_norm()
    for layer in range(checkpoint.config.num_layers):
        for role, weight in checkpoint.layer(layer).items():
            yield layer_tensor(layer, role), weight


def test_llama_cpp_quantizes_with_a_matrix_of_the_draw(llama: LlamaCpp, drawn: Draw) -> None:
    matrix, quantize = llama.steps(llama_row("Q4_0", True), drawn)
    assert run(matrix, llama.work, "here").read_text() == drawn.text.read_text()
    assert quantize.command[1:] == (
        "--imatrix", str(matrix.output(llama.work)), str(llama.f16), OUT, "Q4_0", "2",
    )  # fmt: skip
    model = llama.open(run(quantize, llama.work, "here"))
    assert model.sizes.body_bits == 16 and model.sizes.body == "F16"
    (plain,) = llama.steps(llama_row("Q4_0", False), drawn)
    assert plain.command[1:] == (str(llama.f16), OUT, "Q4_0", "2") and plain.key != quantize.key


def test_a_reference_from_a_gguf_file_is_that_file(llama: LlamaCpp, folder: Path) -> None:
    assert llama.reference.gguf == llama.tools / "tiny.gguf" if llama.tools else False
    require_same_weights(llama.reference.checkpoint, open_checkpoint(folder))


@pytest.mark.parametrize(
    ("absent", "row", "reason"),
    [
        ("llama-imatrix", llama_row("Q4_0", True), "has no llama-imatrix"),
        ("llama-quantize", llama_row("Q4_0", False), "has no llama-quantize"),
    ],
)
def test_a_missing_tool_is_the_reason(
    absent: str, row: Row, reason: str, llama: LlamaCpp, tmp_path: Path
) -> None:
    assert llama.missing(row) is None
    (tmp_path / absent).unlink()
    assert str(llama.missing(row)).endswith(reason)


def test_llama_cpp_needs_its_folder_and_a_gguf_file(llama: LlamaCpp) -> None:
    row = llama_row("Q4_0", False)
    assert "--llama-bin" in str(replace(llama, tools=None).missing(row))
    folder_alone = replace(llama, reference=replace(llama.reference, gguf=None))
    assert "starts from a GGUF file" in str(folder_alone.missing(row))


# Other packages, played by numpy

CHILD = """
import sys
from pathlib import Path
import numpy as np
from shared import reference_linears, write
reference, out, tokens, scale = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
assert np.load(tokens).shape == (1, 128)
write(out, {n: w * float(scale) for n, w in reference_linears(reference)}, 4.5, "INT4 g32")
"""


@pytest.fixture
def foreign(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Foreign:
    """A "quantizer" that multiplies the linears by its argument."""
    monkeypatch.setenv("PYTHONPATH", str(CHILDREN))
    (tmp_path / "child.py").write_text(CHILD)
    reference = prepare(str(folder), tmp_path)
    return Foreign("numpy", str(tmp_path / "child.py"), reference, sys.executable)


def test_linears_of_a_package_replace_the_references(
    foreign: Foreign, drawn: Draw, folder: Path, tmp_path: Path
) -> None:
    row = Row("larger", "numpy", ("1.125",), calibrated=True)
    assert foreign.missing(row) is None
    (only,) = foreign.steps(row, drawn)
    model, reference = foreign.open(run(only, tmp_path, "here")), open_checkpoint(folder)
    for role, weight in reference.layer(1).items():
        factor = np.float32(1.125 if weight.ndim == 2 else 1)
        expected = (factor * weight).astype(np.float16 if weight.ndim == 2 else np.float32)
        np.testing.assert_array_equal(model.weights.layer(1)[role], expected)
    table = quantize_rtn(reference.embedding(0, 512), Spec(8, 64)).dequantize()
    np.testing.assert_array_equal(model.weights.embedding(5, 70), table[5:70])
    np.testing.assert_array_equal(model.weights.head(5, 70), table[5:70])


def test_wrong_weights_are_not_scored(foreign: Foreign, drawn: Draw, tmp_path: Path) -> None:
    (only,) = foreign.steps(Row("double", "numpy", ("2",), calibrated=True), drawn)
    with pytest.raises(NotRun, match="q_proj of layer 0 is 100% off the reference"):
        foreign.open(run(only, tmp_path, "here"))


def test_sizes_of_a_package_count_the_embedding_both_ways(
    foreign: Foreign, drawn: Draw, folder: Path, tmp_path: Path
) -> None:
    (only,) = foreign.steps(Row("r", "numpy", ("1",), calibrated=True), drawn)
    sizes = foreign.open(run(only, tmp_path, "here")).sizes
    config = open_checkpoint(folder).config
    linears = config.num_layers * sum(a * b for a, b in config.linear_shapes(0).values())
    table = config.vocab_size * config.hidden_size
    norms = config.num_parameters() - linears - table
    total_bits = 4.5 * linears + 8.25 * table + 32 * norms
    assert sizes.bits == pytest.approx(total_bits / config.num_parameters())
    assert sizes.computed and sizes.nbytes == round(total_bits / 8)
    own = (total_bits + (16 - 8.25) * table) / config.num_parameters()
    assert f"{own:.3f} bits over all" in sizes.embedding


def test_a_missing_package_is_the_reason(foreign: Foreign) -> None:
    reason = replace(foreign, package="no-such-package").missing(ROW)
    assert reason is not None and "pip install no-such-package" in reason
    assert replace(foreign, python="no/such/python").missing(ROW) is not None


def test_sizes_of_a_gguf_file(folder: Path, tmp_path: Path) -> None:
    path = write_gguf(open_checkpoint(folder), tmp_path / "m.gguf", GGMLQuantizationType.Q8_0)
    sizes = open_gguf_model(path).sizes
    tensors = GGUFReader(path).tensors
    assert sizes.bits == 8 * sum(t.n_bytes for t in tensors) / sum(t.n_elements for t in tensors)
    assert sizes.body_bits == 8.5 and sizes.body == sizes.embedding == "Q8_0"
    assert sizes.nbytes == path.stat().st_size
