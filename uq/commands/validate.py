"""`uq validate`: compare a bundle with its float32 reference."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from uq.commands.arguments import DEVICE_HELP, bundle, device, real, whole, whole_or_all
from uq.errors import UsageError
from uq.instruct import FORMATS, chat_render

if TYPE_CHECKING:
    from collections.abc import Callable

    from uq.formats.bundle import Bundle
    from uq.formats.tokenizer import Tokenizer


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("bundle", type=bundle, metavar="BUNDLE", help="folder written by uq quantize, or Hub id")
    add("--reference", metavar="MODEL", help="default: the checkpoint the bundle was made from")
    add("--revision", metavar="R", help="branch, tag or commit of the reference on the Hub")
    add(
        "--keep", action="store_true",
        help="download a reference on the Hub into the Hugging Face cache; default: fetch layer by "
        "layer, twice, and keep nothing",
    )  # fmt: skip
    add("--device", type=device, default="auto", metavar="D", help=DEVICE_HELP)
    add("--reference-device", type=device, default="auto", metavar="D", help="of the reference")
    add("--text", type=Path, metavar="FILE", help="UTF-8 text; default: a text shipped with uq")
    add(
        "--text-format", choices=FORMATS, default="auto",
        help="put the text to the model as it is or by its chat template; default: chat for an "
        "instruction-tuned model",
    )  # fmt: skip
    add("--context", type=whole(2), default=512, metavar="N", help="window; default: %(default)s")
    add(
        "--chunks", type=whole_or_all, default=40, metavar="N|all",
        help="windows to score; default: %(default)s",
    )  # fmt: skip
    add(
        "--reference-states", type=Path, metavar="FILE",
        help="keep what the reference computes here (.npz), for the next bundle of the same model",
    )  # fmt: skip
    add(
        "--activations", choices=("float", "int8"), default="float",
        help="also tell what INT8 inputs of the linears lose, emulated; --device vulkan runs with "
        "them; default: %(default)s",
    )  # fmt: skip
    add(
        "--kv", choices=("float", "int8", "int4"), default="float",
        help="also tell what a quantized KV cache loses, emulated; --device vulkan runs with int8; "
        "default: %(default)s",
    )  # fmt: skip
    add(
        "--threads", type=whole(1), metavar="N",
        help="default: one per core; fewer are faster where other programs are busy",
    )  # fmt: skip
    add("--max-kld", type=real(0), metavar="X", help="fail if the mean KL divergence is above")
    add("--max-ppl-ratio", type=real(0, above=True), metavar="X", help="fail if PPL ratio is above")
    add("--min-tps", type=real(0), metavar="X", help="fail if decode tokens/s are below")
    add("--no-save", action="store_true", help="write no report into the bundle")
    add("--no-speed", action="store_true", help="measure no tokens/s")
    add("--json", action="store_true", help="print the report as one JSON object")


def run(args: argparse.Namespace) -> int:
    from uq.formats.bundle import open_bundle
    from uq.formats.checkpoint import open_checkpoint
    from uq.kernels.backends import first_run_note
    from uq.progress import terminal_progress
    from uq.validate.files import HTML_NAME, require_savable, save_report
    from uq.validate.table import format_report, wants_colour
    from uq.validate.validate import ValidateOptions, validate

    if args.revision and not args.reference:
        raise UsageError("--revision belongs to --reference; give both")
    options = ValidateOptions(
        device=args.device,
        reference_device=args.reference_device,
        threads=args.threads,
        keep=args.keep,
        text=args.text,
        context=args.context,
        max_chunks=args.chunks,
        states=args.reference_states,
        activations=args.activations,
        kv=args.kv,
        speed=not args.no_speed,
        max_kld=args.max_kld,
        max_ppl_ratio=args.max_ppl_ratio,
        min_tps=args.min_tps,
        command=args.command_line,
    )
    bundle = open_bundle(args.bundle)
    save = not args.no_save and args.bundle.exists()  # a download stays as it came
    if save:
        require_savable(bundle.path)
    reference = None
    if args.reference:
        reference = open_checkpoint(args.reference, revision=args.revision, stream=not args.keep)
    if note := first_run_note(args.device):
        print(note, file=sys.stderr)
    with chat_render(args.text_format, *described(bundle)) as render:
        options = replace(options, render=render)
        report = validate(bundle, reference, options, terminal_progress())
    if args.json:
        print(json.dumps(report.to_json(), indent=1, ensure_ascii=False))
    else:
        print(format_report(report, colour=wants_colour(sys.stdout)))
    if save:
        save_report(report, bundle.path)
    if save and not args.json:
        print(f"\nreport: {bundle.path / HTML_NAME}")
    sys.stdout.flush()
    report.check()
    return 0


def described(bundle: Bundle) -> tuple[str, dict[str, bytes], Callable[[], Tokenizer]]:
    """What tells whether the model was trained on chats: its name, its files, its tokenizer."""
    from uq.chat import CHAT_FILES

    assets = {name: bundle.asset(name) for name in CHAT_FILES if name in bundle.manifest.files}
    return bundle.manifest.provenance.id, assets, bundle.tokenizer
