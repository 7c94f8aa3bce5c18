"""An opened floating-point model, read one layer or one block of embedding rows at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from uq.errors import CheckpointError
from uq.formats.checkpoint.content import (
    block_digest,
    blocks,
    file_contents,
    read_contents,
    tensor_content,
)
from uq.formats.checkpoint.fetched import Fetched
from uq.formats.checkpoint.tensors import (
    TensorInfo,
    as_float32,
    is_readable,
    raw_rows,
    read_rows,
)
from uq.formats.checkpoint.weight_file import WeightFile
from uq.formats.config import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    PER_LAYER_EMBEDDING,
    PER_LAYER_NORM,
    PER_LAYER_PROJECTION,
    GemmaConfig,
    layer_tensor,
)
from uq.formats.decode import printable
from uq.formats.disk import free_bytes
from uq.formats.families.registry import FAMILIES
from uq.formats.tokenizer import Tokenizer

TOKENIZER = "tokenizer.json"

Contents = MutableMapping[str, str]  # tensor -> its hash, see `content`; filled in while reading


@dataclass(frozen=True)
class Source:
    """Where a checkpoint came from; goes into the manifest of a bundle.

    Attributes:
        id: path, Hub id or `demo:` name, as a person would give it to open the same model.
        revision: commit hash on the Hub, else None.
    """

    kind: Literal["folder", "hub", "gguf", "demo"]
    id: str
    revision: str | None = None


class Checkpoint:
    """The text model of a Gemma checkpoint.

    Attributes:
        buffered: bytes that reading ahead of a slow source may hold in memory, at most.
        fetched: what keeps the weights of a slow source for the next time they are read.
        dtype: of the linears and embeddings, for people: `bf16`, `q4_k_m`, `bf16 mixed`.
        left_out: one sentence for each part of the source that has no place in a bundle.
        tensors: canonical name -> where it lies in the source.
        towers: what belongs to no text model, by its name in the source.
    """

    def __init__(
        self,
        source: Source,
        config: GemmaConfig,
        tensors: Mapping[str, TensorInfo],
        *,
        dtype: str,
        norm_offset: float,
        left_out: tuple[str, ...],
        towers: Mapping[str, TensorInfo] | None = None,
        load_assets: Callable[[], dict[str, bytes]],
    ) -> None:
        """`norm_offset` is added to stored norm weights to get gains: 1 for safetensors."""
        self.source = source
        self.config = config
        self.tensors = needed_tensors(config, tensors)
        self.towers = towers or {}
        self.buffered = 0
        self.fetched: Fetched | None = None
        self.dtype = dtype
        self.left_out = left_out
        self._norm_offset = np.float32(norm_offset)
        self._load_assets = load_assets

    @property
    def streamed(self) -> bool:
        """Whether its weights are fetched from the Hub as they are read."""
        return self.fetched is not None

    @property
    def stored_bytes(self) -> int:
        """Of the tensors that are read, as they are stored."""
        places = {(info.file.name, info.offset): info.nbytes for info in self.tensors.values()}
        return sum(places.values())

    def keep_fetched(self, folder: Path, beside: int = 0) -> int:
        """From now on let what is fetched of a slow source wait on a folder's disk.

        Args:
            beside: bytes of the disk that are left free.

        Returns:
            Bytes that will wait there: `stored_bytes` where there is room for all.

        Raises:
            DeviceError: the folder cannot be written.
        """
        if self.fetched is None:
            return 0
        if not self.fetched.most:
            room = max(0, free_bytes(folder) - beside)
            self.fetched.keep_in(folder, min(self.stored_bytes, room))
        return self.fetched.most

    @property
    def makes_tokenizer(self) -> bool:
        """Whether it has no tokenizer.json, which is then put together from a GGUF file's words."""
        return self.source.kind in ("gguf", "demo")

    def layer(self, index: int, contents: Contents | None = None) -> dict[str, NDArray[np.float32]]:
        """Weights of one layer: role -> (out, in) linear, (size,) norm gain, or what is kept.

        Experts are left out; `expert` reads them one by one.

        Args:
            contents: the hashes of its tensors are entered here.

        Raises:
            CheckpointError: a value is NaN or infinite.
        """
        linears = self.config.linear_shapes(index)
        roles = [role for role in linears if role not in self.config.expert_roles(index)]
        weights = {role: self._read(layer_tensor(index, role), contents) for role in roles}
        kept = self.kept(index, contents)
        return weights | self.gains(index, contents) | kept | self.model_part(index)

    def expert(self, index: int, role: str, number: int) -> NDArray[np.float32]:
        """One expert's part of a linear that holds all: (out, in).

        Raises:
            CheckpointError: a value is NaN or infinite.
        """
        rows = self.config.expert_rows(index, role)
        return self.rows(layer_tensor(index, role), number * rows, (number + 1) * rows)

    def gains(self, index: int, contents: Contents | None = None) -> dict[str, NDArray[np.float32]]:
        """Norm gains of one layer by role: (size,); arguments and errors are those of `layer`."""
        roles = self.config.norm_shapes(index)
        return {role: self.gain(layer_tensor(index, role), contents) for role in roles}

    def kept(self, index: int, contents: Contents | None = None) -> dict[str, NDArray[np.float32]]:
        """What is never quantized of one layer, by role; the rest as in `gains`."""
        roles = self.config.kept_shapes(index)
        return {role: self._read(layer_tensor(index, role), contents) for role in roles}

    def model_part(self, index: int) -> dict[str, NDArray[np.float32]]:
        """What makes the layer's per-layer input, out of tensors of the whole model.

        Raises:
            CheckpointError: a value is NaN or infinite.
        """
        if self.config.per_layer is None:
            return {}
        size, projection = self.config.per_layer.size, f"{PER_LAYER_PROJECTION}.weight"
        return {
            PER_LAYER_PROJECTION: self.rows(projection, index * size, (index + 1) * size),
            PER_LAYER_NORM: self.gain(f"{PER_LAYER_NORM}.weight"),
        }

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows `start:stop` of a tensor by its canonical name, as it is stored.

        Raises:
            CheckpointError: a value is NaN or infinite.
        """
        return read_rows(self.tensors[name], start, stop)

    def embedding(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows `start:stop` of the embedding, not multiplied by its scale: (stop - start, hidden).

        Raises:
            CheckpointError: a value is NaN or infinite.
        """
        return read_rows(self.tensors[EMBEDDING], start, stop)

    def head(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows `start:stop` of the output matrix; the embedding's where they are tied.

        Raises:
            CheckpointError: a value is NaN or infinite.
        """
        return read_rows(self.tensors[EMBEDDING if self.config.tied_head else HEAD], start, stop)

    def per_layer_embedding(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows `start:stop` of the per-layer embedding, unscaled: (stop - start, layers * size).

        Raises:
            CheckpointError: a value is NaN or infinite.
        """
        return read_rows(self.tensors[PER_LAYER_EMBEDDING], start, stop)

    def final_norm(self) -> NDArray[np.float32]:
        """Gain of the norm in front of the head: (hidden,).

        Raises:
            CheckpointError: a value is NaN or infinite.
        """
        return self.gain(FINAL_NORM)

    def gain(self, name: str, contents: Contents | None = None) -> NDArray[np.float32]:
        """Gain of a norm by its canonical name; the rest as in `layer`."""
        return self._read(name, contents) + self._norm_offset

    def whole(self, name: str, contents: Contents | None = None) -> NDArray[np.float32]:
        """A tensor by its canonical name, as it is stored; the rest as in `layer`."""
        return self._read(name, contents)

    def files(self) -> dict[str, WeightFile]:
        """Weight files by name."""
        files = {info.file.name: info.file for info in self.tensors.values()}
        return dict(sorted(files.items()))

    def fingerprint(self) -> dict[str, dict[str, int | str]]:
        """Size and sha256 of every weight file; read for it once per object, but for files whose
        source states it."""
        return self._fingerprint

    def contents(self) -> dict[str, str]:
        """What of each weight file the model needs, as a hash (`content`); reads all of it.

        Raises:
            CheckpointError, DeviceError, HubError: as reading does.
        """
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return file_contents(self.tensors, read_contents(self.tensors, pool))

    def assets(self) -> dict[str, bytes]:
        """Files beside the weights that a bundle carries on; `tokenizer.json` is always there.

        Raises:
            CheckpointError: the source has no tokenizer.
        """
        return self._assets

    def tokenizer(self) -> Tokenizer:
        """Raises CheckpointError: the source has no tokenizer, or one of another kind."""
        config = self.config
        return Tokenizer.from_bytes(
            self.assets()[TOKENIZER], config.bos_token_id, config.eos_token_ids
        )

    @cached_property
    def _fingerprint(self) -> dict[str, dict[str, int | str]]:
        return {
            name: {"size": file.size, "sha256": file.sha256()}
            for name, file in self.files().items()
        }

    @cached_property
    def _assets(self) -> dict[str, bytes]:
        return self._load_assets()

    def _read(self, name: str, contents: Contents | None) -> NDArray[np.float32]:
        """Read at once, then widened and hashed block by block in threads."""
        info = self.tensors[name]
        raw, found = raw_rows(info, 0, info.shape[0]), np.empty(info.shape, np.float32)

        def widen(rows: tuple[int, int]) -> bytes:
            block = slice(*rows)
            found[block] = as_float32(info, raw[block], block.start)
            return b"" if contents is None else block_digest(raw[block])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            digests = list(pool.map(widen, blocks(info)))
        if contents is not None:
            contents[name] = tensor_content(info, digests)
        return found


def expected_shapes(config: GemmaConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape, as in the files, of every tensor that the model needs."""
    family = FAMILIES[config.family]
    shapes = {role.tensor: role.shape for role in family.model_roles(config)}
    for layer in range(config.num_layers):
        for role in family.layer_roles(config, layer):
            shapes[layer_tensor(layer, role.name)] = role.shape
    return shapes


def needed_tensors(config: GemmaConfig, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors that the model needs, checked; others are dropped.

    Stacked experts become one matrix, an expert's rows behind the other's.

    Raises:
        CheckpointError: a tensor is missing, or has another shape or an unknown dtype.
    """
    needed = {}
    for name, shape in expected_shapes(config).items():
        if name not in tensors:
            raise CheckpointError(f"{name}: missing; expected shape {shape}")
        info = tensors[name]
        if info.shape != shape:
            raise CheckpointError(f"{info.where}: shape {info.shape}, expected {shape}")
        if not is_readable(info.dtype):
            raise CheckpointError(
                f"{info.where}: dtype {printable(info.dtype)} is not supported; use a checkpoint "
                "in bf16, f16 or f32, or a GGUF file"
            )
        stacked = len(shape) == 3
        needed[name] = replace(info, shape=(prod(shape[:2]), shape[2])) if stacked else info
    return needed
