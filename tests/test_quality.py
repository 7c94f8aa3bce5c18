"""The benchmark of what quantizing loses: protocol, resuming, draws and tables, on tiny models."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from numpy.typing import NDArray

from benchmarks.quality import __main__ as command
from benchmarks.quality import measure
from benchmarks.quality.calibration import draw
from benchmarks.quality.errors import NotRun
from benchmarks.quality.measure import Bench, total
from benchmarks.quality.models import BundleWeights, Model, open_bundle_model, open_gguf_model
from benchmarks.quality.peers.foreign import CHILDREN, Foreign
from benchmarks.quality.peers.llama_cpp import LlamaCpp
from benchmarks.quality.peers.uq import Uq
from benchmarks.quality.render import BEGIN, END, markdown, splice
from benchmarks.quality.results import (
    DrawResult,
    Figure,
    Results,
    RowResult,
    Sizes,
    TextFacts,
    TextScores,
)
from benchmarks.quality.rows import Row, all_rows, extra_row, llama_row
from benchmarks.quality.scoring import Scorer, summary
from benchmarks.quality.source import export, hf_config, prepare, require_same_weights
from benchmarks.quality.steps import OUT, Cost, Step, kept_cost, run
from benchmarks.quality.texts import EvaluationText, spread, text_files
from uq.errors import UsageError
from uq.formats.bundle import open_bundle
from uq.formats.checkpoint import Checkpoint, open_checkpoint
from uq.formats.checkpoint.hf_config import parse_config
from uq.formats.config import EMBEDDING, FINAL_NORM, layer_tensor
from uq.formats.spec import Spec
from uq.kernels.reference import ReferenceSession
from uq.progress import SilentProgress
from uq.quantize.plan import RECIPES
from uq.quantize.scales import quantize_rtn
from uq.validate.scores import Scores

Tiny = Callable[..., Path]
WINDOWS = np.random.default_rng(3).integers(6, 512, (3, 64)).astype(np.int32)
TEXT = EvaluationText("words", WINDOWS)
COST = Cost(90.0, 2**30, "a machine")
ROUNDED = Row("rounded", "uq", ("--method", "rtn"))
CALIBRATED = Row("calibrated", "uq", ("--method", "gptq"), calibrated=True)


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Tiny) -> Path:
    return tiny_checkpoint(dtype="f16")


@pytest.fixture(scope="module")
def bench(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """uq alone, one text, two draws of 128 tokens."""
    work = tmp_path_factory.mktemp("quality")
    reference = prepare(str(folder), work)
    tokenizer = reference.checkpoint.tokenizer()
    return Bench(
        peers={"uq": Uq(reference, 128)},
        scorer=Scorer(reference.checkpoint, work, SilentProgress()),
        texts=[TEXT],
        draws=[draw(number, tokenizer, 128, work) for number in range(2)],
        work=work,
        machine="here",
        keep=False,
    )


@pytest.fixture(scope="module")
def measured(bench: Bench) -> list[RowResult]:
    return [bench.measure(row) for row in (ROUNDED, CALIBRATED)]


# The protocol


def test_a_bundle_gives_its_dequantized_weights(
    tiny_bundle: Callable[..., Path], folder: Path
) -> None:
    bundle, checkpoint = open_bundle(tiny_bundle(bits=8, dtype="f16")), open_checkpoint(folder)
    weights = BundleWeights(bundle)
    table = bundle.quant(EMBEDDING).dequantize()
    np.testing.assert_array_equal(weights.embedding(3, 9), table[3:9])
    np.testing.assert_array_equal(weights.head(0, 512), table)
    np.testing.assert_array_equal(weights.final_norm(), checkpoint.final_norm())
    for role, weight in checkpoint.layer(1).items():
        limit = np.abs(weight).max() / 127 if weight.ndim == 2 else 0
        np.testing.assert_allclose(weights.layer(1)[role], weight, rtol=0, atol=limit)


def test_a_bundle_with_zero_points_gives_its_dequantized_weights(
    tiny_bundle: Callable[..., Path],
) -> None:
    bundle = open_bundle(tiny_bundle(specs=[Spec(4, 32, zero_point=True)]))
    table = bundle.quant(EMBEDDING).dequantize()
    np.testing.assert_array_equal(BundleWeights(bundle).embedding(3, 9), table[3:9])


def test_sizes_of_a_bundle(tiny_bundle: Callable[..., Path], folder: Path) -> None:
    path = tiny_bundle(layout="row")
    sizes = open_bundle_model(path, open_checkpoint(folder)).sizes
    assert sizes.body_bits == 4.5
    assert (sizes.body, sizes.embedding) == ("int4 g32", "int4 g32")
    assert sizes.nbytes == open_bundle(path).nbytes


def test_sizes_of_a_gguf_file(folder: Path, tmp_path: Path) -> None:
    path = write_gguf(open_checkpoint(folder), tmp_path / "m.gguf", GGMLQuantizationType.Q8_0)
    sizes = open_gguf_model(path).sizes
    tensors = GGUFReader(path).tensors
    assert sizes.bits == 8 * sum(t.n_bytes for t in tensors) / sum(t.n_elements for t in tensors)
    assert sizes.body_bits == 8.5 and sizes.body == sizes.embedding == "Q8_0"
    assert sizes.nbytes == path.stat().st_size


def test_the_reference_loses_nothing(folder: Path, tmp_path: Path) -> None:
    reference = open_checkpoint(folder)
    scorer = Scorer(reference, tmp_path, SilentProgress())
    scores = scorer.score(Model(reference, "itself", Sizes(16, 16, 1, "F16", "F16")), TEXT)
    assert scores.kld.value == pytest.approx(0, abs=1e-9)
    assert scores.same_top_percent == Figure(100, 0)
    assert scores.perplexity_ratio.value == pytest.approx(1, abs=1e-9)
    assert scorer.kept("itself", TEXT) == scores
    assert scorer.kept("another", TEXT) is None


def test_errors_are_those_of_means_over_windows() -> None:
    kld = np.array([1.0, 3.0, 5.0, 7.0, 0.0, 2.0])
    nll = np.log([2.0, 2.0, 4.0, 4.0, 8.0, 8.0])
    scores = Scores(nll, np.zeros(6), kld, np.array([1, 1, 0, 1, 0, 0], bool), np.zeros(6))
    found = summary(scores, windows=3)
    assert found.kld_windows == (2.0, 6.0, 1.0)
    means = np.array(found.kld_windows)
    assert found.kld.value == pytest.approx(3.0)
    assert found.kld.stderr == pytest.approx(means.std(ddof=1) / np.sqrt(3))
    assert found.same_top_percent.value == pytest.approx(50)
    ratio = found.perplexity_ratio
    assert ratio.value == pytest.approx(4.0)
    assert ratio.stderr == pytest.approx(4 * np.log([2, 4, 8]).std(ddof=1) / np.sqrt(3))


def test_windows_are_spread_over_the_text() -> None:
    windows = np.arange(40, dtype=np.int32).reshape(10, 4)
    np.testing.assert_array_equal(spread(windows, 4)[:, 0], [0, 12, 24, 36])
    np.testing.assert_array_equal(spread(windows, 99), windows)


def test_texts_are_the_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "README.md"):
        (tmp_path / name).write_text("x")
    assert list(text_files(tmp_path)) == ["jargon", "a", "b"]


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_an_exported_reference_is_the_model_in_float16(
    family: str, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    source = open_checkpoint(tiny_checkpoint(family=family, dtype="f32", tied=family != "gemma2"))
    export(source, tmp_path)
    written = open_checkpoint(tmp_path)
    assert written.config == source.config == parse_config(hf_config(source.config))
    exact = source.layer(1)["mlp.up_proj"].astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(written.layer(1)["mlp.up_proj"], exact)
    with pytest.raises(NotRun, match="q_proj.weight: the F16 GGUF holds other weights"):
        require_same_weights(source, written)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_transformers_reads_an_exported_reference(
    family: str, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    """The packages that are compared load it with transformers."""
    import torch
    from transformers import AutoModel

    export(open_checkpoint(tiny_checkpoint(family=family, dtype="f16")), tmp_path)
    model = AutoModel.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        theirs = model(torch.from_numpy(WINDOWS).long()).last_hidden_state.numpy()
    ours = ReferenceSession(open_checkpoint(tmp_path)).score(WINDOWS)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


# Draws, and what is kept


def test_rows_are_measured(measured: list[RowResult]) -> None:
    rounded, calibrated = measured
    assert [len(row.draws) for row in measured] == [1, 2]
    first, second = (result.texts["words"].kld.value for result in calibrated.draws)
    assert first != second
    for result in (*rounded.draws, *calibrated.draws):
        assert 0 < result.texts["words"].kld.value < 1
        assert result.cost.seconds > 0 and result.cost.peak_bytes > 2**24
        assert result.sizes.body == "int4 g32"


def test_nothing_is_made_twice(
    bench: Bench, measured: list[RowResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "run", None)
    assert [bench.measure(row, chosen=False) for row in (ROUNDED, CALIBRATED)] == measured


def test_models_are_removed_when_they_are_scored(bench: Bench, measured: list[RowResult]) -> None:
    assert not list(bench.work.glob("steps/*/output"))


def test_another_text_makes_the_model_again(bench: Bench, measured: list[RowResult]) -> None:
    more = replace(bench, texts=[TEXT, EvaluationText("others", WINDOWS[:2])])
    result = more.measure(ROUNDED)
    assert list(result.draws[0].texts) == ["words", "others"]
    assert result.draws[0].texts["words"] == measured[0].draws[0].texts["words"]


def test_rows_that_are_not_chosen_show_what_is_kept(
    bench: Bench, measured: list[RowResult]
) -> None:
    more = replace(bench, texts=[TEXT, EvaluationText("new", WINDOWS[1:])])
    (found,), (expected,) = more.measure(ROUNDED, chosen=False).draws, measured[0].draws
    assert (found.texts, found.sizes) == (expected.texts, expected.sizes)


def test_rows_that_are_not_chosen_are_named(bench: Bench) -> None:
    row = replace(ROUNDED, arguments=("--method", "rtn", "--group", "64"))
    assert bench.measure(row, chosen=False).not_run == "not chosen (--only)"


def test_a_draw_is_what_uq_calibrates_on(bench: Bench) -> None:
    assert [d.seed for d in bench.draws] == [None, 1]
    tokens = [np.load(d.tokens) for d in bench.draws]
    assert tokens[0].shape == (1, 128) and (tokens[0] != tokens[1]).any()
    assert bench.draws[0].text.read_text("utf-8").strip()


# Steps


def step(code: str, **identity: object) -> Step:
    return Step("a step", (sys.executable, "-S", "-c", code, OUT), identity)


WRITE = "import sys; open(sys.argv[1], 'w').write('x'); b = bytearray(64 << 20); print(len(b))"


def test_a_step_runs_once(tmp_path: Path) -> None:
    output = run(step(WRITE, a=1), tmp_path, "here")
    written = output.stat().st_mtime_ns
    cost = kept_cost(step(WRITE, a=1), tmp_path)
    assert cost is not None and 2**26 < cost.peak_bytes < 2**28 and cost.machine == "here"
    assert run(step(WRITE, a=1), tmp_path, "there").stat().st_mtime_ns == written
    assert run(step(WRITE, a=2), tmp_path, "here") != output


def test_a_step_that_fails_leaves_nothing(tmp_path: Path) -> None:
    code = "import sys; open(sys.argv[1], 'w'); sys.exit('the disk is on fire')"
    failing = step(code)
    with pytest.raises(NotRun, match=r"failed \(1\): the disk is on fire"):
        run(failing, tmp_path, "here")
    assert not failing.output(tmp_path).exists() and kept_cost(failing, tmp_path) is None


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotRun, match=r"failed \(127\): no/such/tool: No such file"):
        run(Step("s", ("no/such/tool",), {}), tmp_path, "here")


def test_costs_of_steps_add_up() -> None:
    assert total([COST, Cost(30.0, 5, "a machine")]) == Cost(120.0, 2**30, "a machine")


# llama.cpp, played by scripts

TOOLS = {
    "llama-quantize": "shutil.copy(sys.argv[-3], sys.argv[-2])",
    "llama-imatrix": "shutil.copy(sys.argv[sys.argv.index('-f') + 1], sys.argv[-4])",
}


@pytest.fixture
def llama(tmp_path: Path, folder: Path) -> LlamaCpp:
    """Tools that copy their input, beside a GGUF file of the tiny model."""
    for name, code in TOOLS.items():
        tool = tmp_path / name
        tool.write_text(f"#!{sys.executable} -S\nimport shutil, sys\n{code}\n")
        tool.chmod(0o755)
    path = write_gguf(open_checkpoint(folder), tmp_path / "tiny.gguf")
    return LlamaCpp(prepare(str(path), tmp_path), tmp_path, tmp_path, "here")


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


def test_llama_cpp_quantizes_with_a_matrix_of_the_draw(llama: LlamaCpp, bench: Bench) -> None:
    matrix, quantize = llama.steps(llama_row("Q4_0", True), bench.draws[1])
    assert run(matrix, llama.work, "here").read_text() == bench.draws[1].text.read_text()
    assert quantize.command[1:] == (
        "--imatrix", str(matrix.output(llama.work)), str(llama.f16), OUT, "Q4_0",
    )  # fmt: skip
    model = llama.open(run(quantize, llama.work, "here"))
    assert model.sizes.body_bits == 16 and model.sizes.body == "F16"
    (plain,) = llama.steps(llama_row("Q4_0", False), bench.draws[1])
    assert plain.command[1:] == (str(llama.f16), OUT, "Q4_0") and plain.key != quantize.key


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


def test_llama_cpp_needs_its_folder_and_a_gguf_file(llama: LlamaCpp, bench: Bench) -> None:
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
def foreign(bench: Bench, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Foreign:
    """A "quantizer" that multiplies the linears by its argument."""
    monkeypatch.setenv("PYTHONPATH", str(CHILDREN))
    (tmp_path / "child.py").write_text(CHILD)
    reference = prepare(str(folder), tmp_path)
    return Foreign("numpy", str(tmp_path / "child.py"), reference, sys.executable)


def test_linears_of_a_package_replace_the_references(
    foreign: Foreign, bench: Bench, folder: Path
) -> None:
    row = Row("larger", "numpy", ("1.125",), calibrated=True)
    assert foreign.missing(row) is None
    (only,) = foreign.steps(row, bench.draws[0])
    model, reference = foreign.open(run(only, bench.work, "here")), open_checkpoint(folder)
    for role, weight in reference.layer(1).items():
        factor = np.float32(1.125 if weight.ndim == 2 else 1)
        expected = (factor * weight).astype(np.float16 if weight.ndim == 2 else np.float32)
        np.testing.assert_array_equal(model.weights.layer(1)[role], expected)
    table = quantize_rtn(reference.embedding(0, 512), Spec(8, 64)).dequantize()
    np.testing.assert_array_equal(model.weights.embedding(5, 70), table[5:70])
    np.testing.assert_array_equal(model.weights.head(5, 70), table[5:70])


def test_wrong_weights_are_not_scored(foreign: Foreign, bench: Bench) -> None:
    (only,) = foreign.steps(Row("double", "numpy", ("2",), calibrated=True), bench.draws[0])
    with pytest.raises(NotRun, match="q_proj of layer 0 is 100% off the reference"):
        foreign.open(run(only, bench.work, "here"))


def test_sizes_of_a_package_count_the_embedding_both_ways(
    foreign: Foreign, bench: Bench, folder: Path
) -> None:
    (only,) = foreign.steps(Row("r", "numpy", ("1",), calibrated=True), bench.draws[0])
    sizes = foreign.open(run(only, bench.work, "here")).sizes
    config = open_checkpoint(folder).config
    linears = config.num_layers * sum(a * b for a, b in config.linear_shapes().values())
    table = config.vocab_size * config.hidden_size
    norms = config.num_parameters() - linears - table
    total_bits = 4.5 * linears + 8.25 * table + 32 * norms
    assert sizes.bits == pytest.approx(total_bits / config.num_parameters())
    assert sizes.computed and sizes.nbytes == round(total_bits / 8)
    own = (total_bits + (16 - 8.25) * table) / config.num_parameters()
    assert f"{own:.3f} bits over all" in sizes.embedding


def test_a_missing_package_is_the_reason(foreign: Foreign) -> None:
    reason = replace(foreign, package="no-such-package").missing(ROUNDED)
    assert reason is not None and "pip install no-such-package" in reason
    assert replace(foreign, python="no/such/python").missing(ROUNDED) is not None


# Rows and tables


def test_every_recipe_is_a_row(folder: Path) -> None:
    config = open_checkpoint(folder).config
    names = [row.name for row in all_rows(config, ["g64=--group 64"])]
    assert {f"uq {name}" for name in RECIPES} | {"uq rtn", "g64"} <= set(names)


def test_arguments_say_whether_a_row_is_calibrated(folder: Path) -> None:
    config = open_checkpoint(folder).config
    assert extra_row("g64=--group 64", config).calibrated
    assert not extra_row("fast=--group 64 --method rtn", config).calibrated


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["--group 64"], "expected NAME=ARGUMENTS"),
        (["a=--group 65"], "row 'a'"),
        (["uq rtn=--group 64"], "already a row 'uq rtn'"),
    ],
)
def test_rows_that_cannot_be_are_refused(rows: list[str], message: str, folder: Path) -> None:
    with pytest.raises(UsageError, match=message):
        all_rows(open_checkpoint(folder).config, rows)


def scores(kld: float) -> TextScores:
    return TextScores(Figure(kld, 0.01), 1.5, Figure(80, 1), Figure(1.25, 0.02), (kld,))


def results(*rows: RowResult) -> Results:
    texts = (TextFacts("words", 3, 93, "ab"),)
    return Results(1, "0.1.0", "2026-01-01", "a machine", "m", "cd", 64, 128, 2, texts, rows)


SIZES = Sizes(6.5, 4.5, 2_000_000, "INT8 g64", "INT4 g32")
DRAWS = tuple(DrawResult(n, SIZES, COST, {"words": scores(0.2 + 0.1 * n)}) for n in range(2))
ROWS = (
    RowResult("one", "uq", (), False, DRAWS[:1]),
    RowResult("two", "uq", (), True, DRAWS),
    RowResult("other", "uq", (), False, (DrawResult(0, SIZES, COST, {}),)),
    RowResult("none", "llama.cpp", (), False, (), "no tools"),
)


@pytest.mark.parametrize(
    "line",
    [
        "| row | bits, linears | bits, all | MB | KL words |",
        "| one | 4.500 | 6.500 | 2.0 | 0.2000 ± 0.0100 |",
        "| two | 4.500 | 6.500 | 2.0 | 0.2500 ± 0.0100 (0.2000 to 0.3000) |",
        "| one | 0.2000 ± 0.0100 | 1.500 | 80.00 | 1.2500 ± 0.0200 |",
        "| one | 1.50 | 1024 | INT4 g32 | INT8 g64 | a machine |",
        "| other | 4.500 | 6.500 | 2.0 | not run |",
        "- none: no tools",
    ],
)
def test_tables(line: str) -> None:
    assert line in markdown(results(*ROWS)).splitlines()


def test_tables_replace_what_is_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for content in ("new\n", "newer\n"):
        splice(page, content)
        assert page.read_text() == f"before\n{BEGIN}\n{content}{END}\nafter\n"


def test_a_page_without_markers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(BEGIN)
    with pytest.raises(UsageError, match="has no lines"):
        splice(tmp_path / "page.md", "x")


def test_the_command_writes_json_and_tables(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = " ".join(["the time of the world was two years"] * 120)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "words.txt").write_text(words)
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    options: dict[str, Any] = {
        "--model": folder, "--texts": tmp_path / "texts", "--text": "words", "--windows": 1,
        "--draws": 1, "--only": "^uq rtn$", "--work": tmp_path / "work", "--doc": page,
    }  # fmt: skip
    assert command.main([str(word) for pair in options.items() for word in pair]) == 0
    found = json.loads((tmp_path / "work" / "quality.json").read_text())
    by_name = {row["name"]: row for row in found["rows"]}
    assert by_name["uq rtn"]["draws"][0]["texts"]["words"]["kld"]["value"] > 0
    assert by_name["uq int4"]["not_run"] == "not chosen (--only)"
    assert "GGUF" in by_name["llama.cpp Q4_0"]["not_run"]
    assert "| uq rtn |" in page.read_text() and "| uq rtn |" in capsys.readouterr().out


def test_a_wrong_row_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(folder), "--work", str(tmp_path), "--row", "nameless"]
    assert command.main(options) == 2
    assert capsys.readouterr().err.count("\n") == 1
