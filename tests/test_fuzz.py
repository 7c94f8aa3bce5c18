"""Damaged files of models and bundles are read or refused; `scripts/fuzz` damages many more."""

import pytest

from tests.fuzz_formats import FORMATS
from tests.fuzzing import fuzz

RUNS = {"bundle": 60, "checkpoint": 40, "config": 40, "generation": 20, "gguf": 60, "tokenizer": 60}


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_are_read_or_refused(name: str) -> None:
    found = fuzz(FORMATS[name], RUNS.get(name, 200), seed=1)
    assert found.read and found.refused
