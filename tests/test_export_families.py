"""Exports of families whose layers have more than attention and an MLP, read by other programs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from tests.test_export import assert_llama_cpp_agrees
from tests.test_reference import all_logits, random_tokens
from uq.cli import main
from uq.errors import UsageError
from uq.export.compressed import quantization_config
from uq.export.export import ExportOptions, export
from uq.export.gguf_model import require_known
from uq.export.packed import Scheme
from uq.formats.bundle import Bundle, open_bundle
from uq.formats.checkpoint import open_checkpoint
from uq.formats.checkpoint.checkpoint import expected_shapes
from uq.formats.config import AltUp, PerLayerEmbedding, layer_tensor
from uq.formats.manifest import gain_name
from uq.kernels.reference import ReferenceSession
from uq.kernels.weights import BundleWeights
from uq.quantize.pipeline import QuantizeOptions, quantize

VLLM_FUSES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
MODELS = (
    "vaultgemma", "gemma4 small", "gemma4 experts", "gemma4_unified large", "gemma3n plain",
    "gemma3n other",
)  # fmt: skip
FOR_LLAMA = ("gemma4 small", "gemma4 experts", "gemma4_unified large", "gemma3n published")
CHANGED = {
    "gemma4 small": {"num_kv_shared_layers": 2},  # as llama.cpp can
    "gemma4_unified large": {"num_hidden_layers": 6},
}
# torch's own code, and that of compressed-tensors
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def bundles(
    tiny_checkpoint: Callable[..., Path],
    tiny_gemma4: Callable[..., Path],
    tiny_gemma3n: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Mapping[str, Bundle]:
    """Rounded to nearest, 4 bits in groups of 32."""
    root = tmp_path_factory.mktemp("families")
    unified = partial(tiny_gemma4, kind="gemma4_unified_text")
    write: dict[str, Callable[..., Path]]
    write = {"gemma4": tiny_gemma4, "gemma4_unified": unified, "gemma3n": tiny_gemma3n}
    options = QuantizeOptions(method="rtn", group=32)

    def made(name: str) -> Bundle:
        family, _, variant = name.partition(" ")
        text = CHANGED.get(name)
        folder = write[family](variant, text=text) if variant else tiny_checkpoint(family=family)
        return open_bundle(quantize(open_checkpoint(folder), root / name, options))

    class Made(dict[str, Bundle]):
        def __missing__(self, name: str) -> Bundle:
            return self.setdefault(name, made(name))

    return Made()


@pytest.mark.parametrize("form", ["hf", "compressed-tensors"])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_what_the_reference_does(
    bundles: Mapping[str, Bundle], tmp_path: Path, name: str, form: str
) -> None:
    """Within 1e-4 of the range of the logits, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    bundle = bundles[name]
    made = export(bundle, tmp_path / "out", ExportOptions(form))
    assert made.rounded == ()
    assert (form == "hf") == ("I32" not in made.stored_as)
    model, info = AutoModelForCausalLM.from_pretrained(
        made.path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    session = ReferenceSession(BundleWeights(bundle))
    tokens = random_tokens(session, 1, 40)
    expected = all_logits(session, session.score(tokens))
    with torch.no_grad():
        actual = model.eval()(torch.from_numpy(tokens).long()).logits.numpy()
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", MODELS)
def test_a_group_of_one_scheme_has_all_that_vllm_fuses(
    bundles: Mapping[str, Bundle], name: str
) -> None:
    """It replaces `qkv_proj` by each of q, k and v, wants a target for every one, even where a
    layer has none, and takes the scheme of the first.
    """
    config = bundles[name].config
    chosen = {
        layer_tensor(layer, role): Scheme(4 if layer % 2 else 8, 32, symmetric=True)
        for layer in range(config.num_layers)
        for role in config.linear_shapes(layer)
        if role not in config.expert_roles(layer)
    }
    groups = quantization_config(chosen)["config_groups"].values()
    assert len(groups) == 2
    for prefix in ("model", "language_model.model", "model.language_model"):
        for layer in range(config.num_layers):
            for module, fused in (("self_attn", "qkv_proj"), ("mlp", "gate_up_proj")):
                names = [f"{prefix}.layers.{layer}.{module}.{part}" for part in VLLM_FUSES[fused]]
                found = [[bool(matches(g, name)) for g in groups] for name in names]
                assert found[0].count(True) == 1 and all(row == found[0] for row in found)


def matches(group: Mapping[str, Any], name: str) -> list[str]:
    return [target for target in group["targets"] if re.match(target.removeprefix("re:"), name)]


def test_the_command_says_what_takes_more_bits(
    tiny_bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for bits in (4, 6):
        bundle = str(tiny_bundle(bits=bits))
        for form, what in (
            ("compressed-tensors", "14 of 14 linears"),
            ("gguf", "15 of 15 tensors"),
        ):
            out = tmp_path / f"{form}-{bits}"
            assert main(["export", bundle, "--format", form, "-o", str(out)]) == 0
            told = f"{what} take 8 bits" in capsys.readouterr().out
            assert told == (bits == 6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 0.1), ("float32", 0.01)])
@pytest.mark.parametrize("name", FOR_LLAMA)
def test_llama_cpp_runs_newer_families(
    bundles: Mapping[str, Bundle], tmp_path: Path, name: str, dtype: str | None, tolerance: float
) -> None:
    """It rounds inputs of quantized matrices to 8 bits, and GELU and the cache to float16."""
    made = export(bundles[name], tmp_path / "m.gguf", ExportOptions("gguf", dtype=dtype))
    assert made.rounded == ()
    assert_llama_cpp_agrees(as_llama_cpp_has_it(bundles[name]), bundles[name], made.path, tolerance)


def as_llama_cpp_has_it(bundle: Bundle) -> ReferenceSession:
    """It divides by one channel less for the deviation that a sparse gate is cut by: 6e-5 of it at
    E2B's width, 0.4 % at 128 channels."""
    session, normal = ReferenceSession(BundleWeights(bundle)), NormalDist()
    larger = (1 - 1 / bundle.config.intermediate_size) ** -0.5
    shares = (
        normal.cdf(larger * normal.inv_cdf(share)) if share else 0.0
        for share in bundle.config.activation_sparsity
    )
    session.config = replace(bundle.config, activation_sparsity=tuple(shares))
    return session


def test_llama_cpp_splits_texts_as_gemma4_does(
    bundles: Mapping[str, Bundle], tmp_path: Path
) -> None:
    import gguf

    bundle = bundles["gemma4 small"]
    path = export(bundle, tmp_path / "m.gguf", ExportOptions("gguf")).path
    fields = gguf.GGUFReader(path).fields
    merges = json.loads(bundle.asset("tokenizer.json"))["model"]["merges"]
    assert fields["tokenizer.ggml.model"].contents() == "gemma4"
    assert fields["tokenizer.ggml.merges"].contents() == [" ".join(merge) for merge in merges]


@pytest.mark.parametrize("name", FOR_LLAMA)
def test_uq_reads_the_values_that_it_wrote(
    bundles: Mapping[str, Bundle], tmp_path: Path, name: str
) -> None:
    """And the first row in the place of those that llama.cpp wants of a shorter per-layer table."""
    bundle = bundles[name]
    found = open_checkpoint(export(bundle, tmp_path / "m.gguf", ExportOptions("gguf")).path)
    for tensor in expected_shapes(bundle.config):
        wanted, value = stored_value(bundle, tensor), found.whole(tensor)
        value = value.reshape(-1, *wanted.shape[1:])
        assert_array_equal(value[: len(wanted)], wanted)
        assert (value[len(wanted) :] == value[:1]).all()


def stored_value(bundle: Bundle, tensor: str) -> NDArray[np.float32]:
    manifest = bundle.manifest
    if tensor in manifest.tensors:
        return bundle.quant(tensor).dequantize()
    return bundle.array(tensor if tensor in manifest.arrays else gain_name(tensor))


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("gemma4 small", {"kv_shared_layers": 3}, r"layers 1 \(sliding\) and 2 .* of \[1, 2\]"),
        ("gemma4 small", {"per_layer": PerLayerEmbedding(600, 32)}, "per_layer.weight: has 600 r"),
        ("gemma4 small", {"rope_scaling": 8.0}, "no gemma4 with scaled RoPE"),
        ("gemma3n published", {"kv_shared_layers": 3}, "with own keys: 20; this model has 19"),
        ("gemma3n published", {"altup": AltUp(4, 1, True)}, "active stream: 0; this model has 1"),
        (
            "gemma3n published",
            {"activation_sparsity": ()},
            "0.95 in the first 10 layers; .*others",
        ),
        ("gemma3n published", {"rope_scaling": 8.0}, "no gemma3n with scaled RoPE"),
        ("gemma3n plain", {}, "with own keys: 5; this model has 3; use another format"),
        ("vaultgemma", {}, "export of vaultgemma to GGUF is not offered: .*no such architecture"),
    ],
)
def test_what_llama_cpp_would_run_otherwise_is_refused(
    bundles: Mapping[str, Bundle], name: str, change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        require_known(replace(bundles[name].config, **change))
