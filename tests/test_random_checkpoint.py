"""Checkpoints with made-up weights, as the benchmarks write them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import random_checkpoint
from benchmarks.random_checkpoint import OUTLIERS, write_random_checkpoint
from benchmarks.shapes import shape_config
from uq.formats.checkpoint import open_checkpoint
from uq.formats.config import EMBEDDING, FULL

CONFIG = replace(
    shape_config("270m", 1),
    vocab_size=1100,
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    head_dim=64,
    query_pre_attn_scalar=64.0,
    layer_types=(FULL, FULL),
)


def test_a_folder_of_several_files_opens_as_the_model_it_was_made_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_checkpoint, "SHARD_BYTES", 300_000)
    write_random_checkpoint(CONFIG, tmp_path / "c")
    checkpoint = open_checkpoint(tmp_path / "c")
    assert replace(checkpoint.config, sliding_window=CONFIG.sliding_window) == CONFIG
    assert len(checkpoint.files()) == 4
    assert checkpoint.tokenizer().decode(checkpoint.tokenizer().encode("the time")) == "the time"


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_random_checkpoint(CONFIG, tmp_path / name, seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_weights_have_heavy_tails_and_a_stream_with_outliers(tmp_path: Path) -> None:
    write_random_checkpoint(CONFIG, tmp_path / "c")
    checkpoint = open_checkpoint(tmp_path / "c")
    gate = checkpoint.layer(0)["mlp.gate_proj"].astype(np.float64)
    plain = gate / gate.std(axis=1, keepdims=True)
    assert np.mean(plain**4) > 4  # 3 for normal weights
    strengths = [
        checkpoint.rows(EMBEDDING, 0, 1100).std(axis=0),
        checkpoint.layer(1)["mlp.down_proj"].std(axis=1),
    ]
    outliers = [set(np.argsort(-strength)[:OUTLIERS]) for strength in strengths]
    assert outliers[0] == outliers[1]
    assert all(np.sort(s)[-OUTLIERS] > 3 * np.median(s) for s in strengths)
