"""All layers of a token in one dispatch, against dispatches of their own.

Mesa's software device does not run several workgroups at a time for sure, so there is one that has
no one to wait for, or two that wait in vain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.shapes import gemma4_config, shape_config, text_config
from benchmarks.vulkan_speed import RandomWeights
from tests.vulkan_lab import no_messages  # noqa: F401
from uq.formats.config import FULL, SLIDING, Experts, GemmaConfig, PerLayerEmbedding
from uq.kernels.numerics import ACTIVATIONS, KV, Numerics
from uq.kernels.session import Sampling
from uq.kernels.vulkan import autotune, persistent
from uq.kernels.vulkan.device import choose
from uq.kernels.vulkan.persistent import model_key
from uq.kernels.vulkan.persistent_cuts import cuts, groups_of, shapes
from uq.kernels.vulkan.persistent_shares import NEXT_LAYER, layer_shares, layer_stages, shares
from uq.kernels.vulkan.session import VulkanSession
from uq.kernels.vulkan.tuning import Cut, Measured, read_measured, write_measured

PROMPT = [2, 7, 9, 30, 4] * 8  # with the text behind it two splits
ONE = Cut(
    1, queries=1, teams=(4, 2, 2, 4), out_parts=2, down_parts=2, depth=1, lanes=256, joins=False
)
WIDE = Cut(
    1, queries=2, teams=(8, 2, 1, 4), out_parts=1, down_parts=3, depth=2, lanes=512, joins=True
)
DOUBLE, WIDEST = replace(ONE, depth=4, width=2), replace(WIDE, depth=8, width=2)
STRAIGHT = replace(WIDEST, teams=(1, 2, 1, 1), depth=2, straight=True)
UNLIKE = replace(DOUBLE, depth=1, straight=True)
INT8, WITH_FLOATS = Numerics(ACTIVATIONS["int8"], KV["int8"]), Numerics(kv=KV["int8"])


SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "head_dim": 128,
    "sliding_window": 32,
}


@pytest.fixture
def config() -> GemmaConfig:
    return plain()


def plain() -> GemmaConfig:
    return replace(shape_config("270m", 2, 512), **SIZES)


def dense() -> GemmaConfig:
    """Of both kinds of layers, with keys of their own and with others', whose MLPs are larger."""
    config = gemma4_config("e2b", 8)
    own = config.num_layers - config.kv_shared_layers
    assert config.full
    return replace(
        config,
        **SIZES,
        vocab_size=512,
        num_heads=4,
        full=replace(config.full, head_dim=256, rotary_pairs=32),
        intermediate_sizes=(384,) * own + (768,) * config.kv_shared_layers,
        per_layer=PerLayerEmbedding(512, 64),
    )


def experts() -> GemmaConfig:
    """No size is one of whole tiles."""
    config = gemma4_config("26b-a4b", 3)
    assert config.full
    return replace(
        config,
        **SIZES | {"hidden_size": 288, "intermediate_size": 416},
        vocab_size=512,
        num_heads=4,
        num_kv_heads=2,
        layer_types=(SLIDING, FULL, SLIDING),
        full=replace(config.full, head_dim=256, num_kv_heads=1, rotary_pairs=32),
        experts=Experts(count=16, active=3, intermediate_size=96),
    )


def large_experts() -> GemmaConfig:
    """Of several tiles each."""
    return replace(experts(), experts=Experts(count=24, active=8, intermediate_size=704))


class Weights(RandomWeights):
    """Its gains and layer scalars differ."""

    def array(self, name: str) -> NDArray[np.float32]:
        values = super().array(name)
        uneven = 0.5 + np.arange(len(values)) * 37 % 64 / 64
        return uneven.astype(np.float32) if values.ndim == 1 else values


@pytest.fixture(autouse=True)
def one_multiprocessor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(choose()), "multiprocessors", 1)  # where it is cached


def opened(
    config: GemmaConfig, folder: Path, numerics: Numerics = INT8, *, tune: bool = False
) -> VulkanSession:
    source, gpu = Weights(config), choose()
    return VulkanSession(
        config, source, gpu, pipeline_cache=folder, max_context=64, numerics=numerics, tune=tune
    )


def measured_file(folder: Path) -> Path:
    return folder / f"{choose().identity}-int8.json"


def write_all(folder: Path, measured: Measured) -> None:
    """For sessions of either activations."""
    write_measured(measured_file(folder), measured)
    write_measured(folder / f"{choose().identity}.json", measured)


def cut_session(
    config: GemmaConfig,
    folder: Path,
    cut: Cut | None,
    like: Cut = ONE,
    numerics: Numerics = INT8,
) -> VulkanSession:
    """Its products have the sums of `like`, and its layers are cut so."""
    first = opened(config, folder, numerics)
    products = shapes(first._engine.model, like)
    first.close()
    write_all(folder, Measured(products, {model_key(config): cut}))
    return opened(config, folder, numerics)


def text_and_logits(session: VulkanSession) -> tuple[list[int], NDArray[np.float32]]:
    session.reset()
    session.prefill(PROMPT)
    return list(session.decode(8, Sampling())), session.next_logits


@pytest.mark.parametrize(
    ("make", "cut", "numerics"),
    [
        *((plain, cut, INT8) for cut in (ONE, WIDE, DOUBLE, WIDEST, STRAIGHT, UNLIKE)),
        *((plain, cut, WITH_FLOATS) for cut in (DOUBLE, STRAIGHT)),
        *((dense, cut, INT8) for cut in (ONE, WIDEST, STRAIGHT)),
        *((experts, cut, numerics) for cut in (ONE, WIDEST) for numerics in (INT8, WITH_FLOATS)),
        (large_experts, replace(ONE, splits=1), INT8),
        (large_experts, replace(DOUBLE, depth=3, splits=1), WITH_FLOATS),
        (large_experts, replace(DOUBLE, depth=6, splits=1), WITH_FLOATS),
    ],
)
def test_a_token_has_the_bits_of_dispatches(
    make: Callable[[], GemmaConfig], tmp_path: Path, cut: Cut, numerics: Numerics
) -> None:
    config = make()
    if config.experts:
        cut = replace(cut, teams=(*cut.teams, cut.teams[2], cut.teams[0]))
    alone = cut_session(config, tmp_path, None, cut, numerics)
    expected = text_and_logits(alone)
    alone.close()
    session = cut_session(config, tmp_path, cut, cut, numerics)
    text, logits = text_and_logits(session)
    labels = {kernel.label for kernel in session.profile().kernels}
    assert labels - {"per-layer inputs"} == {"embedding", "layers", "head"}
    assert text == expected[0] and np.array_equal(logits, expected[1])
    session.close()


@pytest.mark.mesa  # which runs one of two workgroups at a time
def test_who_waits_in_vain_computes_the_tokens_anew(
    config: GemmaConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Having read ahead."""
    cut = replace(ONE, workgroups=2, teams=(1, 1, 1, 1), reads=2)
    alone = cut_session(config, tmp_path, None, cut)
    expected = text_and_logits(alone)
    alone.close()
    monkeypatch.setattr(persistent, "PATIENCE", 1)
    session = cut_session(config, tmp_path, cut)
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


@pytest.mark.parametrize("name", ["270m", "1b", "4b", "27b", "e2b", "26b-a4b"])
def test_every_workgroup_has_outputs_of_the_gate(name: str) -> None:
    """Otherwise messages could be overwritten before it has read them."""
    config = text_config(name)
    found = cuts(config, 500, 48 << 10)
    assert {cut.width for cut in found} == {1, 2}
    for cut in found:
        for team, rows in zip(cut.teams[2::2], gates_of(config), strict=True):
            outputs = 16 * (cut.lanes // 64 * cut.width // team // 2)
            assert outputs * (cut.workgroups - 1) < rows
        assert cut.joins or config.num_heads % cut.out_parts == 0


@pytest.mark.parametrize("name", ["270m", "1b", "27b", "e2b", "26b-a4b"])
def test_each_group_is_one_workgroups(name: str) -> None:
    config = text_config(name)
    for cut in (found := cuts(config, 132, 48 << 10))[:: len(found) - 1]:
        lists = shares(config, cut)
        steps = (lists >> 20).astype(int)
        assert len(lists) == cut.workgroups and (np.diff(steps) >= 0).all()
        for layer in range(config.num_layers):
            for number, stage in enumerate(layer_stages(config, cut, layer)):
                own = steps == NEXT_LAYER * layer + number
                parts = range(len(stage.needs))
                whole = [part << 16 | group for part in parts for group in range(stage.groups)]
                assert sorted(lists[own] & 0xFFFFF) == whole
                assert number != 2 or own.any(axis=1).all()  # everyone has some of the gate


def test_full_chunks_are_tried_where_all_of_the_hidden_size_are_full() -> None:
    """42 tiles of the 27b are six chunks of seven; nine of the 1b are odd."""
    found = [cut for cut in cuts(shape_config("27b"), 132, 48 << 10) if cut.straight]
    assert {(cut.teams, cut.depth, cut.reads > 0) for cut in found} == {((2, 2, 2, 2), 7, True)}
    assert {cut.down_parts for cut in found} == {2, 3}
    assert not any(cut.straight for cut in cuts(shape_config("1b"), 132, 48 << 10))


def test_chunks_of_one_block_need_not_be_even() -> None:
    found = cuts(text_config("270m"), 132, 48 << 10)
    assert {cut.depth for cut in found if cut.width == 1} == {3, 4}


def test_who_has_fewer_groups_of_the_gate_has_more_of_down() -> None:
    """27b: 672 groups of the gate are five for each of 132 workgroups, and twelve are left."""
    config = shape_config("27b")
    cut = next(cut for cut in cuts(config, 132, 48 << 10) if cut.width == 2 and cut.down_parts == 3)
    stages = layer_stages(config, replace(cut, teams=(2, 4, 2, 2)), 0)
    found = [Counter(stage for stage, _, _ in own) for own in layer_shares(stages, 132)]
    assert Counter((own[2], own[3]) for own in found) == {(6, 1): 12, (5, 2): 120}


def gates_of(config: GemmaConfig) -> list[int]:
    """Rows of the gate, and of those of all experts that a token meets."""
    rows = [config.intermediate_size]
    if config.experts:
        rows.append(config.experts.active * config.experts.intermediate_size)
    return rows


@pytest.mark.parametrize(("name", "splits"), [("26b-a4b", 8), ("e2b", 16), ("27b", 8), ("4b", 0)])
def test_no_workgroup_has_two_runs_of_keys(name: str, splits: int) -> None:
    """Of 132; where that takes many splits, contexts are too short for them."""
    assert {cut.splits for cut in cuts(text_config(name), 132, 48 << 10)} == {splits}


def test_who_has_no_rows_of_experts_has_some_of_the_mlp() -> None:
    config = text_config("26b-a4b")
    for cut in cuts(config, 132, 48 << 10):
        at_once = cut.lanes // 64 * cut.width
        mlp, experts = (groups_of(config.hidden_size, at_once, cut.teams[i]) for i in (3, 5))
        assert mlp + experts == cut.workgroups


def test_scores_of_experts_that_no_workgroup_makes_are_for_dispatches(tmp_path: Path) -> None:
    """A workgroup makes four or eight of them."""
    config = replace(experts(), experts=Experts(count=22, active=3, intermediate_size=96))
    cut = replace(ONE, teams=(4, 2, 2, 4, 2, 4))
    session = cut_session(config, tmp_path, cut, cut, WITH_FLOATS)
    text_and_logits(session)
    assert len({kernel.label for kernel in session.profile().kernels}) > 3
    session.close()


def test_no_workgroup_is_idle_where_larger_teams_are_to_be_had() -> None:
    """84 groups of two blocks in teams of 2 leave 48 of 132 workgroups without any."""
    found = {cut.teams[1] for cut in cuts(shape_config("27b"), 132, 48 << 10) if cut.width == 2}
    assert found == {2, 4}
