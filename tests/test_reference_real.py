"""The float32 reference on the real Gemma 3 270M, against transformers and llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from uq.formats.checkpoint import Checkpoint, open_checkpoint
from uq.formats.checkpoint.gguf_file import read_gguf
from uq.formats.checkpoint.tensors import read_rows
from uq.formats.config import EMBEDDING, FINAL_NORM, layer_tensor
from uq.kernels.reference import ReferenceSession
from uq.progress import SilentProgress
from uq.validate.scoring import compare, final_states
from uq.validate.text import DEFAULT_TEXT as TEXT
from uq.validate.text import chunks, targets

# The running estimates that llama.cpp's perplexity tool prints for float16 weights:
#   llama-quantize --allow-requantize gemma-3-270m-q4_k_m.gguf f16.gguf f16
#   llama-perplexity -m f16.gguf -f validate/evaluation.txt -c 512 --chunks 16
LLAMA_CPP_PERPLEXITY = (43.1369, 39.4129)

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def session(real_gguf: Path) -> ReferenceSession:
    return ReferenceSession(open_checkpoint(real_gguf), resident=True)


@pytest.fixture(scope="module")
def windows(real_gguf: Path) -> NDArray[np.int32]:
    """(2, 512)"""
    return chunks(open_checkpoint(real_gguf).tokenizer(), TEXT.read_text(), 512, 2)


def test_hidden_states_and_logits_of_transformers(
    real_gguf: Path, session: ReferenceSession, windows: NDArray[np.int32]
) -> None:
    import torch

    tokens = windows[:1, :96]
    with torch.no_grad():
        model = transformers_model(open_checkpoint(real_gguf))
        expected = model.model(torch.from_numpy(tokens).long()).last_hidden_state.numpy()
        logits = model.lm_head(torch.from_numpy(expected[0])).numpy()
    hidden = session.score(tokens)
    assert np.abs(hidden - expected).max() <= 1e-4 * np.abs(expected).max()
    vocab = session.config.vocab_size
    assert np.abs(session.logits(hidden[0], 0, vocab) - logits).max() <= 1e-4 * np.abs(logits).max()


def test_log_probabilities_of_llama_cpp(
    session: ReferenceSession,
    windows: NDArray[np.int32],
    llama_cpp: Callable[[list[int]], dict[int, float]],
) -> None:
    """Its KV cache and its products are float16: a few hundredths at a short, sharp prefix."""
    hidden = session.score(windows[:1])[0]
    for length in (5, 60, 200, 512):
        expected = llama_cpp(windows[0, :length].tolist())
        logits = session.logits(hidden[length - 1 : length], 0, session.config.vocab_size)[0]
        wide = logits.astype(np.float64)
        actual = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
        difference = actual[list(expected)] - list(expected.values())
        assert np.abs(difference).max() < 0.1
        assert np.sqrt(np.mean(difference**2)) < 0.02


def test_perplexity_of_llama_cpp(session: ReferenceSession, windows: NDArray[np.int32]) -> None:
    quiet = SilentProgress()
    states = final_states(session, windows, quiet, "reference")
    nll = compare(session, states, session, states, targets(windows), quiet).nll
    by_window = nll.reshape(len(windows), -1).mean(axis=1)
    running = np.exp(by_window.cumsum() / np.arange(1, len(windows) + 1))
    np.testing.assert_allclose(running, LLAMA_CPP_PERPLEXITY, rtol=0.002)


@pytest.fixture(scope="module")
def llama_cpp(real_gguf: Path) -> Iterator[Callable[[list[int]], dict[int, float]]]:
    """Log-probabilities of the 500 likeliest next tokens as llama.cpp computes them.

    With the quantized file it would quantize the activations too, so it gets float16 weights.
    """
    import xllamacpp

    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # half a gigabyte: not kept
        path = Path(folder) / "f16.gguf"
        write_f16_gguf(real_gguf, path)
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup = 1024, 1, False
        server = xllamacpp.Server(params)

    def log_probabilities(prompt: list[int]) -> dict[int, float]:
        request = {"prompt": prompt, "n_predict": 1, "n_probs": 500, "temperature": 0.0}
        answer: dict[str, Any] = server.handle_completions(request)
        entries = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return {entry["id"]: entry["logprob"] for entry in entries}

    yield log_probabilities


def write_f16_gguf(source: Path, target: Path) -> None:
    """The same model with float16 matrices and float32 vectors."""
    from gguf import GGUFWriter

    header = read_gguf(source)
    writer = GGUFWriter(target, header.metadata.pop("general.architecture"))
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for name, value in header.metadata.items():
        plain = value.tolist() if isinstance(value, np.ndarray) else value
        add[type(plain)](name, plain)
    for name, info in header.tensors.items():
        values = read_rows(info, 0, info.shape[0])
        writer.add_tensor(name, values.astype(np.float16 if values.ndim > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def transformers_model(checkpoint: Checkpoint) -> Any:
    """Gemma3ForCausalLM in float32 with the checkpoint's weights; its norms keep gain - 1."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = checkpoint.config
    weights = {
        EMBEDDING: checkpoint.embedding(0, config.vocab_size),
        FINAL_NORM: checkpoint.final_norm() - 1,
    }
    for index in range(config.num_layers):
        for role, values in checkpoint.layer(index).items():
            stored = values - 1 if values.ndim == 1 else values
            weights[layer_tensor(index, role)] = stored
    settings = Gemma3TextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        query_pre_attn_scalar=256,
        sliding_window=512,
        max_position_embeddings=32768,
        attn_implementation="eager",
    )
    state = {name: torch.from_numpy(values) for name, values in weights.items()}
    model, found = Gemma3ForCausalLM.from_pretrained(
        None, config=settings, state_dict=state, dtype=torch.float32, output_loading_info=True
    )
    assert not any(found.values()), found
    return model.eval()
