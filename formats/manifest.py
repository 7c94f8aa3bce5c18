"""The manifest of a bundle: frozen dataclasses, and what they must agree on.

Field by field: `formats/README.md`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath

from uq import __version__
from uq.errors import BundleError
from uq.formats.config import GemmaConfig, layer_tensor
from uq.formats.decode import OPTIONAL, decode, parse_json, printable, shown
from uq.formats.layout import Layout
from uq.formats.layouts import LAYOUTS
from uq.formats.model_check import check_model
from uq.formats.spec import BITS, GROUPS, SCALE_BITS, ZERO_POINT_BITS, Spec

SCHEMA = 4  # the newest; a bundle has the oldest that can say what it holds
MODEL_SCHEMA = 3  # the first whose models may have what `GemmaConfig.extensions` names
STEP_SCHEMA = 4  # the first whose scales may have 8 bits
FIRST_BITS = (4, 8)  # of schema 1, which has no zero points
MANIFEST = "manifest.json"
CHECKSUM = "manifest.sha256"
REPORT_FILES = ("report.json", "report.html", "README.md")
UNLISTED = frozenset({MANIFEST, CHECKSUM, *REPORT_FILES})
KERNELS: frozenset[str] = frozenset()  # names of required_kernels that this version knows
SHARD_SUFFIX = ".safetensors"
TOWERS = "towers.safetensors"  # no shard: tensors of the source beside the text model
TOWERS_SCHEMA = 3  # the first that has it


@dataclass(frozen=True)
class FileRecord:
    """`size` in bytes, `sha256` as 64 lower-case hex digits."""

    size: int
    sha256: str


@dataclass(frozen=True)
class TensorRecord:
    """A quantized tensor: (out, in) shape, grid, layout, and the shard that holds it."""

    shape: tuple[int, int]
    bits: int
    group: int
    layout: str
    method: str
    relative_error: float | None
    file: str
    zero_point: bool = field(default=False, metadata=OPTIONAL)
    scale_bits: int = field(default=16, metadata=OPTIONAL)
    fallback: str | None = field(default=None, metadata=OPTIONAL)

    @property
    def spec(self) -> Spec:
        return Spec(self.bits, self.group, self.zero_point, self.scale_bits)

    @property
    def order(self) -> Layout:
        return LAYOUTS[self.layout]

    @property
    def schema(self) -> int:
        """The oldest schema that can describe the tensor."""
        if self.spec.row_step:
            return STEP_SCHEMA
        return 1 if self.bits in FIRST_BITS and not self.zero_point else 2

    @property
    def stored_shape(self) -> tuple[int, int]:
        """(blocks, bytes of a block), as in the shard."""
        rows, cols = self.shape
        return self.order.block_count(rows, self.spec), self.order.block(cols, self.spec).itemsize


@dataclass(frozen=True)
class ArrayRecord:
    """A plain float32 array."""

    shape: tuple[int, ...]
    dtype: str
    file: str


@dataclass(frozen=True)
class SourceFile:
    """A weight file that was read.

    Attributes:
        content: SHA-256 of what was read of it, as `formats/README.md` describes it.
        sha256: of the file itself, where the place it was read from states it.
    """

    size: int
    content: str | None = field(default=None, metadata=OPTIONAL)
    sha256: str | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class Provenance:
    """The checkpoint that was read: how it was found, and its weight files."""

    kind: str
    id: str
    revision: str | None
    dtype: str
    files: Mapping[str, SourceFile]


@dataclass(frozen=True)
class Calibration:
    """The text whose activations steered the quantization."""

    name: str
    sha256: str
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All about a bundle but the weights; the writer fills in `schema` and the last three."""

    schema: int = 1
    uq: str = __version__
    model: GemmaConfig
    recipe: str
    options: Mapping[str, object]
    provenance: Provenance
    calibration: Calibration | None
    left_out: tuple[str, ...]
    tools: Mapping[str, str]
    required_kernels: tuple[str, ...] = ()
    tensors: Mapping[str, TensorRecord] = field(default_factory=dict)
    arrays: Mapping[str, ArrayRecord] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)

    @property
    def model_schema(self) -> int:
        """The oldest schema that can describe the model."""
        return MODEL_SCHEMA if self.model.extensions() else 1

    def to_bytes(self) -> bytes:
        tree = asdict(self) | {"model": self.model.to_json()}
        for tensor in tree["tensors"].values():
            if not tensor["zero_point"]:
                del tensor["zero_point"]  # schema 1 does not know it
            if tensor["scale_bits"] == 16:
                del tensor["scale_bits"]  # nor do schemas below 4 know this
            if tensor["fallback"] is None:
                del tensor["fallback"]
        text = json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False)
        return text.encode() + b"\n"


def parse_manifest(data: bytes) -> Manifest:
    """The manifest in `data`, checked.

    Raises:
        BundleError: a newer schema, or any field that is missing, unknown, of the wrong type, out
            of range or in contradiction to the model.
    """
    value = parse_json(data, MANIFEST)
    schema = value.get("schema") if isinstance(value, dict) else None
    if type(schema) is int and schema > SCHEMA:
        raise BundleError(
            f"{MANIFEST}: schema {schema} is newer than {SCHEMA}, the newest that uq {__version__} "
            f"reads; update uq (the bundle was written by {str(value.get('uq'))[:20]!r})"
        )
    manifest = decode(Manifest, value, MANIFEST)
    check_manifest(manifest)
    return manifest


def check_manifest(manifest: Manifest) -> None:
    """Everything that can be said without looking at other files.

    Raises:
        BundleError: names the field.
    """
    if not 1 <= manifest.schema <= SCHEMA:
        raise BundleError(f"{MANIFEST}: schema: expected 1 to {SCHEMA}, found {manifest.schema}")
    if unknown := sorted(set(manifest.required_kernels) - KERNELS):
        raise BundleError(
            f"{MANIFEST}: required_kernels: {shown(unknown[0])} is not known; update uq"
        )
    check_model(manifest.model, f"{MANIFEST}: model")
    if manifest.model.extensions() and manifest.schema < MODEL_SCHEMA:
        raise BundleError(
            f"{MANIFEST}: schema {manifest.schema} has no {manifest.model.extensions()[0]}"
        )
    if TOWERS in manifest.files and manifest.schema < TOWERS_SCHEMA:
        raise BundleError(f"{MANIFEST}: schema {manifest.schema} has no {TOWERS}")
    for name, record in manifest.files.items():
        _check_file(name, record)
    weights, gains = expected_tensors(manifest.model)
    _check_names("tensors", manifest.tensors, weights)
    _check_names("arrays", manifest.arrays, gains)
    for name, tensor in manifest.tensors.items():
        _check_tensor(f"{MANIFEST}: tensors.{name}", tensor, weights[name], manifest.schema)
        _check_shard(f"{MANIFEST}: tensors.{name}", tensor.file, manifest.files)
    for name, array in manifest.arrays.items():
        where = f"{MANIFEST}: arrays.{name}"
        _one_of(f"{where}.dtype", array.dtype, ("float32",))
        _check_shape(where, array.shape, gains[name])
        _check_shard(where, array.file, manifest.files)


def expected_tensors(
    config: GemmaConfig,
) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, ...]]]:
    """Shapes of the quantized weights and of the float32 arrays of a model, by name."""
    weights = config.table_shapes()
    arrays: dict[str, tuple[int, ...]] = config.model_kept()
    for name, gain in config.model_norms().items():
        arrays[gain_name(name)] = gain
    for layer in range(config.num_layers):
        for role, shape in config.linear_shapes(layer).items():
            weights[layer_tensor(layer, role)] = shape
        for role, width in config.norm_shapes(layer).items():
            arrays[gain_name(layer_tensor(layer, role))] = width
        for role, kept in config.kept_shapes(layer).items():
            arrays[layer_tensor(layer, role)] = kept
    return weights, arrays


def is_shard(file: str) -> bool:
    """Whether a listed file holds tensors of the text model."""
    return file.endswith(SHARD_SUFFIX) and file != TOWERS


def gain_name(norm: str) -> str:
    """Name under which the gain of a norm is stored: `.weight` becomes `.gain`."""
    return norm.removesuffix(".weight") + ".gain"


def checksum_line(sha256: str) -> bytes:
    """Content of `manifest.sha256`, as `sha256sum` prints it."""
    return f"{sha256}  {MANIFEST}\n".encode()


def check_path(name: str) -> None:
    """Refuse a file name that could leave the bundle's folder.

    Raises:
        BundleError: absolute, `..`, or characters that mean something on some system.
    """
    parts = name.split("/")
    if (
        any(part in ("", ".", "..") for part in parts)
        or re.search(r"[\\:\x00-\x1f\x7f\ud800-\udfff]", name)
        or PurePosixPath(name).is_absolute()
    ):
        raise BundleError(
            f"{MANIFEST}: files: {shown(name)} is not a relative path inside the bundle"
        )


def _check_file(name: str, record: FileRecord) -> None:
    check_path(name)
    where = f"{MANIFEST}: files.{printable(name)}"
    if name in UNLISTED:
        raise BundleError(f"{where}: is written outside the hashed set and cannot be listed")
    if record.size < 0:
        raise BundleError(f"{where}.size: {record.size} is negative")
    if not re.fullmatch(r"[0-9a-f]{64}", record.sha256):
        raise BundleError(f"{where}.sha256: expected 64 lower-case hex digits")


def _check_names(
    field_name: str, found: Mapping[str, object], expected: Mapping[str, object]
) -> None:
    if missing := [name for name in expected if name not in found]:
        raise BundleError(f"{MANIFEST}: {field_name}: {missing[0]} is missing")
    if extra := [name for name in found if name not in expected]:
        raise BundleError(
            f"{MANIFEST}: {field_name}: {printable(extra[0])} is no tensor of this model"
        )


def _check_tensor(where: str, record: TensorRecord, shape: tuple[int, int], schema: int) -> None:
    _one_of(f"{where}.bits", record.bits, FIRST_BITS if schema == 1 else BITS)
    if record.zero_point and schema == 1:
        raise BundleError(f"{where}.zero_point: schema 1 has no zero points")
    if record.zero_point and record.bits not in ZERO_POINT_BITS:
        raise BundleError(f"{where}.zero_point: INT{record.bits} has no zero points")
    scale_bits = SCALE_BITS if schema >= STEP_SCHEMA else (16,)
    _one_of(f"{where}.scale_bits", record.scale_bits, scale_bits)
    _one_of(f"{where}.group", record.group, GROUPS)
    _one_of(f"{where}.layout", record.layout, tuple(LAYOUTS))
    _check_shape(where, record.shape, shape)
    if shape[1] % record.group:
        raise BundleError(f"{where}.group: {shape[1]} columns do not divide by {record.group}")


def _check_shard(where: str, file: str, files: Mapping[str, FileRecord]) -> None:
    if file not in files or not is_shard(file):
        raise BundleError(f"{where}.file: {shown(file)} is no shard of this bundle")


def _check_shape(where: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise BundleError(
            f"{where}.shape: {shown(list(found))}, but the model asks for {list(expected)}"
        )


def _one_of(where: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise BundleError(f"{where}: {shown(value)} is not one of {', '.join(map(str, allowed))}")
