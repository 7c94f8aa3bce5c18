"""The real Gemma 3 270M on Vulkan against the CPU backend, and one model on two subgroup sizes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vulkan_lab import no_messages  # noqa: F401
from uq.formats.bundle import Bundle
from uq.kernels.backends import open_session
from uq.validate.integers import Answers

WINDOW = 64  # tokens; 31 positions are compared


@pytest.mark.real
def test_the_real_model_answers_like_on_the_cpu(real_bundle: Bundle) -> None:
    vulkan, cpu = (
        open_session(real_bundle, name, max_context=WINDOW) for name in ("vulkan", "cpu")
    )
    found = Answers.of(vulkan, real_bundle, WINDOW).loss(cpu)
    assert found.tokens == 31 and 0 <= found.kld.value <= 1e-4


@pytest.mark.mesa
def test_the_bits_do_not_depend_on_the_subgroup_size(
    tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """Of Mesa's software device, whose subgroups are its vectors: 8 and 16 lanes."""
    bundle = tiny_bundle(hidden=640, ffn=1024, family="gemma2")
    command = [sys.executable, "-m", "tests.vulkan_bits", str(bundle)]
    runs = [
        subprocess.Popen(
            [*command, str(tmp_path / width)],
            env={**os.environ, "LP_NATIVE_VECTOR_WIDTH": width},
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            text=True,
        )
        for width in ("256", "512")
    ]
    found = [run.communicate()[0].split() for run in runs]
    (narrow, *bits), (wide, *same) = found
    assert (narrow, wide) == ("8", "16")
    assert bits == same and bits[1] == bits[2]  # steps, and the same tokens together
