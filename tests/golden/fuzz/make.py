"""Writes the seeds of the fuzz targets:  python -m tests.golden.fuzz.make"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
from gguf import GGUFWriter

from tests.tiny import (
    Tiny,
    config_of,
    tokenizer_config,
    tokenizer_of,
    weights_of,
    write_json,
    write_weights,
)
from uq.formats.checkpoint import open_checkpoint
from uq.formats.config import GemmaConfig, layer_tensor
from uq.progress import SilentProgress
from uq.quantize.job import plan_of
from uq.quantize.pipeline import QuantizeOptions, quantize
from uq.quantize.plan import Plan

HERE = Path(__file__).parent
TINY = Tiny(hidden=32, layers=1, heads=1, kv_heads=1, head_dim=32, ffn=32, vocab=364)
TOKENS = [b"<pad>", b"<eos>", b"<bos>", b"<unk>", b"<start_of_turn>", b"<end_of_turn>"]
TOKENS += [b"<0x%02X>" % byte for byte in range(32)]
TOKENS += [piece.encode() for piece in ("▁", "t", "h", "e", "th", "the", "▁the", "é", "世", "es")]
METADATA = {
    "context_length": 128, "embedding_length": 32, "feed_forward_length": 32, "block_count": 1,
    "attention.head_count": 1, "attention.head_count_kv": 1, "attention.key_length": 32,
    "attention.sliding_window": 16,
}  # fmt: skip


class Stop(SilentProgress):
    """Breaks off in the first layer, so that a journal is left."""

    def work(self, what: str) -> None:
        if what == layer_tensor(0, "mlp.up_proj"):
            raise KeyboardInterrupt


def write_checkpoint(folder: Path) -> None:
    folder.mkdir()
    write_json(folder / "config.json", config_of(TINY))
    write_json(folder / "generation_config.json", {"eos_token_id": [1, 5]})
    write_json(folder / "tokenizer_config.json", tokenizer_config())
    tokenizer_of(TINY.vocab).save(str(folder / "tokenizer.json"), pretty=False)
    write_weights(folder, dict(weights_of(TINY)), TINY)


def write_bundle(model: Path, out: Path) -> None:
    """With its journal, `journal.json`, beside it."""
    checkpoint, options = open_checkpoint(model), QuantizeOptions(method="rtn", group=32)
    with patch("uq.quantize.job.plan_of", plan_with_steps):
        try:
            quantize(checkpoint, out, options, Stop())
        except KeyboardInterrupt:
            shutil.copy(out.with_name(out.name + ".partial") / "journal.json", out.parent)
        quantize(checkpoint, out, options)


def plan_with_steps(config: GemmaConfig, options: QuantizeOptions) -> Plan:
    """One of the tensors has scales of 8 bits."""
    plan, name = plan_of(config, options), layer_tensor(0, "mlp.up_proj")
    found = replace(plan.tensors[name], spec=replace(plan.tensors[name].spec, scale_bits=8))
    return replace(plan, tensors={**plan.tensors, name: found})


def write_gguf(path: Path) -> None:
    writer = GGUFWriter(path, "gemma3")
    for key, value in METADATA.items():
        writer.add_uint32(f"gemma3.{key}", value)
    writer.add_float32("gemma3.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([-float(index) for index in range(len(TOKENS))])
    writer.add_token_types([3] * 6 + [6] * 32 + [1] * (len(TOKENS) - 38))
    writer.add_bos_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    roles = {"attn_q": 2, "attn_k": 2, "attn_v": 2, "attn_output": 2, "ffn_gate": 2, "ffn_up": 2}
    roles |= {"ffn_down": 2, "attn_norm": 1, "post_attention_norm": 1, "ffn_norm": 1}
    roles |= {"post_ffw_norm": 1, "attn_q_norm": 1, "attn_k_norm": 1}
    for role, dims in roles.items():
        writer.add_tensor(f"blk.0.{role}.weight", np.ones((32,) * dims, np.float32))
    writer.add_tensor("token_embd.weight", np.ones((len(TOKENS), 32), np.float16))
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder / "model")
        write_bundle(folder / "model", folder / "bundle")
        for kind in ("model", "bundle"):
            shutil.rmtree(HERE / kind, ignore_errors=True)
            shutil.copytree(folder / kind, HERE / kind)
        shutil.copy(folder / "journal.json", HERE)
    write_gguf(HERE / "model.gguf")
    configs = {family: config_of(Tiny(family=family)) for family in ("gemma", "gemma2")}
    configs["multimodal"] = config_of(Tiny(prefix="language_model.model."))
    for name, config in configs.items():
        write_json(HERE / f"config-{name}.json", config)
    index = {"metadata": {"total_size": 3}, "weight_map": {"a": "b.safetensors", "c": "d"}}
    write_json(HERE / "index.json", index)
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (HERE / "chat.jsonl").write_text((json.dumps(chat) + "\n") * 3)


if __name__ == "__main__":
    main()
