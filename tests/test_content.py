"""Hashes of what a checkpoint holds, against hashlib on the bytes of its file."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from uq.formats.bundle import open_bundle
from uq.formats.checkpoint import open_checkpoint
from uq.formats.checkpoint.content import BLOCK, blocks, read_contents, tensor_content
from uq.formats.checkpoint.tensors import TensorInfo
from uq.formats.config import EMBEDDING, FINAL_NORM
from uq.formats.layouts import LAYOUTS
from uq.formats.spec import SPECS
from uq.quantize.pipeline import QuantizeOptions, quantize

Tiny = Callable[..., Path]


def expected(folder: Path, info: TensorInfo, rows: int) -> str:
    """The formula of formats/README.md."""
    stored = (folder / info.file.name).read_bytes()[info.offset : info.offset + info.nbytes]
    size = rows * (info.nbytes // info.shape[0])
    parts = [stored[start : start + size] for start in range(0, len(stored), size)]
    head = f"{info.dtype} {'x'.join(map(str, info.shape))}\n".encode()
    return sha256(head + b"".join(sha256(part).digest() for part in parts)).hexdigest()


def test_a_tensor_is_hashed_by_blocks_of_rows(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint(vocab=9000)
    tensors = open_checkpoint(folder).tensors
    with ThreadPoolExecutor(3) as pool:
        found = read_contents(tensors, pool)
    rows = BLOCK // 128  # hidden size
    assert rows < 9000 and rows % 16 == 0
    assert found[EMBEDDING] == expected(folder, tensors[EMBEDDING], rows)
    assert found[FINAL_NORM] == expected(folder, tensors[FINAL_NORM], 128)


def test_reading_a_tensor_at_once_gives_its_values_and_its_hash(tiny_checkpoint: Tiny) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(vocab=9000))  # two blocks
    with ThreadPoolExecutor(1) as pool:
        hashes = read_contents(checkpoint.tensors, pool)
    contents: dict[str, str] = {}
    values = checkpoint.whole(EMBEDDING, contents)
    assert contents == {EMBEDDING: hashes[EMBEDDING]}
    assert np.array_equal(values, checkpoint.embedding(0, 9000))


def test_blocks_are_whole_row_blocks_of_every_layout(tiny_checkpoint: Tiny) -> None:
    info = open_checkpoint(tiny_checkpoint()).tensors[EMBEDDING]
    for cols in (128, 1152, 21504, 1 << 21):
        starts = [start for start, _ in blocks(replace(info, shape=(100, cols)))]
        for layout in LAYOUTS.values():
            assert not any(start % layout.row_block(spec) for start in starts for spec in SPECS)


def test_type_and_shape_are_part_of_the_content(tiny_checkpoint: Tiny) -> None:
    info = open_checkpoint(tiny_checkpoint()).tensors[EMBEDDING]
    others = (replace(info, dtype="f16"), replace(info, shape=(info.shape[0], 2, 64)))
    assert len({tensor_content(other, [b"digest"]) for other in (info, *others)}) == 3


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_manifest_has_the_content_however_files_are_cut(
    method: str, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(shards=2)
    options = QuantizeOptions(method=method, calibration_tokens=400)
    made = open_bundle(quantize(open_checkpoint(folder), tmp_path / method, options))
    tensors, lines = open_checkpoint(folder).tensors, dict[str, str]()
    with ThreadPoolExecutor(1) as pool:
        contents = read_contents(tensors, pool)
    for name in sorted(tensors):
        file = tensors[name].file.name
        lines[file] = lines.get(file, "") + f"{name} {contents[name]}\n"
    found = {name: file.content for name, file in made.manifest.provenance.files.items()}
    assert found == {name: sha256(text.encode()).hexdigest() for name, text in lines.items()}
