"""Models with their attention in the NPU's emulator, beside its twin, softmax and the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.npu_twin import by_softmax, by_twin, starting
from tests.test_cpu_session import Source
from tests.test_npu_attention import gemma_like, nrmse
from uq.formats.checkpoint import Checkpoint, open_checkpoint
from uq.formats.config import GemmaConfig
from uq.kernels.cpu.session import CpuSession
from uq.kernels.npu.hybrid import placement
from uq.kernels.npu.hybrid.attention import NpuAttention, Start, Waiting
from uq.kernels.npu.hybrid.designs import EmulatedDesigns
from uq.kernels.npu.hybrid.placement import obstacle
from uq.kernels.npu.hybrid.programs import Programs
from uq.kernels.npu.hybrid.reach import STEP, Reach
from uq.kernels.npu.hybrid.session import NpuSession
from uq.kernels.npu.hybrid.store import Store
from uq.kernels.npu.kernels.attention import twin
from uq.kernels.npu.kernels.attention.attend import Inputs
from uq.kernels.npu.kernels.attention.pack import pack_keys
from uq.kernels.npu.kernels.attention.plan import Plan, plan
from uq.kernels.npu.kernels.attention.variant import Form, Variant
from uq.kernels.npu.runtime.emulated import emulated_npu
from uq.kernels.session import Device, Sampling

Array = NDArray[np.float32]
GREEDY = Sampling()
NPU = Device("npu-emulator", "emulated", "")


def emulated(device: str) -> Start:
    npu, emulator = emulated_npu(device)
    return Programs(npu, EmulatedDesigns(emulator)).start


def session(source: Source, device: str, start: Start, bits: int = 8) -> NpuSession:
    config = source.config
    obstacles = [obstacle(config, i, device, bits, 400) for i in range(config.num_layers)]
    attention = NpuAttention(config, device, start, bits)
    return NpuSession(config, source, attention, obstacles, NPU, max_context=400)


def text(config: GemmaConfig, *shape: int) -> NDArray[np.int32]:
    return np.random.default_rng(5).integers(0, config.vocab_size, shape, dtype=np.int32)


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Callable[..., Path]) -> Source:
    """Two layers with a window, and a full one."""
    folder = tiny_checkpoint(layers=3, pattern=3, head_dim=128, window=40, spread=4.0)
    return Source(open_checkpoint(folder))


@pytest.mark.parametrize(("device", "bits"), [("npu1", 8), ("npu2", 4)])
def test_the_emulator_gives_the_bits_of_the_twin(tiny: Source, device: str, bits: int) -> None:
    """Prefill in parts, with a window and without, a sequence after another one, decoding."""
    tokens = text(tiny.config, 2, 200)
    emulator = session(tiny, device, emulated(device), bits)
    twin = session(tiny, device, starting(by_twin), bits)
    np.testing.assert_array_equal(emulator.score(tokens), twin.score(tokens))
    for one in (emulator, twin):
        one.prefill(tokens[0, :100].tolist())
    assert list(emulator.decode(3, GREEDY)) == list(twin.decode(3, GREEDY))
    np.testing.assert_array_equal(emulator.next_logits, twin.next_logits)


# Exponents are multiples of 1/256, so a weight is off by 0.14 % at most, besides its 14 bits; rows
# are bfloat16 (0.2 %) in both. Three layers add up, and where that moves keys of a later layer over
# the edge of a 4-bit code, they differ by a whole step.
@pytest.mark.parametrize(("bits", "bound"), [(8, 0.005), (4, 0.02)])
def test_hidden_states_of_softmax_over_the_same_codes(
    tiny: Source, bits: int, bound: float
) -> None:
    tokens = text(tiny.config, 1, 300)
    ours = session(tiny, "npu1", starting(by_twin), bits).score(tokens)
    exact = session(tiny, "npu1", starting(by_softmax), bits).score(tokens)
    assert nrmse(ours, exact) < bound


def test_hidden_states_of_the_cpu(tiny: Source) -> None:
    tokens = text(tiny.config, 1, 300)
    exact = CpuSession(tiny.config, tiny).score(tokens)
    assert nrmse(session(tiny, "npu1", starting(by_twin)).score(tokens), exact) < 0.02


@pytest.mark.parametrize("device", ["npu1", "npu2"])
@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize(
    ("start", "length", "window"),
    [
        (0, 1, None),
        (0, 30, 7),
        (127, 1, None),
        (128, 1, 64),
        (300, 130, None),
        (301, 40, 50),
        (500, 1, 50),
        (500, 128, 129),
    ],
)
def test_padded_plans_are_attention(
    device: str, head_dim: int, start: int, length: int, window: int | None
) -> None:
    """Through store, plan and twin, beside softmax in float64 on keys and values as stored."""
    form: Form = "decode" if length == 1 else "prefill"
    q, k, v = gemma_like(2, plan(Variant(device, head_dim, 8, form), 4, 2, length, start=start))
    config = tiny_config(head_dim)
    attention = NpuAttention(config, device, starting(by_twin), 8)
    store = attention.store(start + length)
    inputs = Inputs.quantized(q, k, v, 8, 1.0)
    store.frame = inputs.frame
    store.append(0, k[:start], v[:start])
    rows = attention.attend(store, start, window, q, k[start:], v[start:])
    if start == 0:  # the frame of the first part, which is not padded
        inputs = replace(inputs, frame=store.frame)
    exact = twin.softmax_attention(
        q, *inputs.stored(), factor=config.attention_scale, start=start, window=window
    )
    assert nrmse(rows, exact) < 0.01


def tiny_config(head_dim: int) -> GemmaConfig:
    @dataclass(frozen=True)
    class Heads:
        head_dim: int
        num_heads: int = 4
        num_kv_heads: int = 2
        attn_softcap: float | None = None

        @property
        def attention_scale(self) -> float:
            return 1 / float(np.sqrt(self.head_dim))

    return Heads(head_dim)  # type: ignore[return-value]


@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("device", ["npu1", "npu2"])
def test_a_store_filled_token_by_token_has_the_packed_blocks(
    device: str, bits: int, head_dim: int
) -> None:
    made = plan(Variant(device, head_dim, bits), 2, 2, 90)
    q, k, v = gemma_like(3, made)
    inputs = Inputs.quantized(q, k, v, bits, 1.0)
    store = Store(made.variant, 2, 90)
    store.frame = inputs.frame
    store.append(0, k[:60], v[:60])
    store.append(40, 1000 * k[40:50], 1000 * v[40:50])  # of another text, and longer
    for token in range(40, 90):
        store.append(token, k[token : token + 1], v[token : token + 1])
    blocks, units = store.blocks(0, made.stored)
    expected = pack_keys(made, inputs.keys, inputs.values)
    assert blocks.tobytes() == expected[0].tobytes()
    np.testing.assert_array_equal(units, expected[1])


def test_a_text_needs_few_plans() -> None:
    """Full attention: one more for each STEP keys. A window: no more than it has STEPs."""
    variant = Variant("npu2", 256, 8, "decode")
    full = {Reach.of(variant, 4, 1, start, 1, None).plan for start in range(2 * STEP)}
    sliding = {Reach.of(variant, 4, 1, start, 1, 200).plan for start in range(2000)}
    assert (len(full), len(sliding)) == (2, 2)


@dataclass(frozen=True)
class Logged:
    """A run that writes down when it is awaited."""

    number: int
    running: Waiting
    log: list[str]

    def wait(self, timeout: int) -> None:
        self.log.append(f"wait {self.number}")
        self.running.wait(timeout)


def test_while_a_part_runs_the_next_is_prepared() -> None:
    """Two sets of buffers. The double refuses whoever touches those of a run under way."""
    npu, emulator = emulated_npu("npu1")
    programs = Programs(npu, EmulatedDesigns(emulator))
    log: list[str] = []

    def start(made: Plan, arrays: Sequence[NDArray[Any]]) -> Logged:
        number = sum(line.startswith("start") for line in log)
        log.append(f"start {number}")
        return Logged(number, programs.start(made, arrays), log)

    attention = NpuAttention(tiny_config(128), "npu1", start, 8)
    store = attention.store(3 * STEP)
    shape = plan(Variant("npu1", 128, 8), 4, 2, 3 * STEP)
    attention.attend(store, 0, None, *gemma_like(1, shape))
    assert ", ".join(log) == "start 0, start 1, wait 0, start 2, wait 1, wait 2"
    made = npu.pool.made
    attention.attend(store, 0, None, *gemma_like(2, shape))
    assert npu.pool.made == made  # all came back


def test_scores_are_capped_as_on_the_cpu(tiny_checkpoint: Callable[..., Path]) -> None:
    capped = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 30.0}
    folder = tiny_checkpoint(family="gemma2", head_dim=256, heads=2, kv_heads=1, config=capped)
    source = Source(open_checkpoint(folder))
    tokens = text(source.config, 1, 60)
    ours = session(source, "npu2", starting(by_twin)).score(tokens)
    assert nrmse(ours, CpuSession(source.config, source).score(tokens)) < 0.02


def test_layers_without_a_kernel_run_on_the_cpu(
    tiny: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "LONGEST", 64)
    mixed = session(tiny, "npu1", starting(by_twin))
    assert [str(place) for place in mixed.device.attention] == [
        "attention of layers 0-1 on npu-emulator",
        "attention of layer 2 on cpu: a query may see 400 keys; attention is checked up to 64",
    ]
    tokens = text(tiny.config, 1, 300)
    exact = CpuSession(tiny.config, tiny).score(tokens)
    assert nrmse(mixed.score(tokens), exact) < 0.02


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 512}, "no attention kernel for head size 512; there are 128, 256"),
        ({"head_dim": 256}, None),
    ],
)
def test_what_has_no_kernel(tiny: Source, change: dict[str, float], message: str | None) -> None:
    config = replace(tiny.config, **change)  # type: ignore[arg-type]
    assert obstacle(config, 0, "npu1", 8, 100) == message


class FirstLayer:
    """The first layer of a checkpoint, with the rows of the embedding that a text needs."""

    def __init__(self, checkpoint: Checkpoint, ids: NDArray[np.int32]) -> None:
        config = checkpoint.config
        self.config = replace(
            config, num_layers=1, layer_types=config.layer_types[:1], vocab_size=len(ids)
        )
        rows = [checkpoint.embedding(int(token), int(token) + 1) for token in ids]
        self._rows = np.concatenate(rows)
        self.layer = checkpoint.layer
        self.final_norm = checkpoint.final_norm

    def embedding(self, start: int, stop: int) -> Array:
        return self._rows[start:stop]


@pytest.mark.real
def test_one_layer_of_the_real_model(real_gguf: Path) -> None:
    """The same bits as the twin, close to the CPU's floats."""
    checkpoint = open_checkpoint(real_gguf)
    sample = Path(__file__).parents[1] / "benchmarks/texts/english.txt"
    ids = checkpoint.tokenizer().encode(sample.read_text(encoding="utf-8")[:2000])[:300]
    known, tokens = np.unique(np.array(ids, np.int32), return_inverse=True)
    source = Source(FirstLayer(checkpoint, known))  # type: ignore[arg-type]
    given = tokens.astype(np.int32)[None]
    ours = session(source, "npu2", emulated("npu2")).score(given)
    np.testing.assert_array_equal(ours, session(source, "npu2", starting(by_twin)).score(given))
    assert nrmse(ours, CpuSession(source.config, source).score(given)) < 0.02
