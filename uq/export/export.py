"""A bundle, written back for other programs, with no second rounding that was not asked for."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from uq.errors import UsageError
from uq.export.compressed import (
    compressed_shards,
    kept_modules,
    quantization_config,
    require_scales,
    schemes,
    widening,
)
from uq.export.folder import FloatTensors, Shards, shards, write_folder
from uq.export.gguf_file import write_gguf
from uq.export.gguf_model import require_known, takes_merges
from uq.export.gguf_tensors import Storage, gguf_tensors
from uq.export.gguf_tensors import widening as widened_blocks
from uq.export.gguf_vocabulary import vocabulary
from uq.export.huggingface import folder_assets
from uq.export.multimodal import tower_modules, with_towers
from uq.export.stored import DTYPES, Losses, StoredTensor
from uq.formats.bundle import Bundle
from uq.formats.checkpoint.checkpoint import TOKENIZER
from uq.formats.disk import disk_errors, require_free, sync_folder
from uq.formats.manifest import TOWERS
from uq.progress import Progress, SilentProgress


@dataclass(frozen=True)
class ExportOptions:
    """What the user may choose.

    Attributes:
        format: one of `FORMATS`.
        dtype: `float32`, `float16` or `bfloat16`, of what a folder holds unquantized, which is
            float32 by default, and of a GGUF file's matrices, which have the bundle's codes.
        allow_rounding: round scales and minima that the format cannot hold exactly.
        zero_points: compressed-tensors may have packed zero points, which vLLM reads and
            transformers does not.
    """

    format: str = "hf"
    dtype: str | None = None
    allow_rounding: bool = False
    zero_points: bool = False

    @property
    def folder_dtype(self) -> str:
        return self.dtype or "float32"


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        nbytes: of all files.
        stored_as: how many tensors are stored in each way.
        rounded: tensors whose values differ from the bundle's.
        relative_error: of these, root mean square over root mean square; 0 without any.
        left_out: one sentence for each part of the bundle that the format has no place for.
        wider: what takes more bits than in the bundle, and why; None where nothing does.
    """

    path: Path
    nbytes: int
    stored_as: dict[str, int]
    rounded: tuple[str, ...]
    relative_error: float
    left_out: tuple[str, ...] = ()
    wider: str | None = None


SILENT = SilentProgress()
TOWERS_LEFT = "vision and audio towers: llama.cpp reads them from a file of their own (mmproj)"


@dataclass(frozen=True)
class Draft:
    """What will be written, checked.

    Attributes:
        write: writes it into an empty folder; returns the file or the folder to be renamed.
    """

    tensors: Sequence[StoredTensor]
    write: Callable[[Path, Progress], Path]
    left_out: tuple[str, ...] = ()
    wider: str | None = None


def default_output(bundle: Bundle, options: ExportOptions) -> Path:
    """In the current folder: BUNDLE.gguf, or BUNDLE-FORMAT."""
    return Path(bundle.name + (".gguf" if options.format == "gguf" else f"-{options.format}"))


def require_options(options: ExportOptions) -> None:
    """Raises UsageError: an unknown format or type, or options that do not go together."""
    form, dtype = options.format, options.dtype
    if form not in DRAFTS:
        raise UsageError(f"format {form!r} is not known; use {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not known; use {', '.join(DTYPES)}")
    if form == "gguf" and dtype and options.allow_rounding:
        raise UsageError("--allow-rounding goes with the codes in a GGUF file, not with --dtype")
    if form != "compressed-tensors" and options.zero_points:
        raise UsageError(f"--zero-points goes with compressed-tensors, not with {form}")


def export(
    bundle: Bundle, out: Path, options: ExportOptions, progress: Progress = SILENT
) -> Exported:
    """Write `bundle` to `out`: a folder, or a GGUF file.

    Raises:
        UsageError: `out` exists, the options do not go together, or the format cannot hold the
            bundle exactly and `allow_rounding` is not given; names the tensors and what would be
            lost.
        BundleError: a file of the bundle is damaged, or no other program has such a model.
        DeviceError: the disk is full or broken.
    """
    require_options(options)
    losses = Losses()
    with work_folder(out) as work:
        draft = DRAFTS[options.format](bundle, options, losses)
        require_free(out, sum(tensor.nbytes for tensor in draft.tensors))
        made = draft.write(work, progress)
        nbytes = sum(file.stat().st_size for file in _files(made))
        with disk_errors(out, 0):
            made.rename(out)
            sync_folder(out.absolute().parent)
    kinds = Counter(tensor.kind for tensor in draft.tensors)
    return Exported(
        path=out,
        nbytes=nbytes,
        stored_as=dict(kinds.most_common()),
        rounded=tuple(losses.tensors),
        relative_error=losses.relative_error,
        left_out=draft.left_out,
        wider=draft.wider,
    )


def draft_hf(bundle: Bundle, options: ExportOptions, losses: Losses) -> Draft:
    """Floating-point weights."""
    assets = folder_assets(bundle, options.folder_dtype, {})
    floats = FloatTensors(bundle, options.folder_dtype, losses)
    files = shards(bundle, floats, floats.matrix)
    files = with_towers(files, bundle.towers(), options.folder_dtype, losses)
    return _folder_draft(files, assets)


def draft_compressed(bundle: Bundle, options: ExportOptions, losses: Losses) -> Draft:
    """Packed codes of the linears; tables and norms in floating point."""
    chosen = schemes(bundle, zero_points=options.zero_points)
    if not options.allow_rounding:
        require_scales(bundle, chosen, options.folder_dtype)
    towers = bundle.towers()
    files = compressed_shards(bundle, chosen, options.folder_dtype, losses)
    files = with_towers(files, towers, options.folder_dtype, losses)
    ignored = [*kept_modules(bundle.config), *tower_modules(towers)]
    config = {"quantization_config": quantization_config(chosen, ignored)}
    assets = folder_assets(bundle, options.folder_dtype, config)
    return _folder_draft(files, assets, widening(bundle, chosen, options.folder_dtype))


def draft_gguf(bundle: Bundle, options: ExportOptions, losses: Losses) -> Draft:
    """GGML blocks, or floats."""
    require_known(bundle.config)
    storage = Storage(options.dtype, options.allow_rounding)
    tensors = gguf_tensors(bundle, losses, storage)
    bundle.tokenizer()  # says what is wrong with a broken one
    scored = not takes_merges(bundle.config)
    words = vocabulary(bundle.asset(TOKENIZER), bundle.config.vocab_size, scored=scored)
    left_out: tuple[str, ...] = () if TOWERS not in bundle.manifest.files else (TOWERS_LEFT,)
    if words.beyond:
        left_out += (f"tokens that the embedding has no row of: {' '.join(words.beyond)}",)

    def write(work: Path, progress: Progress) -> Path:
        return write_gguf(work, bundle, tensors, words, progress)

    return Draft(tensors, write, left_out, widened_blocks(bundle, tensors))


DRAFTS = {"hf": draft_hf, "compressed-tensors": draft_compressed, "gguf": draft_gguf}
FORMATS = tuple(DRAFTS)


def _folder_draft(files: Shards, assets: dict[str, bytes], wider: str | None = None) -> Draft:
    tensors = [tensor for file in files for tensor in file]

    def write(work: Path, progress: Progress) -> Path:
        return write_folder(work, files, assets, progress)

    return Draft(tensors, write, wider=wider)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else list(path.iterdir())


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, which is gone afterwards, whatever happens in between.

    Raises:
        UsageError: `out` or the folder exists.
        DeviceError: the disk is full or broken.
    """
    if os.path.lexists(out):
        raise UsageError(f"{out}: exists; remove it or choose another -o")
    work = out.with_name(out.name + ".partial")
    if os.path.lexists(work):
        raise UsageError(
            f"{work}: exists: uq writes it, or was killed; choose another -o, or remove it unless "
            "it is of a uq quantize that is to be continued"
        )
    with disk_errors(work, 0):
        work.mkdir(parents=True)
    try:
        yield work
    finally:
        if work.exists():
            shutil.rmtree(work)
