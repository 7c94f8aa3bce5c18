"""Calibration statistics against transformers, and the sequences they are taken from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from uq.errors import UsageError
from uq.formats.checkpoint import Checkpoint, open_checkpoint
from uq.formats.spec import Spec
from uq.kernels.products import flat
from uq.kernels.reference import attention_context, attention_input, embed
from uq.kernels.weights import CheckpointWeights
from uq.quantize import moments
from uq.quantize.calibrate import STAGES, Calibration
from uq.quantize.calibration_engine import TokenRows
from uq.quantize.gptq import Statistics
from uq.quantize.moments import GAIN_RIDGE
from uq.quantize.plan import GptqOptions, WorkSizes
from uq.quantize.scales import quantize_rtn
from uq.quantize.text import Text, read_text, token_sequences

Array = NDArray[np.float32]
TOKENS = np.random.default_rng(0).integers(6, 512, (3, 40)).astype(np.int32)


@pytest.fixture(scope="module", params=["gemma", "gemma2", "gemma3"])
def folder(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint(family=request.param, dtype="f32")


def moments_of_transformers(folder: Path, tokens: NDArray[np.int32]) -> dict[str, NDArray[Any]]:
    """Name of each linear -> mean of x x^T over its inputs in transformers' model, in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: dict[str, NDArray[Any]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: object, inputs: Sequence[torch.Tensor]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).double().numpy()
            found[name] = x.T @ x / len(x)

        return hook

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        model(torch.from_numpy(tokens.astype(np.int64)))
    return found


def rounded(weight: Array) -> Array:
    return quantize_rtn(weight, Spec(4, 32)).dequantize()


def start(checkpoint: Checkpoint, *, exact: bool = False, batch_tokens: int = 4096) -> Calibration:
    rows = CheckpointWeights(checkpoint, resident=False).embedding(TOKENS)
    step = max(1, batch_tokens // TOKENS.shape[1])
    parts = [rows[start : start + step] for start in range(0, len(rows), step)]
    return Calibration(
        checkpoint.config, [TokenRows(part, part if exact else None) for part in parts]
    )


def test_statistics_equal_those_of_transformers(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    calibration = start(checkpoint, batch_tokens=80)  # two batches, the second one smaller
    expected = moments_of_transformers(folder, TOKENS)
    seen = set()

    for layer in range(checkpoint.config.num_layers):

        def look(
            roles: Sequence[str], statistics: Statistics, layer: int = layer
        ) -> Mapping[str, Array]:
            for role in roles:
                name = f"model.layers.{layer}.{role}"
                seen.add(name)
                scale = np.abs(expected[name]).max()
                np.testing.assert_allclose(
                    statistics.hessian, expected[name], rtol=0, atol=2e-5 * scale
                )
            return {}

        calibration.quantize_layer(layer, checkpoint.layer(layer), look)
    assert seen == set(expected)


def test_later_stages_see_the_quantized_weights(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    weights = checkpoint.layer(0)
    rough = {role: rounded(weights[role]) for s in STAGES for role in s.roles}
    replaced = weights | rough
    quantizing: list[NDArray[Any]] = []
    plain: list[NDArray[Any]] = []

    def quantize(roles: Sequence[str], statistics: Statistics) -> Mapping[str, Array]:
        quantizing.append(statistics.hessian)
        return {role: rough[role] for role in roles}

    def watch(roles: Sequence[str], statistics: Statistics) -> Mapping[str, Array]:
        plain.append(statistics.hessian)
        return {}

    start(checkpoint).quantize_layer(0, dict(weights), quantize)
    start(checkpoint).quantize_layer(0, replaced, watch)
    for with_stages, at_once in zip(quantizing, plain, strict=True):
        np.testing.assert_array_equal(with_stages, at_once)


def test_corrections_are_zero_until_something_is_quantized(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    found: list[NDArray[Any]] = []
    weights = checkpoint.layer(0)

    def quantize(roles: Sequence[str], statistics: Statistics) -> Mapping[str, Array]:
        correction = statistics.wanted if statistics.cross is None else statistics.cross
        assert correction is not None
        found.append(correction)
        return {role: rounded(weights[role]) for role in roles}

    start(checkpoint, exact=True).quantize_layer(0, dict(weights), quantize)
    assert not found[0].any()
    assert all(np.abs(correction).max() > 0 for correction in found[1:])


def test_what_o_proj_should_add_is_that_of_float64(folder: Path) -> None:
    """Behind a rounded embedding: half of what its outputs and the residual stream have lost."""
    checkpoint = open_checkpoint(folder)
    config, weights = checkpoint.config, checkpoint.layer(0)
    rows = CheckpointWeights(checkpoint, resident=False).embedding(TOKENS)
    options = GptqOptions(clip=10.0)
    found: list[Statistics] = []

    def watch(_roles: Sequence[str], statistics: Statistics) -> Mapping[str, Array]:
        found.append(statistics)
        return {}

    batch = TokenRows(rounded(flat(rows)).reshape(rows.shape), rows)
    calibration = Calibration(config, [batch], options)
    calibration.quantize_layer(0, dict(weights), watch)

    def stream(embedded: Array) -> tuple[NDArray[Any], NDArray[Any]]:
        hidden = embed(config, embedded)
        x = attention_context(config, 0, weights, attention_input(config, weights, hidden))
        return flat(hidden).astype(np.float64), flat(x).astype(np.float64)

    hidden, x = stream(rounded(flat(rows)).reshape(rows.shape))
    exact_hidden, exact_x = stream(rows)
    weight = weights["self_attn.o_proj"].astype(np.float64)
    lost, count = exact_hidden - hidden, np.ones((len(x), 1))
    if config.post_norms:
        size = np.square(exact_x @ weight.T).mean(1, keepdims=True) + config.rms_norm_eps
        count = np.clip(np.median(size) / size, 0.1, 10)
        gain = weights["post_attention_layernorm"].astype(np.float64)
        lost = lost * np.sqrt(size) * gain / (gain**2 + GAIN_RIDGE * np.mean(gain**2))
    wanted = 0.5 * (exact_x - x) @ weight.T + 0.5 * lost
    expected = (wanted * count).T @ x / count.sum()
    assert found[1].wanted is not None
    np.testing.assert_allclose(found[1].wanted, expected, atol=1e-4 * np.abs(expected).max())


def test_a_passed_layer_leaves_the_tokens_where_quantizing_it_did(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    exact = checkpoint.layer(0)
    found = {role: rounded(exact[role]) for s in STAGES for role in s.roles}
    quantizing, passing = start(checkpoint, exact=True), start(checkpoint, exact=True)
    quantizing.quantize_layer(
        0, dict(exact), lambda roles, _: {role: found[role] for role in roles}
    )
    passing.pass_layer(0, exact, exact | found)

    seen: list[Statistics] = []

    def watch(_roles: Sequence[str], statistics: Statistics) -> Mapping[str, Array]:
        seen.append(statistics)
        return {}

    for calibration in (quantizing, passing):
        calibration.quantize_layer(1, checkpoint.layer(1), watch)
    for first, second in zip(seen[:4], seen[4:], strict=True):
        np.testing.assert_array_equal(first.hessian, second.hessian)
        np.testing.assert_array_equal(first.cross, second.cross)
        np.testing.assert_array_equal(first.wanted, second.wanted)


@pytest.mark.parametrize("exact", [False, True])
def test_spilled_activations_change_nothing(folder: Path, tmp_path: Path, exact: bool) -> None:
    checkpoint = open_checkpoint(folder)
    rows = CheckpointWeights(checkpoint, resident=False).embedding(TOKENS)
    batches = [TokenRows(rows[[i]], rows[[i]] if exact else None) for i in range(len(rows))]
    seen: list[Statistics] = []

    def quantize(roles: Sequence[str], statistics: Statistics) -> Mapping[str, Array]:
        seen.append(statistics)
        return {role: rounded(checkpoint.layer(0)[role]) for role in roles}

    for spill in (None, tmp_path):
        calibration = Calibration(checkpoint.config, batches, spill=spill)
        for layer in (0, 1):
            calibration.quantize_layer(layer, checkpoint.layer(layer), quantize)
    for first, second in zip(seen[:8], seen[8:], strict=True):
        np.testing.assert_array_equal(first.hessian, second.hessian)
        np.testing.assert_array_equal(first.cross, second.cross)
        np.testing.assert_array_equal(first.wanted, second.wanted)
    assert not list(tmp_path.iterdir())


def test_wide_moments_are_summed_by_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, r = (rng.standard_normal((3, 50, n)).astype(np.float32) for n in (70, 40))
    monkeypatch.setattr(moments, "WIDE", 48)  # strips of 32 rows
    batches = [moments.Inputs(part, wanted=w) for part, w in zip(x, r, strict=True)]
    found = moments.statistics(batches, WorkSizes(double_width=48))
    assert found.hessian.dtype == np.float32 and found.wanted is not None
    flat_x, flat_r = (a.reshape(150, -1).astype(np.float64) for a in (x, r))
    np.testing.assert_allclose(found.hessian, flat_x.T @ flat_x / 150, atol=1e-6)
    np.testing.assert_allclose(found.wanted, flat_r.T @ flat_x / 150, atol=1e-6)
    np.testing.assert_array_equal(found.hessian, found.hessian.T)


def test_sequences_are_spread_over_the_text_behind_bos(folder: Path) -> None:
    tokenizer = open_checkpoint(folder).tokenizer()
    text = Text("words", "the time of the world " * 200)
    all_tokens = np.array(tokenizer.encode(text.content, bos=False))
    found = token_sequences(tokenizer, text, sequences=3, length=50)
    assert found.shape == (3, 50) and found.dtype == np.int32
    assert (found[:, 0] == tokenizer.bos).all()
    for third, window in enumerate(found):
        start = int((third + 0.5) * len(all_tokens) / 3 - 49 / 2)
        np.testing.assert_array_equal(window[1:], all_tokens[start : start + 49])


def test_drawn_sequences_do_not_overlap(folder: Path) -> None:
    tokenizer = open_checkpoint(folder).tokenizer()
    text = Text("letters", "".join(chr(33 + i * i % 89) for i in range(400)))
    tokens = np.array(tokenizer.encode(text.content, bos=False))
    whole = token_sequences(tokenizer, text, sequences=8, length=len(tokens) // 8 + 1, seed=5)
    np.testing.assert_array_equal(whole[:, 1:].reshape(-1), tokens[: len(tokens) // 8 * 8])


def test_another_seed_draws_other_sequences(folder: Path) -> None:
    tokenizer = open_checkpoint(folder).tokenizer()
    text = Text("letters", "".join(chr(33 + i * i % 89) for i in range(400)))
    draw = partial(token_sequences, tokenizer, text, sequences=4, length=20)
    np.testing.assert_array_equal(draw(seed=1), draw(seed=1))
    assert len({draw(seed=seed).tobytes() for seed in (None, 0, 1, 2)}) == 4


def test_a_short_text_gives_fewer_sequences(folder: Path) -> None:
    tokenizer = open_checkpoint(folder).tokenizer()
    text = Text("short", "the time " * 30)
    count = len(tokenizer.encode(text.content, bos=False))
    assert len(token_sequences(tokenizer, text, sequences=9, length=21)) == count // 20


def test_a_text_below_one_sequence_is_refused(folder: Path) -> None:
    tokenizer = open_checkpoint(folder).tokenizer()
    with pytest.raises(UsageError, match=r"tiny.txt: \d+ tokens are less than one .* of 512"):
        token_sequences(tokenizer, Text("tiny.txt", "the time"), sequences=4, length=512)


def test_unreadable_texts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=re.escape("bytes.txt: not UTF-8 text")):
        read_text(str(tmp_path / "bytes.txt"))
    with pytest.raises(UsageError, match="none.txt: cannot be read: No such file"):
        read_text(str(tmp_path / "none.txt"))
    with pytest.raises(UsageError, match="hub:OWNER/DATASET/FILE"):
        read_text("hub:wikitext")
