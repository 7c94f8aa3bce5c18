"""Measuring a decode step and choosing how its products are cut, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.test_cpu_session import random_tokens
from tests.vulkan_lab import no_messages  # noqa: F401
from uq.errors import UsageError
from uq.formats.bundle import Bundle, open_bundle
from uq.kernels.profile import KernelTime, StepTimes, by_label, chrome_trace
from uq.kernels.session import Sampling
from uq.kernels.vulkan import autotune
from uq.kernels.vulkan.device import choose
from uq.kernels.vulkan.session import VulkanSession
from uq.kernels.vulkan.sources import BundleSource
from uq.kernels.vulkan.stages import shared_queries
from uq.kernels.vulkan.tuning import Cut, Measured, Shape, read_measured, write_measured

LAYERS = 2


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Callable[..., Path]) -> Bundle:
    return open_bundle(tiny_bundle(layers=LAYERS, family="gemma2"))


def opened(bundle: Bundle, cache: Path, *, tune: bool = False) -> VulkanSession:
    return VulkanSession(
        bundle.config,
        BundleSource(bundle),
        choose(),
        pipeline_cache=cache,
        max_context=32,
        tune=tune,
    )


def test_a_tuned_session_writes_the_same_text(bundle: Bundle, tmp_path: Path) -> None:
    prompt = random_tokens(bundle.config, 9).tolist()
    texts = []
    for tune in (False, True, False):  # the last one finds what the second one kept
        session = opened(bundle, tmp_path, tune=tune)
        session.prefill(prompt)
        texts.append(list(session.decode(8, Sampling())))
        session.close()
    assert texts[0] == texts[1] == texts[2]
    (file,) = tmp_path.glob("*.json")
    assert {key.rpartition(" ")[2] for key in read_measured(file).products} == {"0", "1", "2", "3"}


def test_a_way_that_an_older_version_measured_leaves_what_stands_beside_it(tmp_path: Path) -> None:
    file, known = tmp_path / "device.json", Cut(1, 1, (1, 1, 1, 1), 1, 1, 4, 256, True)
    shape = Shape(64, 1)
    write_measured(file, Measured({"product": shape}, {"new": known, "old": known, "none": None}))
    stored = json.loads(file.read_text())
    stored["layers"]["old"]["option_of_old"] = True
    file.write_text(json.dumps(stored))
    found = read_measured(file)
    assert found.products == {"product": shape} and found.layers == {"new": known, "none": None}


def test_a_workgroup_of_attention_serves_as_many_heads_as_was_fastest(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "_tune_products", lambda _gpu, stages, _cache: (stages, {}))
    monkeypatch.setattr(autotune, "_times", lambda _gpu, records: {key: key for key in records})
    usual, tuned = opened(bundle, tmp_path), opened(bundle, tmp_path, tune=True)
    again = opened(bundle, tmp_path)
    assert [heads(each) for each in (usual, tuned, again)] == [2, 1, 1]
    logits = []
    for session in (usual, tuned, again):
        session.prefill(random_tokens(bundle.config, 9).tolist())
        list(session.decode(4, Sampling()))
        logits.append(session.next_logits)
        session.close()
    assert all(np.array_equal(each, logits[0]) for each in logits)


def heads(session: VulkanSession) -> int:
    config, stages = session.config, session._engine._stages
    return shared_queries(config.num_heads // config.num_kv_heads, stages.tuning.queries)


def test_a_layer_has_five_stages(bundle: Bundle, tmp_path: Path) -> None:
    session = opened(bundle, tmp_path)
    with pytest.raises(UsageError, match="prefill"):
        session.profile()
    session.prefill([3, 4, 5])
    expected = session.next_logits
    counts = {stage.label: stage.dispatches for stage in by_label(session.profile().kernels)}
    per_layer = ("q, k, v", "attention", "attention output", "gate, up", "down")
    assert all(counts[label] == LAYERS for label in per_layer)
    assert counts["embedding"] == counts["head"] == 1
    assert session.position == 3 and (session.next_logits == expected).all()
    session.close()


def test_times_by_label() -> None:
    times = [KernelTime("a", 0, 2), KernelTime("b", 3, 5), KernelTime("a", 8, 2)]
    b, a, between = by_label(times)
    assert (b.label, b.microseconds, b.share, b.dispatches) == ("b", 5, 0.5, 1)
    assert (a.label, a.microseconds, a.dispatches) == ("a", 4, 2)
    assert (between.label, between.microseconds) == ("between dispatches", 1)


def test_a_trace_is_what_perfetto_reads() -> None:
    trace = json.loads(
        chrome_trace(StepTimes([KernelTime("head", 1.5, 2.0)], [KernelTime("submit", 0, 9)]))
    )
    gpu, host = trace["traceEvents"]
    assert (gpu["name"], gpu["ph"], gpu["ts"], gpu["dur"], gpu["tid"]) == (
        "head",
        "X",
        1.5,
        2,
        "GPU",
    )
    assert host["tid"] == "host"
