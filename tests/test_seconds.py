"""The time that `--dry-run` names: of all that a run does, and of what it does not do nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from uq.formats.checkpoint import open_checkpoint
from uq.quantize import seconds
from uq.quantize.estimate import estimate
from uq.quantize.options import QuantizeOptions
from uq.quantize.plan import GptqOptions
from uq.quantize.seconds import Rates

FAST = Rates(single=1e12, double=5e11, per_weight=1e-9)
GPTQ = GptqOptions(outputs=1.0)


@pytest.fixture(autouse=True)
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rates, "measured", lambda gptq: FAST)
    monkeypatch.setattr(seconds, "_fastest", lambda work: 1e-6)
    monkeypatch.setattr(seconds, "_narrow_rate", lambda cols: 1e11)


def test_each_part_of_a_run_counts(
    tiny_checkpoint: Callable[..., Path], shipped_recipes: None
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint())
    runs = [
        QuantizeOptions(method="rtn"),
        QuantizeOptions(group=32, curvature=False),
        QuantizeOptions(curvature=False),
        QuantizeOptions(),
        QuantizeOptions(calibration_tokens=100_000),
    ]
    found = [estimate(checkpoint, options).seconds for options in runs]
    assert sorted(found) == found and len(set(found)) == len(runs)


def test_experts_are_rounded_each_and_passed_by_few_tokens(
    tiny_gemma4: Callable[..., Path],
) -> None:
    """Half of the experts: half of the rounding, and as many weights that a token passes."""
    found = []
    for count in (8, 4):
        text = {"num_experts": count, "top_k_experts": 2}
        config = open_checkpoint(tiny_gemma4("experts", text=text)).config
        *_, gate_up, down = seconds._gptq_seconds(config, 0, GPTQ, FAST)
        found.append((gate_up + down, seconds._passed(config, 0)))
    assert found[0][0] == pytest.approx(2 * found[1][0])
    assert found[0][1] == pytest.approx(found[1][1])


def test_a_few_rows_at_a_time_are_slower() -> None:
    shape = (4096, 4096)
    alone = seconds._alone_seconds(shape, GPTQ, FAST)
    assert seconds._together_seconds(shape, GPTQ, FAST) > 2 * alone
