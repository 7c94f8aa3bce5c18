"""The CPU backend against transformers and the float64 twin, and against itself bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from uq.errors import UsageError
from uq.formats.checkpoint import Checkpoint, open_checkpoint
from uq.formats.config import EMBEDDING, FINAL_NORM, HEAD, GemmaConfig, layer_tensor
from uq.formats.layouts import LAYOUTS
from uq.formats.manifest import TensorRecord, gain_name
from uq.formats.spec import QuantTensor, Spec
from uq.kernels.cpu.layout import WeightSource
from uq.kernels.cpu.session import BLOCK, CpuSession
from uq.kernels.cpu.twin import dequantized, hidden_states, logits
from uq.kernels.session import Sampling

Floats = NDArray[np.float32]
SPECS_OF_ROLES = {
    "self_attn.v_proj": Spec(8, 32),
    "self_attn.k_proj": Spec(6, 32),
    "mlp.down_proj": Spec(5, 32),
}
LENGTH = 3 * 32 + 5
LONG = BLOCK + 70  # more than one block of tokens, and more than the ring of a sliding layer
MODELS: dict[str, dict[str, Any]] = {
    "gemma multi-query": {"family": "gemma", "kv_heads": 1},
    "gemma multi-head, untied": {"family": "gemma", "kv_heads": 4, "tied": False},
    "gemma odd sizes": {"family": "gemma", "hidden": 96, "head_dim": 24, "ffn": 160, "vocab": 367},
    "gemma2": {
        "family": "gemma2",
        "config": {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 3.0},
    },
    "vaultgemma": {"family": "vaultgemma", "config": {"attn_logit_softcapping": 1.0}},
    "gemma3": {"family": "gemma3", "layers": 3, "head_dim": 64},
    "gemma3 many heads": {"family": "gemma3", "heads": 16, "kv_heads": 1, "window": 50},
    "gemma3 scaled positions": {
        "family": "gemma3",
        "config": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    },
}
models = pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)


class Source(WeightSource):
    """A checkpoint rounded to the nearest codes, as a bundle would offer it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        config = self.config = checkpoint.config
        self.tensors = {EMBEDDING: rounded(checkpoint.embedding(0, config.vocab_size), Spec(8, 32))}
        self.gains = {FINAL_NORM: checkpoint.final_norm()}
        if not config.tied_head:
            self.tensors[HEAD] = rounded(checkpoint.head(0, config.vocab_size), Spec(8, 32))
        for layer in range(config.num_layers):
            for role, weight in checkpoint.layer(layer).items():
                name = layer_tensor(layer, role)
                if role in config.linear_shapes(0):
                    self.tensors[name] = rounded(weight, SPECS_OF_ROLES.get(role, Spec(4, 32)))
                else:
                    self.gains[name] = weight

    def raw(self, name: str) -> tuple[NDArray[np.uint8], TensorRecord]:
        tensor = self.tensors[name]
        spec = tensor.spec
        record = TensorRecord(tensor.shape, spec.bits, spec.group, "igpu", "rtn", None, "")
        return LAYOUTS["igpu"].tile(tensor), record

    def array(self, name: str) -> Floats:
        return {gain_name(norm): gain for norm, gain in self.gains.items()}[name]

    def session(self, **options: Any) -> CpuSession:
        return CpuSession(self.config, self, **options)


def rounded(weight: Floats, spec: Spec) -> QuantTensor:
    groups = weight.reshape(len(weight), -1, spec.group)
    scales = (np.abs(groups).max(axis=2) / spec.qmax).astype(np.float16)
    codes = np.rint(groups / scales[:, :, None].astype(np.float32)).clip(spec.qmin, spec.qmax)
    return QuantTensor(codes.astype(np.int8).reshape(weight.shape), scales, spec)


@pytest.fixture(scope="module")
def gemma3(tiny_checkpoint: Callable[..., Path]) -> Source:
    return Source(open_checkpoint(tiny_checkpoint(layers=3, vocab=700)))


def random_tokens(config: GemmaConfig, *shape: int) -> NDArray[np.int32]:
    return np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)


def last_logits(session: CpuSession, tokens: NDArray[np.int32], *cuts: int) -> Floats:
    """Logits behind the tokens, given to an emptied session in pieces."""
    session.reset()
    for piece in np.split(tokens, cuts):
        session.prefill(piece.tolist())
    assert session.position == tokens.size
    return session.next_logits


@models
def test_logits_of_transformers(
    tiny_checkpoint: Callable[..., Path], options: dict[str, Any]
) -> None:
    folder = tiny_checkpoint(**options)
    source = Source(open_checkpoint(folder))
    session = source.session()
    tokens = random_tokens(source.config, 2, LENGTH)
    expected = transformers_logits(folder, source.tensors, tokens)
    actual = session.logits(session.score(tokens).reshape(2 * LENGTH, -1), 0, expected.shape[-1])
    error = np.abs(actual - expected.reshape(actual.shape))
    assert error.max() <= 5e-4 * np.abs(expected).max()


@models
def test_hidden_states_of_the_twin(
    tiny_checkpoint: Callable[..., Path], options: dict[str, Any]
) -> None:
    source = Source(open_checkpoint(tiny_checkpoint(**options)))
    weights = dequantized(source.tensors, source.gains)
    tokens = random_tokens(source.config, LONG)
    session = source.session()
    actual = session.score(tokens[None])[0]
    expected = hidden_states(source.config, weights, tokens)
    assert np.linalg.norm(actual - expected) <= 1e-4 * np.linalg.norm(expected)
    last = logits(source.config, weights, expected[-1:])
    vocab = session.logits(actual[-1:], 0, source.config.vocab_size)
    np.testing.assert_allclose(vocab, last, atol=5e-4 * np.abs(last).max())


@models
def test_prefill_and_decoding_have_the_bits_of_scoring(
    tiny_checkpoint: Callable[..., Path], options: dict[str, Any]
) -> None:
    source = Source(open_checkpoint(tiny_checkpoint(**options)))
    session = source.session()
    tokens = random_tokens(source.config, LONG)
    hidden = session.score(tokens[None])[0]
    expected = session.logits(hidden[-1:], 0, source.config.vocab_size)[0]
    np.testing.assert_array_equal(last_logits(session, tokens), expected)
    pieces = (1, 4, 40, 60, 300, *range(LONG - 20, LONG))
    np.testing.assert_array_equal(last_logits(session, tokens, *pieces), expected)


def test_scoring_leaves_the_cache_alone(gemma3: Source) -> None:
    session = gemma3.session()
    tokens = random_tokens(gemma3.config, 40)
    expected = last_logits(session, tokens)
    last_logits(session, tokens[:30])
    session.score(random_tokens(gemma3.config, 2, 50))
    session.prefill(tokens[30:].tolist())
    np.testing.assert_array_equal(session.next_logits, expected)


def test_scoring_is_not_bound_by_the_context(gemma3: Source) -> None:
    tokens = random_tokens(gemma3.config, 1, 300)
    expected = gemma3.session().score(tokens)
    np.testing.assert_array_equal(gemma3.session(max_context=8).score(tokens), expected)


def test_threads_change_no_bit(gemma3: Source) -> None:
    tokens = random_tokens(gemma3.config, LENGTH)
    one, two = (gemma3.session(threads=count) for count in (1, 2))
    np.testing.assert_array_equal(one.score(tokens[None]), two.score(tokens[None]))
    pieces = (30, *range(90, LENGTH))
    expected = last_logits(one, tokens, *pieces)
    np.testing.assert_array_equal(last_logits(two, tokens, *pieces), expected)


def test_a_used_session_is_as_good_as_new(gemma3: Source) -> None:
    session = gemma3.session(max_context=64)
    tokens = random_tokens(gemma3.config, 64)
    expected = last_logits(session, tokens[:10])
    for layer in range(gemma3.config.num_layers):
        session.cache.keys[layer].fill(np.nan)
        session.cache.values[layer].fill(np.nan)
    np.testing.assert_array_equal(last_logits(session, tokens[:10]), expected)


def test_logits_by_blocks_of_the_vocabulary(gemma3: Source) -> None:
    session = gemma3.session()
    hidden = session.score(random_tokens(gemma3.config, 1, 7))[0]
    whole = session.logits(hidden, 0, 700)
    parts = [session.logits(hidden, *span) for span in ((0, 100), (100, 333), (333, 700))]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_greedy_decoding_takes_the_likeliest_token(gemma3: Source) -> None:
    session = gemma3.session()
    tokens = random_tokens(gemma3.config, 12).tolist()
    session.prefill(tokens)
    generated = list(session.decode(20, Sampling()))
    hidden = session.score(np.array([tokens + generated], np.int32))[0]
    expected = session.logits(hidden[11:-1], 0, 700).argmax(axis=1)
    assert generated == expected.tolist()


def test_decoding_stops_where_the_context_ends(gemma3: Source) -> None:
    session = gemma3.session(max_context=20)
    session.prefill(list(range(15)))
    assert len(list(session.decode(50, Sampling()))) == 5
    with pytest.raises(UsageError, match="1 tokens do not fit behind 20 in a context of 20"):
        session.prefill([3])


def test_bytes_of_a_token(gemma3: Source) -> None:
    sizes = {name: t.spec.nbytes(*t.shape) for name, t in gemma3.tensors.items()}
    row = sizes[EMBEDDING] // 700
    assert gemma3.session().bytes_per_token == sum(sizes.values()) + row


def test_the_device_names_its_compiler(gemma3: Source) -> None:
    device = gemma3.session(threads=1).device
    assert device.backend == "cpu" and device.name
    assert device.driver.startswith("numba ") and "LLVM" in device.driver
    assert device.features[0] == "1 thread"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "0 threads"),
        ({"threads": 10_000}, "10000 threads"),
        ({"max_context": 0}, "context of 0"),
    ],
)
def test_impossible_options_are_refused(
    gemma3: Source, options: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        gemma3.session(**options)


@pytest.mark.parametrize(
    ("tokens", "message"), [([], "no tokens"), ([700], "token 700"), ([5, -1], "token -1")]
)
def test_tokens_that_do_not_exist_are_refused(
    gemma3: Source, tokens: list[int], message: str
) -> None:
    session = gemma3.session()
    with pytest.raises(UsageError, match=message):
        session.prefill(tokens)
    assert session.position == 0


def test_decoding_needs_a_prompt(gemma3: Source) -> None:
    with pytest.raises(UsageError, match="prefill"):
        next(gemma3.session().decode(1, Sampling()))


def transformers_logits(
    folder: Path, tensors: dict[str, QuantTensor], tokens: NDArray[np.int32]
) -> Floats:
    """Logits of the checkpoint with dequantized weights, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    weights = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, tensor in tensors.items():
            weights[name].copy_(torch.from_numpy(tensor.dequantize()))
        out: Floats = model(torch.from_numpy(tokens).long()).logits.numpy()
    return out
