"""How many threads matrix products take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from threadpoolctl import ThreadpoolController

from uq.blas import blas_threads
from uq.formats.bundle import open_bundle
from uq.formats.checkpoint import open_checkpoint
from uq.progress import SilentProgress
from uq.quantize.pipeline import QuantizeOptions, quantize
from uq.validate.validate import ValidateOptions, validate


def threads() -> set[int]:
    """Of NumPy's; what else is loaded meanwhile has its own."""
    found = ThreadpoolController().select(user_api="blas").info()
    return {pool["num_threads"] for pool in found if "numpy" in pool["filepath"]}


@pytest.fixture
def three() -> Iterator[None]:
    """As on a machine of three cores."""
    with ThreadpoolController().select(user_api="blas").limit(limits=3):
        yield


@pytest.mark.parametrize(("most", "expected"), [(1, 1), (2, 2), (3, 3), (8, 3), (None, 3)])
def test_no_more_than_so_many(three: None, most: int | None, expected: int) -> None:
    with pytest.raises(KeyError), blas_threads(most):
        assert threads() == {expected}
        raise KeyError
    assert threads() == {3}


class Seen(SilentProgress):
    """Threads at each step."""

    def __init__(self) -> None:
        self.threads: set[int] = set()

    def advance(self, step: str, **figures: float) -> None:
        self.threads |= threads()


@pytest.mark.parametrize(("chosen", "expected"), [(2, {2}), (None, {3})])
def test_quantizing_and_validating_take_so_many(
    three: None,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    chosen: int | None,
    expected: set[int],
) -> None:
    checkpoint, seen = open_checkpoint(tiny_checkpoint()), Seen()
    options = QuantizeOptions(method="rtn", threads=chosen)
    bundle = open_bundle(quantize(checkpoint, tmp_path / "b", options, seen))
    judged = ValidateOptions(device="cpu", threads=chosen, context=32, max_chunks=2, speed=False)
    validate(bundle, checkpoint, judged, seen)
    assert seen.threads == expected and threads() == {3}
