"""Exports of families whose layers have more than attention and an MLP, read by other programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from tests.test_reference import all_logits, random_tokens
from uq.export.export import ExportOptions, export
from uq.formats.bundle import Bundle, open_bundle
from uq.formats.checkpoint import open_checkpoint
from uq.kernels.reference import ReferenceSession
from uq.kernels.weights import BundleWeights
from uq.quantize.pipeline import QuantizeOptions, quantize

MODELS = (
    "vaultgemma", "gemma4 small", "gemma4 large", "gemma4 experts", "gemma3n plain", "gemma3n other"
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
        folder = write[family](variant) if variant else tiny_checkpoint(family=family)
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
