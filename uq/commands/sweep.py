"""`uq sweep`: try several recipes on a model, to choose one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uq.commands.arguments import SCHEDULER_HELP, real, scheduler, whole, whole_or_all
from uq.commands.quantize import METHODS, RECIPES
from uq.errors import UsageError
from uq.instruct import FORMATS

if TYPE_CHECKING:
    from uq.quantize.farm import Farm
    from uq.sweep import Outcome, Trial

KINDS: dict[str, Callable[[str], Any]] = {
    "bpw": real(0, above=True),
    "group": int,
    "method": str,
}  # what may stand behind a recipe's name
DEFAULT = ("int4-small", "int4", "int5", "int6", "int8")


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model", metavar="MODEL",
        help="checkpoint folder, GGUF file, Hub id owner/name or demo:gemma-3-270m",
    )  # fmt: skip
    add(
        "--recipe", action="append", type=recipe, metavar="NAME[,KEY=VALUE...]",
        help=f"one to try, again for each: {' '.join(RECIPES)} or bpw=B, followed by group=32|64|"
        f"128 or method={'|'.join(METHODS)}, e.g. int4,method=rtn; default: all names",
    )  # fmt: skip
    add(
        "-o", "--output", type=Path, metavar="FILE",
        help="keep the results here (.json); the same command tries only what is missing",
    )  # fmt: skip
    add("--calibration", metavar="FILE|hub:REPO/FILE", help="text of recipes that are calibrated")
    add(
        "--calibration-tokens",
        type=whole(1),
        default=45056,
        metavar="N",
        help="default: %(default)s",
    )
    add("--text", type=Path, metavar="FILE", help="to judge by; default: a text shipped with uq")
    add("--format", choices=FORMATS, default="auto", help="of both texts, as in uq quantize")
    add("--context", type=whole(2), default=512, metavar="N", help="window; default: %(default)s")
    add(
        "--chunks", type=whole_or_all, default=40, metavar="N|all",
        help="windows to score; default: %(default)s",
    )  # fmt: skip
    add("--revision", metavar="R", help="branch, tag or commit of a Hub id")
    add("--threads", type=whole(1), metavar="N", help="default: one per core")
    add("--scheduler", type=scheduler, metavar="ADDRESS", help=SCHEDULER_HELP)
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from uq.formats.checkpoint import open_checkpoint
    from uq.progress import terminal_progress
    from uq.sweep import outcome_table, sweep

    if args.output and not args.output.parent.is_dir():
        raise UsageError(f"-o {args.output}: there is no such folder; make it")
    checkpoint = open_checkpoint(args.model, revision=args.revision, stream=True)
    progress = terminal_progress()
    trials = [trial(args, text) for text in dict.fromkeys(args.recipe or DEFAULT)]
    farm: AbstractContextManager[Farm | None] = nullcontext()
    if args.scheduler is not None:
        from uq.cluster.cluster import connect

        farm = connect(args.scheduler, checkpoint, progress)
    with farm as opened:
        outcomes = sweep(checkpoint, trials, progress, farm=opened, kept=args.output)
    print(json.dumps(facts(outcomes), indent=1) if args.json else outcome_table(outcomes))
    return 0


def recipe(text: str) -> str:
    """`int4`, `int4,method=rtn`, `bpw=5.5`, checked."""
    try:
        parts(text)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise argparse.ArgumentTypeError(f"'{text}': {error}") from None
    return text


def parts(text: str) -> dict[str, Any]:
    """Options of the quantizer that a recipe stands for.

    Raises:
        ValueError: says which part is wrong.
    """
    found: dict[str, Any] = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        if part in RECIPES:
            found["recipe"] = part
        elif key not in KINDS or not value:
            raise ValueError(f"{part} is not one of {', '.join(RECIPES)}, bpw=, group=, method=")
        elif key == "method" and value not in METHODS:
            raise ValueError(f"method {value} is not one of {', '.join(METHODS)}")
        elif key in found:
            raise ValueError(f"{key} is given twice")
        else:
            found[key] = KINDS[key](value)
    if ("recipe" in found) == ("bpw" in found):
        raise ValueError("give one recipe or bpw=")
    return found


def trial(args: argparse.Namespace, text: str) -> Trial:
    from uq.quantize.pipeline import QuantizeOptions
    from uq.sweep import Trial

    options = QuantizeOptions(
        calibration=args.calibration,
        calibration_tokens=args.calibration_tokens,
        threads=args.threads,
        **parts(text),
    )
    return Trial(
        text,
        options,
        calibration_format=args.format,
        text_format=args.format,
        text=args.text and args.text.absolute(),
        context=args.context,
        chunks=args.chunks,
    )


def facts(outcomes: list[Outcome]) -> dict[str, Any]:
    from uq.sweep import is_best

    return {"outcomes": [asdict(o) | {"best": is_best(o, outcomes)} for o in outcomes]}
