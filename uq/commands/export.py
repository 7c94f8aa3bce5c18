"""`uq export`: write a bundle back for other programs."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from uq.commands.arguments import bundle

if TYPE_CHECKING:
    from uq.export.export import Exported

FORMATS = ("hf", "compressed-tensors", "gguf")
DTYPES = ("float32", "float16", "bfloat16")


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("bundle", type=bundle, metavar="BUNDLE", help="folder written by uq quantize, or Hub id")
    add(
        "--format", choices=FORMATS, required=True,
        help="hf: floating-point weights for transformers; compressed-tensors: codes for "
        "transformers and vLLM; gguf: codes for llama.cpp",
    )  # fmt: skip
    add("-o", "--output", type=Path, metavar="PATH", help="default: BUNDLE-FORMAT, BUNDLE.gguf")
    add(
        "--dtype", choices=DTYPES,
        help="of what hf and compressed-tensors hold unquantized; default: float32, which is "
        "exact; gguf: of all weights; default: the bundle's codes",
    )  # fmt: skip
    add(
        "--allow-rounding", action="store_true",
        help="round scales or minima that the format cannot hold, and say what that lost",
    )  # fmt: skip
    add(
        "--zero-points", action="store_true",
        help="compressed-tensors keeps 4 bits with zero points, for vLLM alone; default: 8 bits "
        "without, which transformers loads, too",
    )  # fmt: skip
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from uq.export.export import ExportOptions, default_output, export, require_options
    from uq.formats.bundle import open_bundle
    from uq.progress import terminal_progress

    options = ExportOptions(args.format, args.dtype, args.allow_rounding, args.zero_points)
    require_options(options)
    opened = open_bundle(args.bundle, verify="lazy")
    out = args.output or default_output(opened, options)
    exported = export(opened, out, options, terminal_progress())
    print(json.dumps(facts(exported), indent=2) if args.json else describe(exported))
    return 0


def facts(exported: Exported) -> dict[str, object]:
    return asdict(exported) | {"path": str(exported.path)}


def describe(exported: Exported) -> str:
    from uq.text import size

    kinds = ", ".join(f"{count} {kind}" for kind, count in exported.stored_as.items())
    lines = [f"{exported.path}: {size(exported.nbytes)}; tensors: {kinds}"]
    if exported.rounded:
        lines.append(
            f"rounded: {len(exported.rounded)} tensors, relative error "
            f"{exported.relative_error:.2e} (root mean square)"
        )
    else:
        lines.append("exact: every weight has the bundle's value")
    lines += [f"wider: {exported.wider}"] if exported.wider else []
    return "\n".join([*lines, *(f"left out: {part}" for part in exported.left_out)])
