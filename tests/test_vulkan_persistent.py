"""All layers of a token in one dispatch, against dispatches of their own.

Mesa's software device does not run several workgroups at a time for sure, so there is one that has
no one to wait for, or two that wait in vain.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.shapes import shape_config
from benchmarks.vulkan_speed import RandomWeights
from tests.vulkan_lab import no_messages  # noqa: F401
from uq.formats.config import GemmaConfig
from uq.kernels.numerics import ACTIVATIONS, KV, Numerics
from uq.kernels.session import Sampling
from uq.kernels.vulkan import autotune, persistent
from uq.kernels.vulkan.device import choose
from uq.kernels.vulkan.persistent import cuts, model_key, shapes
from uq.kernels.vulkan.session import VulkanSession
from uq.kernels.vulkan.tuning import Cut, Measured, read_measured, write_measured

PROMPT = [2, 7, 9, 30, 4] * 8  # with the text behind it two splits
ONE = Cut(
    1, queries=1, teams=(4, 2, 2, 4), out_parts=2, down_parts=2, depth=1, lanes=256, joins=False
)
WIDE = Cut(
    1, queries=2, teams=(8, 2, 1, 4), out_parts=1, down_parts=3, depth=2, lanes=512, joins=True
)
DOUBLE = replace(ONE, depth=4, width=2)
INT8 = Numerics(ACTIVATIONS["int8"], KV["int8"])


@pytest.fixture
def config() -> GemmaConfig:
    config = shape_config("270m", 2, 512)
    return replace(config, hidden_size=256, intermediate_size=384, head_dim=128, sliding_window=32)


@pytest.fixture(autouse=True)
def one_multiprocessor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(choose()), "multiprocessors", 1)  # where it is cached


def opened(config: GemmaConfig, folder: Path, *, tune: bool = False) -> VulkanSession:
    source, gpu = RandomWeights(config), choose()
    return VulkanSession(
        config, source, gpu, pipeline_cache=folder, max_context=64, numerics=INT8, tune=tune
    )


def measured_file(folder: Path) -> Path:
    return folder / f"{choose().identity}-int8.json"


def cut_session(
    config: GemmaConfig, folder: Path, cut: Cut | None, like: Cut = ONE
) -> VulkanSession:
    """Its products have the sums of `like`, and its layers are cut so."""
    first = opened(config, folder)
    products = shapes(first._engine.model, like)
    first.close()
    write_measured(measured_file(folder), Measured(products, {model_key(config): cut}))
    return opened(config, folder)


def text_and_logits(session: VulkanSession) -> tuple[list[int], NDArray[np.float32]]:
    session.reset()
    session.prefill(PROMPT)
    return list(session.decode(8, Sampling())), session.next_logits


@pytest.fixture
def expected(config: GemmaConfig, tmp_path: Path) -> tuple[list[int], NDArray[np.float32]]:
    """Of dispatches of their own."""
    session = cut_session(config, tmp_path, None)
    found = text_and_logits(session)
    session.close()
    return found


@pytest.mark.parametrize("cut", [ONE, WIDE, DOUBLE, replace(WIDE, depth=8, width=2)])
def test_a_token_has_the_bits_of_dispatches(config: GemmaConfig, tmp_path: Path, cut: Cut) -> None:
    alone = cut_session(config, tmp_path, None, cut)
    expected = text_and_logits(alone)
    alone.close()
    session = cut_session(config, tmp_path, cut, cut)
    text, logits = text_and_logits(session)
    labels = {kernel.label for kernel in session.profile().kernels}
    assert labels == {"embedding", "layers", "head"}
    assert text == expected[0] and np.array_equal(logits, expected[1])
    session.close()


def test_who_waits_in_vain_computes_the_tokens_anew(
    config: GemmaConfig,
    tmp_path: Path,
    expected: tuple[list[int], NDArray[np.float32]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(persistent, "PATIENCE", 1)
    session = cut_session(config, tmp_path, replace(ONE, workgroups=2))
    text, logits = text_and_logits(session)
    assert len({kernel.label for kernel in session.profile().kernels}) > 3
    assert text == expected[0] and np.array_equal(logits, expected[1])
    session.close()


def cuts_are_fastest(_gpu: object, records: dict[object, object]) -> dict[object, float]:
    return {key: float(not isinstance(key, Cut)) for key in records}


def test_the_fastest_way_is_kept(
    config: GemmaConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "cuts", lambda *_: [ONE])
    monkeypatch.setattr(autotune, "_times", cuts_are_fastest)
    opened(config, tmp_path, tune=True).close()
    assert read_measured(measured_file(tmp_path)).layers == {model_key(config): ONE}


def test_a_way_with_other_bits_is_not_kept(
    config: GemmaConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here: of products that are summed up in other parts."""
    other = replace(ONE, out_parts=1, down_parts=3)
    monkeypatch.setattr(autotune, "cuts", lambda *_: [ONE])
    monkeypatch.setattr(autotune, "_times", cuts_are_fastest)
    monkeypatch.setattr(autotune, "shapes", lambda model, _: shapes(model, other))
    opened(config, tmp_path, tune=True).close()
    assert read_measured(measured_file(tmp_path)).layers == {model_key(config): None}


def test_no_part_of_the_columns_is_empty() -> None:
    config = replace(shape_config("270m", 2, 512), intermediate_size=4 * 128)
    assert {cut.down_parts for cut in cuts(config, 8, 48 << 10)} == {1, 2}


@pytest.mark.parametrize("name", ["270m", "1b", "4b", "27b"])
def test_every_workgroup_has_outputs_of_the_gate(name: str) -> None:
    """Otherwise messages could be overwritten before it has read them."""
    config = shape_config(name)
    found = cuts(config, 500, 48 << 10)
    assert {cut.width for cut in found} == {1, 2}
    for cut in found:
        outputs = 16 * (cut.lanes // 64 * cut.width // cut.teams[2] // 2)
        assert outputs * (cut.workgroups - 1) < config.intermediate_size
        assert config.num_heads % cut.out_parts == 0
