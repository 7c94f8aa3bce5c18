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
from benchmarks.quality.engine import coded, read_scores, write_truth
from benchmarks.quality.errors import NotRun
from benchmarks.quality.models import open_gguf_model
from benchmarks.quality.peers.foreign import CHILDREN, Foreign
from benchmarks.quality.peers.llama_cpp import LlamaCpp
from benchmarks.quality.rows import Row, engine_row, llama_row
from benchmarks.quality.scoring import Scorer
from benchmarks.quality.source import prepare, require_same_weights
from benchmarks.quality.steps import OUT, run
from benchmarks.quality.texts import EvaluationText
from uq.formats.checkpoint import Checkpoint, open_checkpoint
from uq.formats.config import EMBEDDING, FINAL_NORM, layer_tensor
from uq.formats.spec import Spec
from uq.kernels.numerics import FLOAT
from uq.progress import SilentProgress
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
    "llama-perplexity": "print('no figures')",
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
        ("llama-perplexity", engine_row("Q8_0"), "has no llama-perplexity"),
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


# Models that llama.cpp runs itself

LOGITS = np.random.default_rng(5).normal(0, 4, (3, 7)).astype(np.float32)
OUTPUT = """
chunk PPL ln(PPL(Q)/PPL(base)) KL Divergence Δp RMS Same top p
   1   54.3014 ± 13.9873    0.00150 ± 0.00380  0.00238 ± 0.00017  0.859 ± 0.083 %  98.039 ± 0.870 %
   2   42.1071 ±  7.5013    0.00480 ± 0.00330  0.00269 ± 0.00014  1.041 ± 0.080 %  97.059 ± 0.749 %

====== Perplexity statistics ======
Mean PPL(Q)                   :  42.107073 ±   7.501279
Mean PPL(base)                :  41.905702 ±   7.466015
Mean PPL(Q)/PPL(base)         :   1.004806 ±   0.003311

====== KL divergence statistics ======
Mean    KLD:   0.002686 ±   0.000139
Maximum KLD:   0.012690
99.9%   KLD:   0.011770

====== Token probability statistics ======
Same top p: 97.059 ± 0.749 %
"""


def test_the_reference_is_coded_in_16_bits() -> None:
    logits = LOGITS.copy()
    logits[1, 2] -= 40  # further away than the codes reach
    rows = coded(logits)
    scale, least = rows[:, :4].copy().view("<f4").T[:, :, None]
    exact = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    found = least + scale * rows[:, 4:11]
    assert rows.shape == (3, 12) and rows[1, 6] == 0
    far = np.zeros(logits.shape, bool)
    far[1, 2] = True
    np.testing.assert_allclose(found[~far], exact[~far], rtol=0, atol=0.52 * scale.max())
    assert found[1, 2] == pytest.approx(exact[1].max() - 16, abs=1e-4)


def test_the_file_begins_with_the_tokens(tmp_path: Path) -> None:
    windows = np.arange(16, dtype=np.int32).reshape(2, 8)
    with (tmp_path / "truth").open("wb") as file:
        write_truth(file, windows, [LOGITS, LOGITS])
    data = (tmp_path / "truth").read_bytes()
    assert data[:8] == b"_logits_"
    np.testing.assert_array_equal(np.frombuffer(data, "<i4", 19, 8), [8, 7, 2, *range(16)])
    assert data[84:] == 2 * coded(LOGITS).tobytes()


def test_figures_of_the_engine_are_read() -> None:
    found = read_scores(OUTPUT, 2)
    assert found.kld.value == 0.002686 and found.kld_p99_9 == 0.01177
    assert found.kld_windows == pytest.approx((0.00238, 0.00300))
    assert found.same_top_percent.value == 97.059
    assert found.same_top_percent.stderr == pytest.approx(0.98)
    assert found.perplexity_ratio.value == 1.004806
    for output in (OUTPUT.replace("Mean    KLD", "Mean"), OUTPUT.replace("   2 ", "two ")):
        with pytest.raises(NotRun, match="llama-perplexity: "):
            read_scores(output, 2)


def test_the_engine_runs_a_model_on_the_references_words(
    llama: LlamaCpp, drawn: Draw, tmp_path: Path
) -> None:
    tool = tmp_path / "llama-perplexity"
    (tmp_path / "said").write_text(OUTPUT)
    tool.write_text(f"#!/bin/sh\necho \"$@\" > '{tmp_path}/asked'\ncat '{tmp_path}/said'\n")
    tool.chmod(0o755)
    assert llama.missing(engine_row("Q8_0")) is None and llama.engine is not None
    model = llama.open(run(llama.steps(engine_row("Q8_0"), drawn)[-1], llama.work, "here"))
    text = EvaluationText("words", np.arange(6, 134).reshape(2, 64).astype(np.int32))
    scorer = Scorer(llama.reference.checkpoint, tmp_path, SilentProgress())
    scores = scorer.score(model, llama.engine, text)
    assert scores.kld.value == 0.002686 and scorer.kept(model.content, FLOAT, text) is None
    assert scorer.kept(model.content, llama.engine, text) == scores
    assert (tmp_path / "asked").read_text().startswith(f"--kl-divergence -m {model.gguf} ")
    assert not list((tmp_path / "truth").iterdir())
    tool.write_text("#!/bin/sh\necho no such model >&2\nexit 3\n")
    with pytest.raises(NotRun, match=r"failed \(3\): no such model"):
        scorer.score(model, replace(llama.engine), text)
