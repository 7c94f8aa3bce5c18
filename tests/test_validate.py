from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from uq.errors import CheckpointError, DeviceError, UsageError
from uq.formats.bundle import Bundle, open_bundle
from uq.formats.checkpoint import Checkpoint, open_checkpoint
from uq.formats.manifest import Manifest, Provenance, SourceFile
from uq.quantize.pipeline import QuantizeOptions, quantize
from uq.validate.assembly import fallbacks, survival, thresholds
from uq.validate.files import load_report, save_report
from uq.validate.origin import find_reference
from uq.validate.report import LayerError, Report
from uq.validate.validate import ValidateOptions, validate
from uq.validate.weights import kind_of, kind_sizes, weight_errors

WORDS = "the city of that time was their first and after years people with two other worlds "
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Callable[..., Path]) -> Bundle:
    return open_bundle(tiny_bundle())


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Checkpoint:
    """The weights that `bundle` was rounded from, in another folder."""
    return open_checkpoint(tiny_checkpoint())


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> ValidateOptions:
    text = tmp_path_factory.mktemp("text") / "words.txt"
    text.write_text(WORDS * 8)
    return ValidateOptions(
        device="cpu",
        threads=1,
        text=text,
        context=32,
        max_chunks=4,
        prompt=16,
        generate=4,
        repeats=2,
        max_kld=100.0,
        max_ppl_ratio=1e-3,
        command=("uq", "validate", "my bundle"),
    )


@pytest.fixture(scope="module")
def report(bundle: Bundle, checkpoint: Checkpoint, options: ValidateOptions) -> Report:
    return validate(bundle, checkpoint, options)


def test_the_report_names_what_was_measured(report: Report, bundle: Bundle) -> None:
    assert report.bundle.sha256 == bundle.sha256
    assert report.bundle.bytes == bundle.nbytes
    assert report.device.backend == "cpu"
    assert (report.text.name, report.text.chunks, report.text.context) == ("words.txt", 4, 32)
    assert report.text.tokens_scored == 4 * 15  # positions 16 to 30 have a scored next token
    assert report.environment.command == "uq validate 'my bundle'"


def test_the_reference_runs_on_a_gpu(
    report: Report, bundle: Bundle, checkpoint: Checkpoint, options: ValidateOptions, tmp_path: Path
) -> None:
    """bfloat16 weights, float16 keys and values: near the CPU's float32, but not the same."""
    states = tmp_path / "states.npz"
    on_gpu = replace(options, reference_device="vulkan", speed=False, states=states)
    found = validate(bundle, checkpoint, on_gpu)
    assert found.reference_device is not None and found.reference_device.backend == "vulkan"
    expected = report.reference_perplexity.value
    assert found.reference_perplexity.value == pytest.approx(expected, rel=1e-3)
    assert found.kld.mean == pytest.approx(report.kld.mean, rel=2e-2)
    written = states.read_bytes()
    validate(bundle, checkpoint, replace(on_gpu, reference_device="cpu"))
    assert states.read_bytes() != written  # those of a GPU are no others


def test_a_reference_that_the_npu_cannot_run(
    bundle: Bundle, checkpoint: Checkpoint, options: ValidateOptions
) -> None:
    with pytest.raises(DeviceError, match="--reference-device npu: it has no floating point"):
        validate(bundle, checkpoint, replace(options, reference_device="npu"))


def test_perplexities_of_the_chunks_make_up_the_whole(report: Report) -> None:
    means = np.log(report.series.perplexity), np.log(report.series.reference_perplexity)
    assert np.exp(means[0].mean()) == pytest.approx(report.perplexity.value, rel=1e-12)
    assert np.exp(means[1].mean()) == pytest.approx(report.reference_perplexity.value, rel=1e-12)
    ratio = report.perplexity.value / report.reference_perplexity.value
    assert report.perplexity_ratio.value == pytest.approx(ratio, rel=1e-12)


def test_four_bits_cost_something(report: Report) -> None:
    assert 1e-4 < report.kld.mean < 1
    assert 50 < report.same_top_percent <= 100


def test_the_reference_perplexity_is_that_of_transformers(
    report: Report, checkpoint: Checkpoint, options: ValidateOptions
) -> None:
    folder = Path(checkpoint.source.id)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    tokens = torch.tensor(tokenizer.encode(WORDS * 8)[: 4 * 32]).reshape(4, 32)
    tokens[:, 0] = tokenizer.convert_tokens_to_ids("<bos>")
    with torch.no_grad():
        logits = model(tokens).logits[:, 16:31].double()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 17:].flatten())
    assert report.reference_perplexity.value == pytest.approx(losses.exp().item(), rel=1e-4)


def test_speeds_of_both_are_there_with_one_bandwidth(report: Report) -> None:
    assert report.speed is not None and report.reference_speed is not None
    assert report.speed.bandwidth_gb_s == report.reference_speed.bandwidth_gb_s > 0
    assert (report.speed.context, report.speed.generated, report.speed.repeats) == (16, 4, 2)
    assert report.speed.bytes_per_token < report.reference_speed.bytes_per_token


def test_memory_grows_with_the_reference(report: Report) -> None:
    assert 0 < report.memory.bundle_peak_bytes <= report.memory.peak_bytes


def test_limits_are_judged(report: Report) -> None:
    assert [(limit.name, limit.passed) for limit in report.thresholds] == [
        ("max_kld", True),
        ("max_ppl_ratio", False),
    ]


def test_a_saved_report_leaves_the_bundle_valid(report: Report, bundle: Bundle) -> None:
    save_report(report, bundle.path)
    assert open_bundle(bundle.path, verify="full").sha256 == bundle.sha256
    assert load_report(bundle.path) == report


def test_speeds_can_be_left_out(
    bundle: Bundle, checkpoint: Checkpoint, options: ValidateOptions
) -> None:
    report = validate(bundle, checkpoint, replace(options, speed=False, max_chunks=1))
    assert report.speed is None and report.reference_speed is None


def test_losses_are_told_apart(
    bundle: Bundle, checkpoint: Checkpoint, options: ValidateOptions, report: Report
) -> None:
    assert report.losses == ()
    told = replace(options, speed=False, activations="int8", kv="int4")
    weights, activations, kv = validate(bundle, checkpoint, told).losses
    assert (weights.name, activations.name) == ("weights", "+ INT8 activations")
    assert kv.name == "+ INT4 KV cache"
    assert weights.kld.value == pytest.approx(report.kld.mean, rel=1e-2)  # the CPU's own run
    assert weights.perplexity_ratio.value == pytest.approx(report.perplexity_ratio.value, rel=1e-3)
    assert weights.kld.value != activations.kld.value != kv.kld.value


def test_numerics_that_do_not_fit_are_refused_before_the_work(
    tiny_bundle: Callable[..., Path], checkpoint: Checkpoint, options: ValidateOptions
) -> None:
    odd = open_bundle(tiny_bundle(head_dim=24))
    with pytest.raises(UsageError, match="head_dim 24 does not divide by 32"):
        validate(odd, checkpoint, replace(options, kv="int8"))


def test_kept_reference_states_give_the_same_report(
    bundle: Bundle, checkpoint: Checkpoint, options: ValidateOptions, tmp_path: Path
) -> None:
    kept = replace(options, speed=False, states=tmp_path / "states.npz")
    first = validate(bundle, checkpoint, kept)
    assert kept.states is not None and kept.states.exists()
    again = validate(bundle, checkpoint, kept)
    assert (again.kld, again.perplexity) == (first.kld, first.perplexity)


def test_states_for_a_missing_folder_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such folder"):
        ValidateOptions(states=tmp_path / "missing" / "states.npz")


def test_relative_errors_are_those_of_float64(
    report: Report, bundle: Bundle, checkpoint: Checkpoint
) -> None:
    weight = checkpoint.layer(1)["self_attn.q_proj"].astype(np.float64)
    error = np.linalg.norm(bundle.quant(Q_PROJ).dequantize() - weight) / np.linalg.norm(weight)
    (found,) = [entry for entry in report.layers if entry.name == Q_PROJ]
    assert found.relative_error == pytest.approx(error, rel=1e-6)
    assert (found.bits, found.group) == (4, 32)


def test_columns_that_a_norm_gave_away_are_no_error(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """GPTQ moves powers of two from gains into columns; the product is what is compared."""
    gain = np.zeros(128, np.float32)
    gain[:5] = 60.0
    extra = {"model.layers.1.input_layernorm.weight": gain}
    checkpoint = open_checkpoint(tiny_checkpoint(extra=extra))
    text = tmp_path / "words.txt"
    text.write_text(WORDS * 60)
    gptq = QuantizeOptions(calibration=str(text), calibration_tokens=512)
    made = open_bundle(quantize(checkpoint, tmp_path / "made", gptq))
    gains = made.array("model.layers.1.input_layernorm.gain")
    assert (gains != checkpoint.gains(1)["input_layernorm"]).any()
    errors = weight_errors(made, checkpoint, lambda layer: None)
    # columns of little weight are rounded coarsely; a column left 8 times too large gives 1.4
    assert all(entry.relative_error < 0.3 for entry in errors)


def test_tensors_not_quantized_as_planned_are_warnings() -> None:
    errors = [LayerError(f"t{i}", 4, 32, 0.1, "rtn", reason) for i, reason in enumerate("aab")]
    errors.append(LayerError("t3", 4, 32, 0.1, "gptq", None))
    assert fallbacks(tuple(errors)) == ["t0 and 1 more: a", "t2: b"]


def test_every_quantized_tensor_has_an_error(
    tiny_bundle: Callable[..., Path], tiny_checkpoint: Callable[..., Path]
) -> None:
    untied = open_bundle(tiny_bundle(tied=False))
    layers: list[int] = []
    errors = weight_errors(untied, open_checkpoint(tiny_checkpoint(tied=False)), layers.append)
    assert {entry.name for entry in errors} == set(untied.manifest.tensors)
    assert all(0.01 < entry.relative_error < 0.2 for entry in errors)
    assert layers == [0, 1]


def test_sizes_count_every_weight_and_byte(bundle: Bundle, checkpoint: Checkpoint) -> None:
    sizes = kind_sizes(bundle.manifest, checkpoint)
    assert [kind.kind for kind in sizes] == ["embedding", "attention", "mlp", "norms"]
    assert sum(kind.weights for kind in sizes) == bundle.config.num_parameters()
    stored = sum(kind.bytes for kind in sizes)
    assert 8 * stored / bundle.config.num_parameters() == pytest.approx(bundle.bits_per_weight)
    # the checkpoint is bf16, and its norms are as long as our gains
    assert all(kind.reference_bytes == 2 * kind.weights for kind in sizes)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("model.norm.weight", "norms"),
        ("model.norm.gain", "norms"),
        ("model.layers.0.self_attn.q_norm.weight", "norms"),
        ("model.layers.0.post_feedforward_layernorm.gain", "norms"),
        ("model.layers.0.self_attn.o_proj.weight", "attention"),
        ("model.layers.0.mlp.down_proj.weight", "mlp"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def made_from(manifest: Manifest, checkpoint: Checkpoint, **changes: Any) -> Manifest:
    """The manifest as the quantizer would write it for `checkpoint`, then changed."""
    files = {
        name: SourceFile(checkpoint.files()[name].size, content)
        for name, content in checkpoint.contents().items()
    }
    origin = Provenance("folder", checkpoint.source.id, None, checkpoint.dtype, files)
    return replace(manifest, provenance=replace(origin, **changes))


def test_the_checkpoint_of_the_bundle_is_found(bundle: Bundle, checkpoint: Checkpoint) -> None:
    found, warnings = find_reference(made_from(bundle.manifest, checkpoint), None)
    assert (found.source, warnings) == (checkpoint.source, ())


def test_a_lost_checkpoint_says_what_to_pass(bundle: Bundle, checkpoint: Checkpoint) -> None:
    manifest = made_from(bundle.manifest, checkpoint, id="/no/such/folder")
    with pytest.raises(CheckpointError, match="pass --reference MODEL: .*/no/such/folder"):
        find_reference(manifest, None)


def test_changed_weights_are_an_error_unless_given(bundle: Bundle, checkpoint: Checkpoint) -> None:
    manifest = made_from(bundle.manifest, checkpoint)
    (name, record), *_ = manifest.provenance.files.items()
    changed = {name: replace(record, content="0" * 64)}
    manifest = replace(manifest, provenance=replace(manifest.provenance, files=changed))
    with pytest.raises(CheckpointError, match="model.safetensors has another content"):
        find_reference(manifest, None)
    _, warnings = find_reference(manifest, checkpoint)
    assert warnings == (
        "reference: model.safetensors has another content than when the bundle was made",
    )


def test_another_model_is_refused_even_when_given(
    bundle: Bundle, tiny_checkpoint: Callable[..., Path]
) -> None:
    other = open_checkpoint(tiny_checkpoint(layers=3))
    with pytest.raises(CheckpointError, match="num_layers is 3, but 2 in the bundle"):
        find_reference(bundle.manifest, other)


def test_another_setting_is_a_warning_when_given(bundle: Bundle, checkpoint: Checkpoint) -> None:
    model = replace(bundle.config, rope_theta=5e5)
    manifest = replace(made_from(bundle.manifest, checkpoint), model=model)
    _, warnings = find_reference(manifest, checkpoint)
    assert warnings == ("reference: rope_theta is 1000000.0, but 500000.0 in the bundle",)


def test_files_compared_by_size_alone_are_a_warning(
    bundle: Bundle, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = made_from(bundle.manifest, checkpoint)
    assert find_reference(manifest, checkpoint)[1] == ()
    monkeypatch.setattr("uq.validate.origin.READ_BYTES", 0)
    (warning,) = find_reference(manifest, checkpoint)[1]
    assert warning.endswith("compared by name and size alone")


def test_absent_devices_say_so(
    bundle: Bundle, checkpoint: Checkpoint, options: ValidateOptions
) -> None:
    with pytest.raises(DeviceError, match="run: uq doctor; use --device cpu"):
        validate(bundle, checkpoint, replace(options, device="npu"))


def test_a_text_that_is_not_utf8_is_refused(
    bundle: Bundle, checkpoint: Checkpoint, options: ValidateOptions, tmp_path: Path
) -> None:
    text = tmp_path / "latin.txt"
    text.write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match=r"latin.txt: not UTF-8"):
        validate(bundle, checkpoint, replace(options, text=text))


def test_a_speed_limit_needs_a_speed() -> None:
    with pytest.raises(UsageError, match="--min-tps"):
        ValidateOptions(speed=False, min_tps=1.0)


def test_a_value_at_its_limit_passes() -> None:
    options = ValidateOptions(max_kld=0.5, max_ppl_ratio=1.25)
    assert [limit.passed for limit in thresholds(options, 0.5, 1.25, None)] == [True, True]
    assert [limit.passed for limit in thresholds(options, 0.51, 1.26, None)] == [False, False]
    assert thresholds(ValidateOptions(), 9.0, 9.0, None) == ()


def test_the_survival_curve_counts_values() -> None:
    values = np.random.default_rng(0).lognormal(size=5000)
    curve = survival(values)
    shares = [np.mean(values >= x) for x in curve.x]
    assert list(curve.y) == pytest.approx(shares)
    assert list(curve.x) == sorted(curve.x)
    assert (curve.x[-1], curve.y[0]) == (values.max(), 1.0)
