"""`uq publish`: put a validated bundle on the Hugging Face Hub."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uq.commands.arguments import bundle

if TYPE_CHECKING:
    from uq.publish.publish import Publication


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("bundle", type=bundle, metavar="BUNDLE", help="folder written by uq quantize, validated")
    add("repo", metavar="ORG/NAME", help="repository; made if there is none")
    add("--base-model", metavar="ORG/NAME", help="default: what the bundle was made from")
    add("--license", default="gemma", metavar="ID", help="default: %(default)s")
    add("--terms", type=Path, metavar="FILE", help="copy of the Gemma terms to publish with it")
    add("--revision", default="main", metavar="BRANCH", help="default: %(default)s")
    add("--private", action="store_true", help="make a new repository private")
    add("--replace", action="store_true", help="delete other content of the repository")
    add("--dry-run", action="store_true", help="show the card, the files and what is wrong")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from uq.errors import HubError
    from uq.publish.preflight import Target
    from uq.publish.publish import prepare, publish

    target = Target(args.repo, args.revision, args.private, args.replace)
    publication = prepare(
        args.bundle, target, base_model=args.base_model, licence=args.license, terms=args.terms
    )
    if args.dry_run and not args.json:
        print(preview(publication))
    for warning in publication.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for problem in publication.problems:
        print(f"problem: {problem}", file=sys.stderr)
    address = None
    if not args.dry_run and not publication.problems:
        address = publish(publication)
    if args.json:
        print(json.dumps(facts(publication, address), indent=2))
    elif address:
        print(address)
    if count := len(publication.problems):
        raise HubError(f"{args.repo}: {count} {'problems' if count > 1 else 'problem'}, see above")
    return 0


def preview(publication: Publication) -> str:
    from uq.text import size, table

    files = publication.files
    rows = [(file.name, size(file.size), file.sha256[:12]) for file in files]
    total = f"{len(files)} files, {size(sum(file.size for file in files))}"
    listing = table(rows, head=("file", "size", "sha256"))
    return "\n".join([publication.card, listing, total])


def facts(publication: Publication, address: str | None) -> dict[str, Any]:
    return {
        "repository": publication.target.repo,
        "revision": publication.target.revision,
        "commit": address,
        "problems": publication.problems,
        "warnings": publication.warnings,
        "files": {f.name: {"size": f.size, "sha256": f.sha256} for f in publication.files},
        "card": publication.card,
    }
