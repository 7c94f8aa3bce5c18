"""Designs that a bundle carries: checked, with their C++, compiled or not yet.

They stand in `npu/` beside the bundle's own files and are no part of its hashed set, as reports are
not: a compiler adds to them later. `npu/npu.json` has their hashes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from uq.errors import BundleError, UsageError
from uq.formats.config import GemmaConfig
from uq.formats.decode import printable, shown
from uq.kernels.npu.kernels.attention.design import attention
from uq.kernels.npu.kernels.attention.plan import Plan, on_all_columns, plan
from uq.kernels.npu.kernels.attention.variant import Variant
from uq.kernels.npu.kernels.passthrough.design import passthrough
from uq.kernels.npu.source import parse_design, print_design
from uq.kernels.npu.toolchain.find import Toolchain
from uq.kernels.npu.toolchain.job import HEADERS, Job, Object, prepare
from uq.kernels.npu.toolchain.run import MADE, build
from uq.kernels.session import require_known

FOLDER, INDEX, SCHEMA = "npu", "npu.json", 1
DESIGN = "design.mlir"
COMPILED, NOT_COMPILED = "compiled", "not compiled"
DEVICE_OF = {"npu-aie2": "npu1", "npu-aie2p": "npu2"}
TOKENS = 512  # of the instructions; the program of the cores serves every length


def designs_for(config: GemmaConfig, device: str) -> Iterator[Job]:
    """The passthrough that proves a machine, and attention for the model's heads.

    Raises:
        UsageError: there is no attention kernel for the model's head size, or no such device.
        DeviceError: the layers have parts that no design computes.
    """
    require_known(config, "the NPU session", "use --device cpu")
    yield _job(print_design(passthrough(device, 4096)), "passthrough", ())
    for name, made in attention_plans(config, device):
        yield attention_job(made, name)


def attention_plans(config: GemmaConfig, device: str) -> Iterator[tuple[str, Plan]]:
    """The attention that a bundle carries, by name; as `designs_for`."""
    for start, length in ((0, TOKENS), (TOKENS - 1, 1)):
        for bits in (8, 4):
            variant = Variant(device, config.head_dim, bits, "decode" if start else "prefill")
            made = plan(variant, config.num_heads, config.num_kv_heads, length, start=start)
            yield attention_name(variant), on_all_columns(made)


def attention_name(variant: Variant) -> str:
    return f"attention-{variant.form}-int{variant.kv_bits}"


def attention_job(made: Plan, name: str) -> Job:
    kernels = made.variant.kernels().items()
    objects = tuple(Object(name, k.source, k.defines) for name, k in kernels)
    return _job(print_design(attention(made)), name, objects)


def carry(root: Path, jobs: Sequence[Job]) -> None:
    """Write designs and their sources into a bundle, marked as not compiled."""
    index = {"schema": SCHEMA, "designs": {job.name: _carry(root, job) for job in jobs}}
    _write_index(root, index)


def carried(root: Path) -> dict[str, tuple[Job, str]]:
    """The designs of a bundle, by name, and whether each is compiled.

    Raises: as `read_carried`.
    """
    return {name: (read_carried(root, name), state) for name, state in states(root).items()}


def states(root: Path) -> dict[str, str]:
    """Names of the designs of a bundle, and whether each is compiled.

    Raises:
        BundleError: there are none, or the index is broken.
    """
    return {name: entry["state"] for name, entry in _entries(root).items()}


def read_carried(root: Path, name: str) -> Job:
    """One design of a bundle.

    Raises:
        BundleError: a file is missing or changed, or the index is broken.
        DesignError: the verifier refuses the design.
    """
    entry, folder = _entries(root)[name], root / FOLDER / name
    _check_files(folder, entry["files"])
    return _read(folder, entry)


def _check_files(folder: Path, files: Mapping[str, str]) -> None:
    for name, digest in files.items():
        if _sha256(folder / name) != digest:
            raise BundleError(f"{folder / name}: is missing or was changed; carry it again")


def _read(folder: Path, entry: Mapping[str, Any]) -> Job:
    objects = tuple(
        Object(name, folder / made["source"], made["defines"])
        for name, made in entry["objects"].items()
    )
    return _job((folder / DESIGN).read_text(), folder.name, objects)


def compile_carried(
    root: Path, toolchain: Toolchain, *, say: Callable[[str], None] = lambda line: None
) -> list[str]:
    """Add the binaries of every design; the names of all.

    Raises:
        ToolMissing: no compiler; the designs stay as they are.
        ToolFailed: a tool failed; what was built before is kept.
    """
    entries, jobs = _entries(root), carried(root)
    for name, (job, _) in jobs.items():
        built = build(job, toolchain, root / FOLDER / name, say=say)
        entries[name]["state"] = COMPILED
        entries[name]["files"] |= {file: _sha256(built.folder / file) for file in MADE}
        _write_index(root, {"schema": SCHEMA, "designs": entries})
    return list(jobs)


def _job(text: str, name: str, objects: tuple[Object, ...]) -> Job:
    return replace(_checked(text, name), objects=objects)


@lru_cache(maxsize=16)
def _checked(text: str, name: str) -> Job:
    """Without its objects. What a bundle carries is what uq makes: one check serves both."""
    return prepare(parse_design(text, name), name=name, sources=Path(), objects=())


def _carry(root: Path, job: Job) -> dict[str, Any]:
    """Write one design; its entry in the index."""
    folder = root / FOLDER / job.name
    folder.mkdir(parents=True, exist_ok=True)
    files = {DESIGN: job.text.encode()}
    for object_ in job.objects:
        beside = sorted(object_.source.parent.iterdir())
        files |= {path.name: path.read_bytes() for path in beside if path.suffix in HEADERS}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return {
        "device": job.device,
        "state": NOT_COMPILED,
        "objects": {
            o.name: {"source": o.source.name, "defines": dict(o.defines)} for o in job.objects
        },
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }


def _entries(root: Path) -> dict[str, Any]:
    path = root / FOLDER / INDEX
    try:
        index = json.loads(path.read_text())
        if index["schema"] != SCHEMA:
            raise BundleError(f"{path}: schema {shown(index['schema'])} is not known; update uq")
        entries: dict[str, Any] = index["designs"]
        for name, entry in entries.items():
            _check_entry(path, name, entry)
    except FileNotFoundError as error:
        raise BundleError(
            f"{root}: carries no designs for an NPU; add them with: uq npu build {root}"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{path}: is no index of designs; carry them again") from error
    return entries


def _check_entry(path: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Names stay inside of the folder; nothing is opened before."""
    names = [name, *entry["files"], *(made["source"] for made in entry["objects"].values())]
    for part in names:
        if Path(part).name != part or part in ("", ".", ".."):
            raise BundleError(f"{path}: {part[:99]!r} is no name of a file in it")
    if entry["state"] not in (COMPILED, NOT_COMPILED) or DESIGN not in entry["files"]:
        raise BundleError(
            f"{path}: {printable(name)} is neither compiled nor not, or has no {DESIGN}"
        )


def _write_index(root: Path, index: Mapping[str, Any]) -> None:
    path = root / FOLDER / INDEX
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(index, indent=1) + "\n")
    os.replace(partial, path)


def _sha256(path: Path) -> str | None:
    if not path.is_file() or path.is_symlink():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def device_of(layouts: Iterable[str], wanted: str | None) -> str:
    """The NPU that a bundle is for, by the layouts of its tensors.

    Raises:
        UsageError: they do not say, and nobody else does.
    """
    named = {DEVICE_OF[layout] for layout in layouts if layout in DEVICE_OF}
    if wanted or len(named) == 1:
        return wanted or named.pop()
    raise UsageError("the bundle's layout is for no NPU; say --device npu1 or npu2")
