"""The checkpoint that is quantized again and again: small, random, of Gemma 3's kind."""

from __future__ import annotations

from pathlib import Path

from tests.tiny import (
    Tiny,
    config_of,
    tokenizer_config,
    tokenizer_of,
    weights_of,
    write_json,
    write_weights,
)


def write_model(folder: Path, layers: int) -> None:
    tiny = Tiny(layers=layers, vocab=401)
    folder.mkdir()
    write_json(folder / "config.json", config_of(tiny))
    write_json(folder / "tokenizer_config.json", tokenizer_config())
    tokenizer_of(tiny.vocab).save(str(folder / "tokenizer.json"))
    write_weights(folder, dict(weights_of(tiny)), tiny)
