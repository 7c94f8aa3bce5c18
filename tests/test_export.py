"""Exports, read by transformers, compressed-tensors, the gguf package and llama.cpp."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from tests.test_reference import LINEAR_BY_8, all_logits, random_tokens, transformers_logits
from uq.cli import main
from uq.export.export import Exported, ExportOptions, export
from uq.export.gguf_vocabulary import vocabulary
from uq.formats.bundle import Bundle, open_bundle
from uq.formats.checkpoint import open_checkpoint
from uq.formats.checkpoint.gguf_config import gguf_names
from uq.formats.checkpoint.safetensors_file import folder_tensors
from uq.formats.checkpoint.tensors import read_rows
from uq.formats.config import EMBEDDING, layer_tensor
from uq.formats.spec import SPECS, Spec
from uq.kernels.reference import ReferenceSession
from uq.kernels.weights import BundleWeights
from uq.progress import SilentProgress

MIXED = (Spec(4, 32), Spec(8, 64), Spec(5, 64, True), Spec(4, 128, True), Spec(6, 32))
MODELS: dict[str, dict[str, Any]] = {
    "gemma": {"family": "gemma"},
    "gemma2": {"family": "gemma2"},
    "gemma3": {"config": LINEAR_BY_8, "layers": 3, "pattern": 3},
    "gemma3 untied": {"tied": False},
}
# torch's own code, and that of compressed-tensors
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def mixed(tiny_bundle: Callable[..., Path]) -> Bundle:
    """Grids of every kind, and a token that ends a turn."""
    return open_bundle(tiny_bundle(specs=MIXED))


def exported(bundle: Bundle, out: Path, **options: Any) -> Exported:
    return export(bundle, out, ExportOptions(**options))


def reference(bundle: Bundle) -> ReferenceSession:
    return ReferenceSession(BundleWeights(bundle))


def assert_same_logits(bundle: Bundle, folder: Path) -> None:
    """transformers, in float32, within 1e-4 of the reference on the bundle's weights."""
    session = reference(bundle)
    tokens = random_tokens(session, 1, 40)
    expected = all_logits(session, session.score(tokens))
    actual = transformers_logits(folder)(tokens)
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_transformers_loads_a_dequantized_bundle(
    tiny_bundle: Callable[..., Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    bundle = open_bundle(tiny_bundle(specs=MIXED, **options))
    made = exported(bundle, tmp_path / "hf")
    assert made.rounded == ()
    assert_same_logits(bundle, made.path)


def test_transformers_loads_the_codes(mixed: Bundle, tmp_path: Path) -> None:
    made = exported(mixed, tmp_path / "ct", format="compressed-tensors")
    assert made.rounded == ()
    assert_same_logits(mixed, made.path)


def test_one_scheme_is_written_as_usual(tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle = open_bundle(tiny_bundle(bits=4, group=64))
    made = exported(bundle, tmp_path / "ct", format="compressed-tensors")
    config = json.loads((made.path / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert (group["weights"]["num_bits"], group["weights"]["group_size"]) == (4, 64)
    assert_same_logits(bundle, made.path)


def test_zero_points_are_those_of_compressed_tensors(
    tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """transformers does not load them yet: decompressed by compressed-tensors itself."""
    import torch
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from safetensors import safe_open

    bundle = open_bundle(tiny_bundle(specs=(Spec(4, 64, True), Spec(4, 32)), kv_heads=1))
    options = {"format": "compressed-tensors", "zero_points": True}
    made = exported(bundle, tmp_path / "ct", **options)
    config = json.loads((made.path / "config.json").read_text())["quantization_config"]
    groups = [QuantizationScheme.model_validate(g) for g in config["config_groups"].values()]
    name = layer_tensor(0, "self_attn.k_proj")
    module = name.removesuffix(".weight")
    (scheme,) = [
        group
        for group in groups
        if any(re.match(target.removeprefix("re:"), module) for target in group.targets)
    ]
    with safe_open(made.path / "model-00002-of-00003.safetensors", "pt") as file:
        keys = [key for key in file.keys() if key.startswith(name)]  # noqa: SIM118
        state = {
            key.removeprefix(name.removesuffix("weight")): file.get_tensor(key) for key in keys
        }
    state["weight_scale"] = state["weight_scale"].to(torch.float32)
    weight = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    assert_array_equal(weight.numpy(), bundle.quant(name).dequantize())


def test_bfloat16_scales_are_refused_by_name(mixed: Bundle, tmp_path: Path) -> None:
    message = refusal(mixed, tmp_path / "ct", format="compressed-tensors", dtype="bfloat16")
    assert "model.layers.0.self_attn.q_proj.weight and 13 more" in message
    assert "--allow-rounding" in message
    assert "%" in message


def test_what_bfloat16_loses_is_measured(mixed: Bundle, tmp_path: Path) -> None:
    made = exported(mixed, tmp_path / "hf", dtype="bfloat16")
    stored, wanted = folder_values(made.path), values(mixed)
    error = sum(np.square(stored[n].astype(np.float64) - wanted[n]).sum() for n in made.rounded)
    square = sum(np.square(wanted[n].astype(np.float64)).sum() for n in made.rounded)
    assert made.relative_error == pytest.approx((error / square) ** 0.5)
    assert 5e-4 < made.relative_error < 3e-3


def test_the_gguf_package_reads_the_same_weights(
    tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """Every grid that there is."""
    bundle = open_bundle(tiny_bundle(specs=SPECS, layers=3))
    assert {record.spec for record in bundle.manifest.tensors.values()} == set(SPECS)
    path = exported(bundle, tmp_path / "m.gguf", format="gguf").path
    found, names = gguf_values(path), gguf_names(bundle.config)
    for name in bundle.manifest.tensors:
        assert_array_equal(found[names[name]], bundle.quant(name).dequantize())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_gguf_package_reads_floats(mixed: Bundle, tmp_path: Path, dtype: str) -> None:
    made = exported(mixed, tmp_path / "m.gguf", format="gguf", dtype=dtype)
    found, names, wanted = gguf_values(made.path), gguf_names(mixed.config), values(mixed)
    for name in mixed.manifest.tensors:
        bound = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
        np.testing.assert_allclose(found[names[name]], wanted[name], rtol=bound, atol=2**-24)
    assert 0 < made.relative_error < bound


def test_symmetric_codes_keep_their_width(tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle = open_bundle(tiny_bundle(specs=(Spec(8, 32), Spec(4, 32), Spec(5, 128))))
    made = exported(bundle, tmp_path / "m.gguf", format="gguf")
    assert made.stored_as == {"F32": 13, "Q4_0": 5, "Q5_0": 5, "Q8_0": 5}


def test_codes_in_a_gguf_are_the_bundles(tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle = open_bundle(tiny_bundle(bits=4, group=32))
    path = exported(bundle, tmp_path / "m.gguf", format="gguf").path
    (stored,) = [t for t in gguf.GGUFReader(path).tensors if t.name == "token_embd.weight"]
    blocks = stored.data.reshape(-1, 18)
    tensor = bundle.quant(EMBEDDING)
    codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(np.int8) - 8
    assert_array_equal(codes.reshape(tensor.shape), tensor.codes)
    assert_array_equal(
        blocks[:, :2].copy().view(np.float16).reshape(tensor.scales.shape), tensor.scales
    )


def test_rounded_minima_are_measured(mixed: Bundle, tmp_path: Path) -> None:
    made = exported(mixed, tmp_path / "m.gguf", format="gguf", allow_rounding=True)
    assert made.stored_as["Q4_1"] and made.stored_as["Q5_1"]
    found, names, wanted = gguf_values(made.path), gguf_names(mixed.config), values(mixed)
    error = sum(
        np.square(found[names[n]].astype(np.float64) - wanted[n]).sum() for n in made.rounded
    )
    square = sum(np.square(wanted[n].astype(np.float64)).sum() for n in made.rounded)
    assert made.relative_error == pytest.approx((error / square) ** 0.5, rel=1e-3)
    assert 0 < made.relative_error < 1e-3


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_uq_reads_an_exported_gguf(
    tiny_bundle: Callable[..., Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    if options.get("family") == "gemma2":
        options = options | {"layers": 2}
    bundle = open_bundle(tiny_bundle(specs=MIXED, **options))
    checkpoint = open_checkpoint(exported(bundle, tmp_path / "m.gguf", format="gguf").path)
    assert checkpoint.config.layer_types == bundle.config.layer_types
    assert checkpoint.config.rope_scaling == bundle.config.rope_scaling
    for layer in range(bundle.config.num_layers):
        wanted = BundleWeights(bundle).layer(layer)
        for role, weight in checkpoint.layer(layer).items():
            assert_array_equal(weight, wanted[role])
    text = "<start_of_turn>the world\nit was first  été 世界<end_of_turn>"
    assert checkpoint.tokenizer().encode(text) == bundle.tokenizer().encode(text)


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 0.1), ("float32", 0.01)])
def test_llama_cpp_gives_the_likeliest_tokens(
    mixed: Bundle, tmp_path: Path, dtype: str | None, tolerance: float
) -> None:
    """It rounds inputs of quantized matrices to 8 bits, and GELU and the cache to float16."""
    path = exported(mixed, tmp_path / "m.gguf", format="gguf", dtype=dtype).path
    assert_llama_cpp_agrees(reference(mixed), mixed, path, tolerance)


def test_a_head_of_its_own_is_refused_where_llama_cpp_has_none(
    tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = open_bundle(tiny_bundle(family="gemma2", tied=False))
    assert "no gemma2 with a head of its own" in refusal(bundle, tmp_path / "m", format="gguf")


def test_what_llama_cpp_would_read_otherwise_is_refused(
    tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = open_bundle(tiny_bundle(config={"query_pre_attn_scalar": 7}))
    message = refusal(bundle, tmp_path / "m", format="gguf")
    assert "query_pre_attn_scalar is 7.0: llama.cpp would take 32.0" in message


def test_merges_that_no_scores_can_say_are_refused(mixed: Bundle) -> None:
    document = json.loads(mixed.asset("tokenizer.json"))
    document["model"]["vocab"] |= {"▁tthe": 511}
    document["model"]["merges"] = [
        ["▁", "t"],
        ["t", "h"],
        ["▁t", "the"],
        ["th", "e"],
        ["▁tt", "he"],
    ]
    with pytest.raises(Exception, match="▁tthe do not stand together"):
        vocabulary(json.dumps(document).encode(), 512, scored=True)


def test_an_existing_folder_is_not_touched(mixed: Bundle, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    assert refusal(mixed, tmp_path / "hf").endswith("exists; remove it or choose another -o")
    assert list(tmp_path.iterdir()) == [tmp_path / "hf"]


class Interrupting(SilentProgress):
    """Ctrl-C behind the first step."""

    def advance(self, step: str, **figures: float) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_ctrl_c_leaves_nothing(mixed: Bundle, tmp_path: Path, form: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        export(mixed, tmp_path / "out", ExportOptions(form), Interrupting())
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_it_wrote(
    mixed: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.gguf"
    assert main(["export", str(mixed.path), "--format", "gguf", "-o", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["nbytes"] == out.stat().st_size
    assert facts["rounded"] == []
    assert main(["export", str(mixed.path), "--format", "gguf", "--zero-points"]) == 2


def assert_llama_cpp_agrees(
    session: ReferenceSession, bundle: Bundle, path: Path, tolerance: float
) -> None:
    """The 50 likeliest next tokens have the reference's log-probabilities."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(path), 64, 1
    params.warmup, params.cpuparams.n_threads = False, 1
    server = xllamacpp.Server(params)
    tokens = bundle.tokenizer().encode("the time of the world")
    request = {"prompt": tokens, "n_predict": 1, "n_probs": 50, "temperature": 0.0}
    answer: dict[str, Any] = server.handle_completions(request)
    entries = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    logits = all_logits(session, session.score(np.array([tokens], np.int32)))[0, -1]
    wanted = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    assert entries[0]["id"] == int(logits.argmax())
    for entry in entries:
        assert entry["logprob"] == pytest.approx(wanted[entry["id"]], abs=tolerance)


def refusal(bundle: Bundle, out: Path, **options: Any) -> str:
    from uq.errors import UqError

    with pytest.raises(UqError) as caught:
        exported(bundle, out, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def values(bundle: Bundle) -> dict[str, NDArray[np.float32]]:
    """Every tensor by the name that transformers has for it."""
    config = bundle.config
    layers = range(config.num_layers)
    norms = {layer_tensor(i, role) for i in layers for role in config.norm_shapes(i)}
    found = {name: bundle.quant(name).dequantize() for name in bundle.manifest.tensors}
    for name in norms | {"model.norm.weight"}:
        found[name] = bundle.array(name.removesuffix("weight") + "gain") - 1
    return found


def folder_values(folder: Path) -> dict[str, NDArray[np.float32]]:
    tensors = folder_tensors(folder)
    return {name: read_rows(info, 0, info.shape[0]) for name, info in tensors.items()}


def gguf_values(path: Path) -> dict[str, NDArray[np.float32]]:
    """Every tensor as the gguf package dequantizes it."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }
