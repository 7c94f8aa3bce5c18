"""Whole models on Vulkan against the CPU session and the float32 reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.test_cpu_session import MODELS, Source, random_tokens
from tests.vulkan_lab import give_matrices, no_messages  # noqa: F401
from uq.errors import DeviceError, UsageError
from uq.formats.bundle import open_bundle
from uq.formats.checkpoint import Checkpoint, open_checkpoint
from uq.formats.config import EMBEDDING
from uq.kernels.backends import open_session
from uq.kernels.numerics import ACTIVATIONS, FLOAT, KV, Numerics
from uq.kernels.reference import ReferenceSession
from uq.kernels.session import Sampling
from uq.kernels.vulkan import device, runs
from uq.kernels.vulkan.api import binding, listed
from uq.kernels.vulkan.cache import turn_table
from uq.kernels.vulkan.device import PhysicalGpu, choose
from uq.kernels.vulkan.engine import Engine
from uq.kernels.vulkan.mailbox import Run, Writer
from uq.kernels.vulkan.runs import Part, Runs
from uq.kernels.vulkan.session import VulkanSession
from uq.kernels.vulkan.sources import BundleSource, CheckpointSource
from uq.kernels.vulkan.weights import padded_rows

GREEDY = Sampling()
LENGTH = 37  # more than two windows of 16


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture(scope="module")
def gemma3(tiny_checkpoint: Callable[..., Path]) -> Source:
    return Source(open_checkpoint(tiny_checkpoint(layers=3, vocab=700)))


@pytest.fixture(scope="module")
def session(gemma3: Source, cache: Path) -> Iterator[VulkanSession]:
    """Shared: each test begins with `reset`."""
    session = on_vulkan(gemma3, cache, max_context=64)
    yield session
    session.close()


def on_vulkan(source: Source, cache: Path, **options: Any) -> VulkanSession:
    return VulkanSession(
        source.config, BundleSource(source), choose(), pipeline_cache=cache, **options
    )


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_a_model_answers_like_on_the_cpu(
    tiny_checkpoint: Callable[..., Path], cache: Path, options: dict[str, Any]
) -> None:
    """float16 keys and values are the difference; text is the same until a tie."""
    source = Source(open_checkpoint(tiny_checkpoint(**options)))
    vulkan, cpu = on_vulkan(source, cache), source.session()
    prompt = random_tokens(source.config, LENGTH).tolist()
    for session in (vulkan, cpu):
        session.prefill(prompt)
    expected = cpu.next_logits
    assert np.abs(vulkan.next_logits - expected).max() <= 2e-3 * np.abs(expected).max()
    assert list(vulkan.decode(12, GREEDY)) == list(cpu.decode(12, GREEDY))
    assert vulkan.position == cpu.position == LENGTH + 12
    vulkan.close()


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32"])
def test_floating_point_weights_answer_like_the_reference(
    tiny_checkpoint: Callable[..., Path], cache: Path, kind: str
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(dtype="bf16" if kind == "bf16" else "f16"))
    source, config = CheckpointSource(checkpoint, kind), checkpoint.config
    session = VulkanSession(config, source, choose(), pipeline_cache=cache, max_context=64)
    tokens = random_tokens(config, 2, 4)
    actual, expected = session.score(tokens), ReferenceSession(checkpoint).score(tokens)
    assert np.linalg.norm(actual - expected) <= 1e-3 * np.linalg.norm(expected)
    session.close()


def test_scoring_leaves_the_sequence_alone(session: VulkanSession, gemma3: Source) -> None:
    session.reset()
    prompt = random_tokens(gemma3.config, 20)
    session.prefill(prompt.tolist())
    before = session.next_logits
    hidden = session.score(random_tokens(gemma3.config, 2, 70))
    session.logits(hidden[0], 5, 400)
    np.testing.assert_array_equal(session.next_logits, before)


def test_scoring_and_prefill_agree(session: VulkanSession, gemma3: Source) -> None:
    session.reset()
    tokens = random_tokens(gemma3.config, 1, LENGTH)
    hidden = session.score(tokens)[0]
    scored = session.logits(hidden, 0, 700)
    for length in (1, 2, 5, 17, LENGTH):
        session.reset()
        session.prefill(tokens[0, :length].tolist())
        error = np.abs(session.next_logits - scored[length - 1])
        assert error.max() <= 1e-3 * np.abs(scored).max()


def test_the_making_of_kernels_does_not_count_as_work(
    gemma3: Source, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes grow, however long the first recordings take."""
    now, recorded = [0.0], Runs._recorded

    def slowly(self: Runs, part: Part) -> Any:
        now[0] += 60
        return recorded(self, part)

    monkeypatch.setattr(Runs, "_recorded", slowly)
    monkeypatch.setattr(runs, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    session = on_vulkan(gemma3, cache, max_context=80)
    session.prefill(random_tokens(gemma3.config, 64).tolist())
    list(session.decode(1, GREEDY))
    assert (session._pass.size, session._steps.size) == (128, 2)
    session.close()


def test_logits_by_blocks_of_the_vocabulary(session: VulkanSession, gemma3: Source) -> None:
    hidden = session.score(random_tokens(gemma3.config, 1, 3))[0]
    whole = session.logits(hidden, 0, 700)
    parts = [session.logits(hidden, *span) for span in ((0, 100), (100, 333), (333, 700))]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_tokens_that_nobody_took_are_forgotten(session: VulkanSession, gemma3: Source) -> None:
    prompt = random_tokens(gemma3.config, 12).tolist()
    texts = []
    for cuts in ((40,), (1, 3, 13, 23)):
        session.reset()
        session.prefill(prompt)
        text: list[int] = []
        for cut in cuts:
            tokens = session.decode(40, GREEDY)
            text += islice(tokens, cut)
            tokens.close()  # type: ignore[attr-defined]
            assert session.position == 12 + len(text)
        texts.append(text)
    assert texts[0] == texts[1]


def test_sampling_draws_what_the_cpu_draws(session: VulkanSession, gemma3: Source) -> None:
    sampling = Sampling(temperature=0.8, top_k=40, top_p=0.95, seed=7)
    cpu = gemma3.session()
    prompt = random_tokens(gemma3.config, 9).tolist()
    session.reset()
    for each in (session, cpu):
        each.prefill(prompt)
    assert list(session.decode(12, sampling)) == list(cpu.decode(12, sampling))


def test_decoding_stops_where_the_context_ends(session: VulkanSession) -> None:
    session.reset()
    session.prefill(list(range(59)))
    assert len(list(session.decode(50, GREEDY))) == 5
    with pytest.raises(UsageError, match="1 tokens do not fit behind 64 in a context of 64"):
        session.prefill([3])


@pytest.mark.parametrize(
    ("tokens", "message"), [([], "no tokens"), ([700], "token 700"), ([5, -1], "token -1")]
)
def test_tokens_that_do_not_exist_are_refused(
    session: VulkanSession, tokens: list[int], message: str
) -> None:
    session.reset()
    with pytest.raises(UsageError, match=message):
        session.prefill(tokens)
    assert session.position == 0


def test_decoding_needs_a_prompt(session: VulkanSession) -> None:
    session.reset()
    with pytest.raises(UsageError, match="prefill"):
        next(session.decode(1, GREEDY))


def test_bytes_of_a_token(session: VulkanSession, gemma3: Source) -> None:
    sizes = {name: t.spec.nbytes(*t.shape) for name, t in gemma3.tensors.items()}
    assert session.bytes_per_token == sum(sizes.values()) + sizes[EMBEDDING] // 700


def test_the_device_names_its_features(session: VulkanSession) -> None:
    device = session.device
    assert device.backend == "vulkan" and device.name and device.driver
    assert "fp32" in device.features


def test_long_prompts_move_around_the_ring(gemma3: Source, cache: Path) -> None:
    """Windows of 16 lie in rings of 64 slots."""
    vulkan, cpu = on_vulkan(gemma3, cache, max_context=128, widest=32), gemma3.session()
    prompt = random_tokens(gemma3.config, 110).tolist()
    for session in (vulkan, cpu):
        session.prefill(prompt)
    assert list(vulkan.decode(12, GREEDY)) == list(cpu.decode(12, GREEDY))
    vulkan.close()


def test_matrix_instructions_answer_like_the_cpu(
    gemma3: Source, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their modules with plain arithmetic in their place, where the device has none."""
    give_matrices(monkeypatch)
    vulkan, cpu = on_vulkan(gemma3, cache, max_context=64), gemma3.session()
    prompt = random_tokens(gemma3.config, LENGTH).tolist()
    for session in (vulkan, cpu):
        session.prefill(prompt)
    error = np.abs(vulkan.next_logits - cpu.next_logits).max()
    assert 0 < error <= 2e-2 * np.abs(cpu.next_logits).max()  # float16 weights and activations
    vulkan.close()


def test_a_bundle_of_another_layout_is_permuted(
    tiny_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(tiny_bundle(layout="row"))
    session = open_session(bundle, "vulkan", max_context=32)
    cpu = open_session(bundle, "cpu", max_context=32)
    for each in (session, cpu):
        each.prefill([2, 9, 33])
    assert list(session.decode(8, GREEDY)) == list(cpu.decode(8, GREEDY))


def test_sizes_that_the_kernels_cannot_cut_are_refused(
    tiny_checkpoint: Callable[..., Path], cache: Path
) -> None:
    checkpoint: Checkpoint = open_checkpoint(tiny_checkpoint(head_dim=40, heads=1, kv_heads=1))
    source = CheckpointSource(checkpoint, "f32")
    with pytest.raises(DeviceError, match="query size that divides by 32, not 40; use --device"):
        VulkanSession(checkpoint.config, source, choose(), pipeline_cache=cache)


def test_the_angle_of_a_position_is_the_sum_of_two_rows(gemma3: Source) -> None:
    table = turn_table(gemma3.config, 0, 5000).astype(np.float64)
    low, high = table[4999 % 256], table[256 + 4999 // 256]
    turn = (low[:, 0] + 1j * low[:, 1]) * (high[:, 0] + 1j * high[:, 1])
    half = gemma3.config.head_dim // 2
    angle = 4999 * gemma3.config.theta(0) ** (-np.arange(half) / half)
    np.testing.assert_allclose(turn, np.exp(1j * angle), atol=2e-7)


def test_a_driver_of_vulkan_12_gives_the_same_bits(
    gemma3: Source, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validation layer holds the engine to what the instance asked for."""
    expected = logits_of(gemma3, cache, choose())
    instance = device.make_instance((1, 2))
    monkeypatch.setattr(device, "vulkan_instance", lambda: instance)
    old = device.described(instance)
    (gpu,) = (replace(gpu, version=(1, 2)) for gpu in old if gpu.name == choose().name)
    assert gpu.missing() is None
    np.testing.assert_array_equal(logits_of(gemma3, cache, gpu), expected)


def logits_of(source: Source, cache: Path, gpu: PhysicalGpu) -> NDArray[np.float32]:
    """Behind a text of its own."""
    model = source.config, BundleSource(source), gpu
    session = VulkanSession(*model, pipeline_cache=cache, max_context=64)
    session.prefill(random_tokens(source.config, LENGTH).tolist())
    list(session.decode(2, GREEDY))
    found = session.next_logits
    session.close()
    return found


@pytest.mark.mesa  # whose package brings it
def test_the_validation_layer_is_there() -> None:
    layers = listed("EnumerateInstanceLayerProperties", "VkLayerProperties")
    names = [binding().ffi.string(layer.layerName) for layer in layers]
    assert b"VK_LAYER_KHRONOS_validation" in names


@pytest.mark.parametrize(
    ("name", "numerics"),
    [("gemma2", Numerics(ACTIVATIONS["int8"], KV["int8"])), ("gemma3", FLOAT)],
    ids=["gemma2 int8", "gemma3"],
)
def test_a_token_has_the_same_bits_in_any_company(
    tiny_checkpoint: Callable[..., Path], cache: Path, name: str, numerics: Numerics
) -> None:
    """Alone in a decode step, and in passes of 4 and of 16 tokens."""
    source = Source(open_checkpoint(tiny_checkpoint(**MODELS[name])))
    model = source.config, BundleSource(source), choose()
    engine = Engine(*model, cache, 64, widest=32, numerics=numerics)
    vocab = source.config.vocab_size
    prompt = random_tokens(source.config, 20).tolist()
    alone = engine.runs(64)
    alone.tokens([Run(0, 0, prompt)])
    text, logits, token = [], [], 7
    for position in range(20, 36):
        (_,), (following,) = alone.steps(1, [Writer(0, position, token)], ())
        text.append(token)
        logits.append(engine.read_floats(engine.work.logits, 1, vocab)[0])
        token = following
    for width in (4, 16):
        together = engine.runs(64)
        together.tokens([Run(0, 0, prompt)])
        for start in range(0, 16, width):
            choices = together.choices(Run(0, 20 + start, text[start : start + width]))
            rows = engine.read_floats(engine.work.logits, width, padded_rows(vocab))[:, :vocab]
            np.testing.assert_array_equal(rows, logits[start : start + width])
            assert choices == rows.argmax(axis=1).tolist()
    engine.close()


@pytest.mark.parametrize("prompt", [[5, 6, 7], [5, 6, 7, 8] * 6])
def test_guessed_tokens_do_not_change_a_greedy_text(
    gemma3: Source, cache: Path, monkeypatch: pytest.MonkeyPatch, prompt: list[int]
) -> None:
    """Taken in pieces, so that some come in vain; around the ring of the sliding layers."""
    plain, guessing = (
        on_vulkan(gemma3, cache, max_context=128, widest=32, speculate=speculate)
        for speculate in (False, True)
    )
    passes: list[int] = []
    choices = Runs.choices

    def counted(self: Runs, run: Run) -> list[int]:
        passes.append(len(run.tokens))
        return choices(self, run)

    monkeypatch.setattr(Runs, "choices", counted)
    for session in (plain, guessing):
        session.prefill(prompt)
    expected = list(plain.decode(50, GREEDY))
    found: list[int] = []
    for cut in (1, 2, 3, 14, 30):
        tokens = guessing.decode(50 - len(found), GREEDY)
        found += islice(tokens, cut)
        tokens.close()  # type: ignore[attr-defined]
        assert guessing.position == len(prompt) + len(found)
    assert found == expected
    np.testing.assert_array_equal(guessing.next_logits, plain.next_logits)
    assert 0 < len(passes) < 25  # fewer passes than tokens
    for session in (plain, guessing):
        session.close()
