"""Exports of families whose layers have more than attention and an MLP, read by other programs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.test_export import assert_llama_cpp_agrees
from tests.test_reference import all_logits, random_tokens
from uq.cli import main
from uq.errors import UqError
from uq.export.compressed import quantization_config
from uq.export.export import ExportOptions, export
from uq.export.gguf_model import require_known
from uq.export.packed import Scheme
from uq.formats.bundle import Bundle, open_bundle
from uq.formats.checkpoint import open_checkpoint
from uq.formats.config import PerLayerEmbedding, layer_tensor
from uq.kernels.reference import ReferenceSession
from uq.kernels.weights import BundleWeights
from uq.quantize.pipeline import QuantizeOptions, quantize

VLLM_FUSES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
MODELS = (
    "vaultgemma", "gemma4 small", "gemma4 experts", "gemma3n plain", "gemma3n other"
)  # fmt: skip
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
    write = {"gemma4": tiny_gemma4, "gemma3n": tiny_gemma3n}
    options = QuantizeOptions(method="rtn", group=32)

    def made(name: str) -> Bundle:
        family, _, variant = name.partition(" ")
        text = {"num_kv_shared_layers": 2} if name == "gemma4 small" else {}  # as llama.cpp can
        folder = write[family](variant, text=text) if variant else tiny_checkpoint(family=family)
        return open_bundle(quantize(open_checkpoint(folder), root / name, options))

    return {name: made(name) for name in MODELS}


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
            told = f"wider: {what} take 8 bits" in capsys.readouterr().out
            assert told == (bits == 6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 0.1), ("float32", 0.01)])
@pytest.mark.parametrize("name", ["gemma4 small", "gemma4 experts"])
def test_llama_cpp_runs_gemma4(
    bundles: Mapping[str, Bundle], tmp_path: Path, name: str, dtype: str | None, tolerance: float
) -> None:
    """It rounds inputs of quantized matrices to 8 bits, and GELU and the cache to float16."""
    made = export(bundles[name], tmp_path / "m.gguf", ExportOptions("gguf", dtype=dtype))
    assert made.rounded == ()
    assert_llama_cpp_agrees(bundles[name], made.path, tolerance)


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


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kv_shared_layers": 3}, r"layers 1 \(sliding\) and 2 \(full\), .* those of \[1, 2\]"),
        ({"per_layer": PerLayerEmbedding(500, 32)}, "per_layer.weight: has 500 rows"),
        ({"rope_scaling": 8.0}, "scaled RoPE"),
    ],
)
def test_a_gemma4_that_llama_cpp_would_run_otherwise_is_refused(
    bundles: Mapping[str, Bundle], change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UqError, match=reason):
        require_known(replace(bundles["gemma4 small"].config, **change))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma3n plain", "blk.3.attn_k.weight to blk.4.attn_v.weight"),
        ("vaultgemma", "no such architecture"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused(
    bundles: Mapping[str, Bundle], tmp_path: Path, name: str, reason: str
) -> None:
    with pytest.raises(UqError, match=f"to GGUF is not offered: .*{reason}"):
        export(bundles[name], tmp_path / "m.gguf", ExportOptions("gguf"))
    assert not list(tmp_path.iterdir())
