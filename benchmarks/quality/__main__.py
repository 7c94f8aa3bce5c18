"""`python -m benchmarks.quality`: measure every row, write JSON and Markdown."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from benchmarks import quality
from benchmarks.quality.calibration import draw
from benchmarks.quality.measure import Bench
from benchmarks.quality.peers.foreign import Foreign
from benchmarks.quality.peers.llama_cpp import LlamaCpp
from benchmarks.quality.peers.peer import Peer
from benchmarks.quality.peers.uq import Uq
from benchmarks.quality.render import markdown, splice
from benchmarks.quality.results import Results, RowResult, TextFacts, completed
from benchmarks.quality.rows import AUTO_ROUND, GPTQ, HQQ, LLAMA, UQ, Row, all_rows
from benchmarks.quality.scoring import Scorer
from benchmarks.quality.source import Reference, prepare
from benchmarks.quality.steps import write_json
from benchmarks.quality.texts import CONTEXT, EvaluationText, read_texts, text_files
from benchmarks.quality.torch_scoring import TorchModel
from uq import __version__
from uq.cli import explain
from uq.commands.arguments import whole
from uq.errors import UqError
from uq.formats.checkpoint.cache import cache_folder
from uq.formats.checkpoint.demo import DEMO
from uq.machine import examine
from uq.progress import terminal_progress
from uq.quantize.pipeline import QuantizeOptions

SCHEMA = 1
TEXTS = Path(__file__).parents[1] / "texts"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=quality.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", default=DEMO, help="what `uq quantize` takes; default: %(default)s")
    add(
        "--llama-bin",
        type=Path,
        metavar="DIR",
        help="folder of llama-quantize, llama-imatrix, llama-perplexity",
    )
    add(
        "--peer-python", default=sys.executable, metavar="FILE",
        help="Python that has auto-round, hqq, gptqmodel; default: this one",
    )  # fmt: skip
    add(
        "--peer-device", default="cpu", metavar="DEVICE",
        help="where AutoRound and GPTQModel run, such as cuda; default: %(default)s",
    )  # fmt: skip
    add("--score-device", metavar="DEVICE", help="score on it by torch, such as cuda")
    add("--texts", type=Path, default=TEXTS, metavar="DIR", help="*.txt; default: %(default)s")
    add("--text", type=re.compile, metavar="PATTERN", help="score only texts of such a name")
    add("--windows", type=whole(1), default=24, metavar="N", help="per text; default: %(default)s")
    add("--draws", type=whole(1), default=3, metavar="N", help="calibrations; default: %(default)s")
    add(
        "--draw", type=whole(0), metavar="N",
        help="make this one alone, counted from 0; several runs may share a work folder",
    )  # fmt: skip
    add(
        "--calibration-tokens", type=whole(2), metavar="N",
        default=QuantizeOptions().calibration_tokens, help="of a draw; default: %(default)s",
    )  # fmt: skip
    add("--only", type=re.compile, metavar="PATTERN", help="make only rows of such a name")
    add(
        "--row", action="append", default=[], metavar="NAME=ARGS",
        help="one more row: arguments of uq quantize",
    )  # fmt: skip
    add("--against", default="uq int4", metavar="ROW", help="compared with; default: %(default)s")
    add(
        "--work", type=Path, metavar="DIR", default=cache_folder() / "quality",
        help="what is kept between runs; default: %(default)s",
    )  # fmt: skip
    add(
        "--quantize-only", action="store_true",
        help="keep the models in the work folder, for a run that scores them",
    )  # fmt: skip
    add(
        "--with", dest="others", type=Path, action="append", default=[], metavar="FILE",
        help="quality.json of another machine: draws of its rows that are not measured here",
    )  # fmt: skip
    add("--keep", action="store_true", help="leave the quantized models in the work folder")
    add("--doc", type=Path, metavar="FILE", help="page whose tables are replaced")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    try:
        run(parser().parse_args(argv))
    except (UqError, OSError, KeyboardInterrupt) as error:
        message, code = explain(error)
        print("quality:", message, file=sys.stderr)
        return code
    return 0


def run(args: argparse.Namespace) -> None:
    """Measure row by row; JSON and Markdown are written anew after each."""
    work = args.work.resolve()
    reference = prepare(args.model, work)
    rows = all_rows(reference.checkpoint.config, args.row)
    bench = open_bench(args, work, reference)
    found: list[RowResult] = []
    for row in rows:
        chosen = args.only is None or bool(args.only.search(row.name))
        found.append(bench.measure(row, chosen=chosen))
        save(args, work, results(bench, reference, args, [*found, *_waiting(rows[len(found) :])]))
    print((work / "quality.md").read_text("utf-8"))


def open_bench(args: argparse.Namespace, work: Path, reference: Reference) -> Bench:
    """Raises UqError: no text is left, one cannot be read, or torch cannot use the device."""
    torch = None
    if args.score_device is not None:
        torch = TorchModel(reference.folder, reference.checkpoint, args.score_device)
    tokenizer = reference.checkpoint.tokenizer()
    files = {
        name: path
        for name, path in text_files(args.texts).items()
        if args.text is None or args.text.search(name)
    }
    machine = examine()
    where = f"{machine.cpu}, {machine.threads} threads"
    peer = reference, args.peer_python
    llama = LlamaCpp(reference, args.llama_bin, work, where, machine.threads)
    peers: dict[str, Peer] = {
        UQ: Uq(reference, args.calibration_tokens),
        LLAMA: llama,
        AUTO_ROUND: Foreign("auto-round", "auto_round_child.py", *peer, args.peer_device),
        HQQ: Foreign("hqq", "hqq_child.py", *peer),
        GPTQ: Foreign("gptqmodel", "gptqmodel_child.py", *peer, args.peer_device),
    }
    return Bench(
        peers=peers,
        scorer=Scorer(reference.checkpoint, work, terminal_progress(), torch),
        texts=[] if args.quantize_only else read_texts(files, tokenizer, args.windows),
        draws=[draw(n, tokenizer, args.calibration_tokens, work) for n in range(args.draws)],
        chosen_draw=args.draw,
        work=work,
        machine=where,
        keep=args.keep or args.quantize_only,
        engine=llama.engine,
    )


def results(
    bench: Bench, reference: Reference, args: argparse.Namespace, rows: Sequence[RowResult]
) -> Results:
    return Results(
        schema=SCHEMA,
        uq=__version__,
        date=datetime.now(UTC).date().isoformat(),
        machine=bench.machine,
        reference=reference.name,
        reference_sha256=" ".join(reference.sha256.values()),
        context=CONTEXT,
        calibration_tokens=bench.draws[0].count,
        draws=args.draws,
        against=args.against,
        texts=tuple(_facts(text) for text in bench.texts),
        rows=tuple(rows),
    )


def save(args: argparse.Namespace, work: Path, found: Results) -> None:
    """`quality.json` and `quality.md` in the work folder, and the page if there is one."""
    for other in args.others:
        found = completed(found, Results.from_json(json.loads(other.read_text("utf-8"))))
    tables = markdown(found)
    write_json(work / "quality.json", found.to_json())
    (work / "quality.md").write_text(tables, "utf-8")
    if args.doc is not None:
        splice(args.doc, tables)


def _facts(text: EvaluationText) -> TextFacts:
    windows, context = text.windows.shape
    scored = windows * (context - 1 - context // 2)
    tokens = np.ascontiguousarray(text.windows, "<i4").tobytes()
    return TextFacts(text.name, windows, scored, hashlib.sha256(tokens).hexdigest())


def _waiting(rows: Sequence[Row]) -> list[RowResult]:
    return [
        RowResult(row.name, row.peer, row.arguments, row.calibrated, (), "not reached yet")
        for row in rows
    ]


if __name__ == "__main__":
    raise SystemExit(main())
