"""The reference that every row starts from: one set of float16 weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from benchmarks.quality.errors import NotRun
from uq.formats.checkpoint import Checkpoint, open_checkpoint
from uq.formats.checkpoint.weight_file import LocalFile
from uq.formats.config import EMBEDDING, FINAL_NORM, HEAD, GemmaConfig, layer_tensor

ARCHITECTURES = {
    "gemma": ("GemmaForCausalLM", "gemma"),
    "gemma2": ("Gemma2ForCausalLM", "gemma2"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
}
ROWS = 4096

Tensors = dict[str, NDArray[np.floating[Any]]]


@dataclass(frozen=True)
class Reference:
    """The weights that every quantizer starts from.

    Attributes:
        name: the model as the user gave it.
        folder: Hugging Face safetensors, what every quantizer but llama.cpp reads.
        gguf: the file that the weights came from, or None.
    """

    name: str
    folder: Path
    checkpoint: Checkpoint
    gguf: Path | None

    @property
    def sha256(self) -> dict[str, str]:
        files = self.checkpoint.fingerprint()
        return {name: str(file["sha256"]) for name, file in files.items()}


def prepare(model: str, work: Path) -> Reference:
    """Export a GGUF model once, in float16; a folder of safetensors is used as it is.

    Raises:
        UqError: the model cannot be opened.
    """
    source = open_checkpoint(model)
    files = [file.path for file in source.files().values() if isinstance(file, LocalFile)]
    if len(files) != 1 or files[0].suffix != ".gguf":
        return Reference(model, files[0].parent, source, None)
    (digest,) = (str(file["sha256"]) for file in source.fingerprint().values())
    folder = work / "reference" / digest[:16]
    if not folder.exists():
        draft = folder.with_name(folder.name + ".partial")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        export(source, draft)
        draft.rename(folder)
    return Reference(model, folder, open_checkpoint(folder), files[0])


def export(source: Checkpoint, folder: Path) -> None:
    """Write a checkpoint as Hugging Face safetensors: matrices in float16, norms in float32."""
    config = source.config
    count = 1 + config.num_layers
    index: dict[str, str] = {}
    for number in range(count):
        name = f"model-{number + 1:05}-of-{count:05}.safetensors"
        tensors = _tables(source) if number == 0 else _layer(source, number - 1)
        save_file(tensors, folder / name, {"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    _write(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    for name, content in source.assets().items():
        (folder / name).write_bytes(content)
    _write(folder / "config.json", hf_config(config))


def hf_config(config: GemmaConfig) -> dict[str, Any]:
    """config.json of a text model."""
    architecture, model_type = ARCHITECTURES[config.family]
    scaling = {"rope_type": "linear", "factor": config.rope_scaling}
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_activation": "gelu_pytorch_tanh",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "query_pre_attn_scalar": round(config.query_pre_attn_scalar),
        "sliding_window": config.sliding_window,
        "layer_types": list(config.layer_types),
        "rope_theta": config.rope_theta,
        "rope_local_base_freq": config.rope_local_theta,
        "rope_scaling": None if config.rope_scaling == 1.0 else scaling,
        "attn_logit_softcapping": config.attn_softcap,
        "final_logit_softcapping": config.final_softcap,
        "tie_word_embeddings": config.tied_head,
        "max_position_embeddings": config.max_position_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
        "torch_dtype": "float16",
    }


def require_same_weights(first: Checkpoint, second: Checkpoint) -> None:
    """Matrices bit for bit; gains within the rounding of the 1 that safetensors leave out.

    Raises:
        NotRun: a tensor differs.
    """
    for layer in range(first.config.num_layers):
        other = second.layer(layer)
        for role, weight in first.layer(layer).items():
            _require_equal(layer_tensor(layer, role), weight, other[role])
    _require_equal(FINAL_NORM, first.final_norm(), second.final_norm())
    for start in range(0, first.config.vocab_size, ROWS):
        stop = min(start + ROWS, first.config.vocab_size)
        _require_equal(EMBEDDING, first.embedding(start, stop), second.embedding(start, stop))
        _require_equal(HEAD, first.head(start, stop), second.head(start, stop))


def _require_equal(name: str, a: NDArray[np.float32], b: NDArray[np.float32]) -> None:
    same = np.array_equal(a, b) if a.ndim == 2 else np.allclose(a, b, rtol=0, atol=1e-7)
    if not same:
        raise NotRun(f"{name}: the F16 GGUF holds other weights than the reference")


def _tables(source: Checkpoint) -> Tensors:
    vocab = source.config.vocab_size
    tensors: Tensors = {
        EMBEDDING: source.embedding(0, vocab).astype(np.float16),
        FINAL_NORM: source.final_norm() - np.float32(1),
    }
    if not source.config.tied_head:
        tensors[HEAD] = source.head(0, vocab).astype(np.float16)
    return tensors


def _layer(source: Checkpoint, layer: int) -> Tensors:
    return {
        layer_tensor(layer, role): (
            weight - np.float32(1) if weight.ndim == 1 else weight.astype(np.float16)
        )
        for role, weight in source.layer(layer).items()
    }


def _write(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=1))
