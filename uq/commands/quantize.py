"""`uq quantize`: read a Gemma checkpoint and write a quantized bundle."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uq.commands.arguments import (
    SCHEDULER_HELP,
    calibration_device,
    names,
    nbytes,
    real,
    scheduler,
    whole,
)
from uq.instruct import FORMATS, chat_render

if TYPE_CHECKING:
    from uq.formats.bundle import Bundle
    from uq.formats.chat import Render
    from uq.formats.checkpoint import Checkpoint
    from uq.progress import Progress
    from uq.quantize.calibration_engine import CalibrationEngine
    from uq.quantize.farm import Farm
    from uq.quantize.pipeline import QuantizeOptions

METHODS = ("auto", "rtn", "gptq")
TARGETS = ("igpu", "npu", "npu-aie2", "npu-aie2p", "cpu")
LAYERS = ("in-order", "independently")
RECIPES = ("int4", "int4-small", "int5", "int6", "int8")


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model", metavar="MODEL",
        help="checkpoint folder, GGUF file, Hub id owner/name or demo:gemma-3-270m",
    )  # fmt: skip
    add("-o", "--output", type=Path, metavar="DIR", help="default: MODEL-RECIPE-gGROUP, here")
    _add_grids(parser)
    _add_calibration(parser)
    _add_contents(parser)
    _add_source(parser)
    _add_machine(parser)
    _add_run(parser)


def _add_grids(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    grid = parser.add_mutually_exclusive_group()
    grid.add_argument(
        "--bits", type=int, choices=(4, 5, 6, 8), help="short for --recipe int4, int5, int6 or int8"
    )
    grid.add_argument(
        "--bpw",
        type=real(0, above=True),
        metavar="B",
        help="bits per weight of the whole model, spent where they matter, e.g. 6.5",
    )
    grid.add_argument("--recipe", choices=RECIPES, metavar="NAME", help=" ".join(RECIPES))
    add(
        "--group",
        type=int,
        choices=(32, 64, 128),
        help="of all linears alike; default: each its own",
    )
    add("--method", choices=METHODS, default="auto", help="default: the recipe's")


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--calibration",
        metavar="FILE|hub:REPO/FILE",
        help="text; gptq has one of its own, rtn none",
    )
    add(
        "--calibration-tokens",
        type=whole(1),
        default=45056,
        metavar="N",
        help="default: %(default)s",
    )
    add(
        "--calibration-length",
        type=whole(2),
        default=512,
        metavar="N",
        help="tokens of one sequence; default: %(default)s",
    )
    add(
        "--calibration-seed",
        type=whole(0),
        metavar="N",
        help="draw other windows of the text; default: spread evenly over it",
    )
    add(
        "--calibration-format", choices=FORMATS, default="auto",
        help="put the text to the model as it is or by its chat template; default: chat for an "
        "instruction-tuned model",
    )  # fmt: skip
    add(
        "--calibrate-layers", choices=LAYERS, default=LAYERS[0],
        help="in-order (default): each on what the quantized layers before it make of the text, "
        "whose losses it makes up for in part; independently: workers of --scheduler share them",
    )  # fmt: skip
    add(
        "--curvature", action=argparse.BooleanOptionalAction, default=None,
        help="round the rows of a linear together, by the gradients of the model's loss at its "
        "outputs: loses less, takes longer; default: on the CPU, but for INT8 and newer families",
    )  # fmt: skip


def _add_contents(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--target", type=names(TARGETS), default=("igpu",), metavar="T,T", help="default: igpu")
    add(
        "--towers", choices=("keep", "int8", "drop"), default="keep",
        help="vision and audio towers of a multimodal model: keep (default) carries them on as "
        "they are, int8 rounds their matrices row by row",
    )  # fmt: skip


def _add_source(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--revision", metavar="R", help="branch, tag or commit of a Hub id")
    add(
        "--keep", action="store_true",
        help="download the whole Hub checkpoint into the Hugging Face cache; default: fetch layer "
        "by layer and keep nothing",
    )  # fmt: skip


def _add_machine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--max-memory", type=nbytes, metavar="N",
        help="such as 10G; calibration waits on the disk and takes smaller steps where it must; "
        "default: what is free",
    )  # fmt: skip
    add(
        "--device", type=calibration_device, default="auto", metavar="D",
        help="that calibrates: auto (default; a GPU with enough memory, else the CPU), cpu, "
        "vulkan, vulkan:NUMBER or vulkan:NAME",
    )  # fmt: skip
    add(
        "--threads", type=whole(1), metavar="N",
        help="default: one per core; fewer are faster where other programs are busy",
    )  # fmt: skip
    add("--scheduler", type=scheduler, metavar="ADDRESS", help=SCHEDULER_HELP)


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dry-run", action="store_true", help="print plan, memory, disk and time, write nothing")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="insist on continuing a stopped run")
    again.add_argument("--restart", action="store_true", help="throw a stopped run away")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from uq.formats.bundle import open_bundle
    from uq.formats.checkpoint import open_checkpoint
    from uq.formats.journal import begun_revision
    from uq.formats.writer import work_folder
    from uq.progress import terminal_progress
    from uq.quantize.estimate import estimate
    from uq.quantize.pipeline import quantize

    began = time.perf_counter()
    options = read_options(args)
    out = args.output or default_folder(args.model, options)
    revision = args.revision
    if revision is None and not args.restart:  # the branch may have moved since
        revision = begun_revision(work_folder(out), args.model)
    checkpoint = open_checkpoint(args.model, revision=revision, stream=not args.keep)
    if args.dry_run:
        found = estimate(checkpoint, options)
        print(json.dumps(found.to_json(), indent=2) if args.json else f"output: {out}\n{found}")
        return 0
    progress = terminal_progress()
    engine = calibration_engine(args.device, checkpoint, options, progress, work_folder(out))
    with calibration_render(args, checkpoint, options) as render:
        options = replace(options, render=render)
        with open_farm(args.scheduler, checkpoint, options, progress) as farm:
            folder = quantize(checkpoint, out, options, progress, engine, farm)
    bundle = open_bundle(folder, verify="lazy")
    seconds = time.perf_counter() - began
    print(json.dumps(facts(bundle, seconds), indent=2) if args.json else describe(bundle, seconds))
    return 0


def open_farm(
    scheduler: str | None, checkpoint: Checkpoint, options: QuantizeOptions, progress: Progress
) -> AbstractContextManager[Farm | None]:
    """The workers of a scheduler; None for this machine alone.

    Raises:
        ToolMissing: Dask is not installed.
        DeviceError: no scheduler answers, or it has no worker that can take part.
    """
    from uq.quantize.job import plan_of

    if scheduler is None:
        return nullcontext()
    from uq.cluster.cluster import connect

    blas = plan_of(checkpoint.config, options).calibrated
    return connect(scheduler, checkpoint, progress, same_cpu=blas)


def read_options(args: argparse.Namespace) -> QuantizeOptions:
    from uq.quantize.pipeline import QuantizeOptions
    from uq.quantize.plan import choose_recipe

    return QuantizeOptions(
        recipe=choose_recipe(args.recipe, args.bits),
        group=args.group,
        bpw=args.bpw,
        method=args.method,
        targets=args.target,
        calibration=args.calibration,
        calibration_tokens=args.calibration_tokens,
        calibration_seed=args.calibration_seed,
        calibration_length=args.calibration_length,
        calibrate_layers=args.calibrate_layers,
        curvature=args.curvature,
        max_memory=args.max_memory,
        threads=args.threads,
        towers=args.towers,
        resume="require" if args.resume else "restart" if args.restart else "auto",
    )


def calibration_engine(
    device: str,
    checkpoint: Checkpoint,
    options: QuantizeOptions,
    progress: Progress,
    spill: Path,
) -> CalibrationEngine | None:
    """The GPU that calibrates, if there is one and something to calibrate; `spill` as there."""
    from uq.quantize.devices import open_engine
    from uq.quantize.job import plan_of

    if not plan_of(checkpoint.config, options).calibrated:
        return None
    if (options.independent or options.curvature) and device == "auto":
        return None
    length = min(options.calibration_length, options.calibration_tokens)
    sequences = options.calibration_tokens // length
    return open_engine(
        device,
        checkpoint.config,
        sequences,
        length,
        progress,
        spill=spill,
        limit=options.max_memory,
    )


def calibration_render(
    args: argparse.Namespace, checkpoint: Checkpoint, options: QuantizeOptions
) -> AbstractContextManager[Render | None]:
    """The chat template for the calibration text, if there is to be a text and a chat."""
    from uq.quantize.job import plan_of

    if not plan_of(checkpoint.config, options).calibrated:
        return nullcontext()
    assets = checkpoint.assets()
    return chat_render(args.calibration_format, args.model, assets, checkpoint.tokenizer)


def default_folder(model: str, options: QuantizeOptions) -> Path:
    """`google/gemma-3-270m` becomes `gemma-3-270m-int4` in the current folder."""
    name = Path(model.removeprefix("demo:")).resolve().name.removesuffix(".gguf")
    kind = options.recipe if options.bpw is None else f"bpw{options.bpw:g}"
    return Path(f"{name}-{kind}" + (f"-g{options.group}" if options.group else ""))


def facts(bundle: Bundle, seconds: float) -> dict[str, Any]:
    return {
        "path": str(bundle.path),
        "bytes": bundle.nbytes,
        "bits_per_weight": bundle.bits_per_weight,
        "sha256": bundle.sha256,
        "seconds": seconds,
    }


def describe(bundle: Bundle, seconds: float) -> str:
    from uq.text import duration, size

    figures = f"{size(bundle.nbytes)}, {bundle.bits_per_weight:.2f} bits per weight"
    next_command = shlex.join(["uq", "validate", str(bundle.path)])
    return f"{bundle.path}: {figures}, {duration(seconds)}\nnext: {next_command}"
