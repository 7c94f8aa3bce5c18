"""`uq compare`: reports of several bundles side by side."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from uq.commands.arguments import bundle


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("bundles", type=bundle, nargs="+", metavar="BUNDLE", help="folder or Hub id, validated")
    add("--html", type=Path, metavar="FILE", help="write a page with plots")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from uq.validate.compare import compare
    from uq.validate.compare_html import render_comparison

    comparison = compare(args.bundles)
    if args.html:
        args.html.write_text(render_comparison(comparison), encoding="utf-8", newline="\n")
    if args.json:
        print(json.dumps(comparison.to_json(), indent=1, ensure_ascii=False))
    else:
        print(comparison)
        if args.html:
            print(f"\npage: {args.html}")
    return 0
