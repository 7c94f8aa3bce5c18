"""The benchmark of what quantizing loses: protocol, resuming and draws, on tiny models."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality import measure
from benchmarks.quality.calibration import draw
from benchmarks.quality.errors import NotRun
from benchmarks.quality.measure import Bench, total
from benchmarks.quality.models import Model, open_bundle_model
from benchmarks.quality.peers.uq import Uq
from benchmarks.quality.results import (
    Figure,
    RowResult,
    Sizes,
)
from benchmarks.quality.rows import Row
from benchmarks.quality.scoring import Scorer, summary
from benchmarks.quality.source import export, hf_config, prepare, require_same_weights
from benchmarks.quality.steps import OUT, Cost, Step, kept_cost, run
from benchmarks.quality.texts import EvaluationText, spread, text_files
from benchmarks.quality.torch_scoring import TorchModel, check_device
from uq.errors import ToolMissing
from uq.formats.bundle import open_bundle
from uq.formats.checkpoint import open_checkpoint
from uq.formats.checkpoint.hf_config import parse_config
from uq.formats.config import EMBEDDING
from uq.formats.spec import Spec
from uq.kernels.numerics import ACTIVATIONS, FLOAT, Numerics
from uq.kernels.reference import ReferenceSession
from uq.kernels.weights import BundleWeights
from uq.progress import SilentProgress
from uq.validate.scores import Scores

Tiny = Callable[..., Path]
WINDOWS = np.random.default_rng(3).integers(6, 512, (3, 64)).astype(np.int32)
TEXT = EvaluationText("words", WINDOWS)
ROUNDED = Row("rounded", "uq", ("--method", "rtn"))
INTEGERS = Numerics(ACTIVATIONS["int8"])
CALIBRATED = Row("calibrated", "uq", ("--group", "32"), calibrated=True)


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


def test_the_reference_loses_nothing(folder: Path, tmp_path: Path) -> None:
    reference = open_checkpoint(folder)
    scorer = Scorer(reference, tmp_path, SilentProgress())
    scores = scorer.score(Model(reference, "itself", Sizes(16, 16, 1, "F16", "F16")), FLOAT, TEXT)
    assert scores.kld.value == pytest.approx(0, abs=1e-9)
    assert scores.same_top_percent == Figure(100, 0)
    assert scores.perplexity_ratio.value == pytest.approx(1, abs=1e-9)
    assert scorer.kept("itself", FLOAT, TEXT) == scores
    assert scorer.kept("another", FLOAT, TEXT) is None
    assert scorer.kept("itself", INTEGERS, TEXT) is None


def test_torch_finds_the_same_scores(
    tiny_bundle: Callable[..., Path], folder: Path, tmp_path: Path
) -> None:
    reference = open_checkpoint(folder)
    model = open_bundle_model(tiny_bundle(dtype="f16"), reference)
    expected, found = (
        Scorer(reference, tmp_path, SilentProgress(), torch).score(model, FLOAT, TEXT)
        for torch in (None, TorchModel(folder, reference, "cpu"))
    )
    assert found.kld.value == pytest.approx(expected.kld.value, rel=1e-5)
    assert found.kld_p99_9 == pytest.approx(expected.kld_p99_9, rel=3e-5)  # of one token
    assert found.perplexity_ratio.value == pytest.approx(expected.perplexity_ratio.value, rel=1e-6)
    assert found.same_top_percent == expected.same_top_percent
    assert found.kld_windows == pytest.approx(expected.kld_windows, rel=1e-5)


def test_a_device_that_torch_does_not_know_is_refused() -> None:
    with pytest.raises(ToolMissing, match="--score-device nonsense: torch cannot use it"):
        check_device("nonsense")


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
        assert result.sizes.body.startswith("int")


def test_nothing_is_made_twice(
    bench: Bench, measured: list[RowResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "run", None)
    assert [bench.measure(row, chosen=False) for row in (ROUNDED, CALIBRATED)] == measured


def test_models_are_removed_when_they_are_scored(bench: Bench, measured: list[RowResult]) -> None:
    assert not list(bench.work.glob("steps/*/output"))


def test_a_run_leaves_the_models_of_the_run_beside_it(bench: Bench) -> None:
    row = replace(ROUNDED, arguments=("--method", "rtn", "--group", "128"))
    replace(bench, keep=True).measure(row)
    bench.measure(row, chosen=False)
    (model,) = bench.work.glob("steps/*/output")
    bench.measure(row)
    assert not model.exists()


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


def test_integers_run_the_same_model_made_once(bench: Bench, folder: Path) -> None:
    group = ("--method", "rtn", "--group", "32")
    base = replace(ROUNDED, arguments=group, shared=True)
    other = replace(base, name="in integers", numerics=INTEGERS, model="rounded", shared=False)
    (made,), (found,) = bench.measure(base).draws, bench.measure(other).draws
    assert (found.cost, found.sizes) == (made.cost, made.sizes)
    assert found.texts["words"] != made.texts["words"]
    assert not list(bench.work.glob("steps/*/output"))


def test_a_draw_is_what_uq_calibrates_on(bench: Bench) -> None:
    assert [d.seed for d in bench.draws] == [None, 1]
    tokens = [np.load(d.tokens) for d in bench.draws]
    assert tokens[0].shape == (1, 128) and (tokens[0] != tokens[1]).any()
    assert bench.draws[0].text.read_text("utf-8").strip()


def test_a_draw_is_not_written_while_it_may_be_read(bench: Bench) -> None:
    (first, *_) = bench.draws
    before = first.tokens.stat().st_mtime_ns
    tokenizer = bench.scorer.reference.tokenizer()
    assert draw(0, tokenizer, first.count, bench.work) == first
    assert first.tokens.stat().st_mtime_ns == before
    assert not list(bench.work.glob("calibration/*.partial"))


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
    parts = [Cost(90.0, 2**30, "a machine"), Cost(30.0, 5, "a machine")]
    assert total(parts) == Cost(120.0, 2**30, "a machine")
