"""`uq inspect`: show what is in a checkpoint, a bundle or a binary of an NPU."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uq.inspection import Contents


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL|BUNDLE|FILE",
        help="bundle folder, checkpoint folder, GGUF file, Hub id owner/name, demo:gemma-3-270m, "
        "or an xclbin, PDI, CDO or instruction stream of an NPU",
    )
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a Hub id")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from uq.formats.xdna import describe as npu
    from uq.inspection import inspect

    if npu.is_npu_file(args.model):
        description = npu.describe(args.model)
        print(json.dumps(description, indent=2) if args.json else "\n".join(outline(description)))
        return 0
    contents = inspect(args.model, revision=args.revision)
    print(json.dumps(asdict(contents), indent=2) if args.json else describe(contents))
    return 0


def outline(data: dict[str, Any]) -> Iterator[str]:
    """Nested objects and lists, two spaces a level; every item of a list starts with a dash."""
    for key, value in data.items():
        if isinstance(value, dict):
            yield f"{key}:"
            yield from (f"  {line}" for line in outline(value))
        elif isinstance(value, list):
            yield f"{key}:"
            for item in value:
                first, *rest = outline(item) if isinstance(item, dict) else [str(item)]
                yield f"  - {first}"
                yield from (f"    {line}" for line in rest)
        else:
            yield f"{key}: {value}".rstrip()


def describe(contents: Contents) -> str:
    from uq.text import size, table

    total = f"{size(contents.nbytes)}, {contents.bits_per_weight:.2f} bits per weight"
    parameters = f"{contents.parameters:,} parameters"
    sections = [
        f"{contents.what} {contents.name}: {parameters}, {total}",
        table(_model(contents.config)),
        _kinds(contents),
        table(_flat(contents.plan | contents.provenance)),
        _towers(contents),
        "\n".join(f"left out: {part}" for part in contents.left_out),
    ]
    return "\n\n".join(filter(None, sections))


def _towers(contents: Contents) -> str:
    from uq.text import size

    towers = contents.towers
    if towers is None:
        return ""
    kept = "as in the source" if contents.what == "bundle" else "which uq quantize keeps"
    how = f"{towers.int8} of them INT8" if towers.int8 else kept
    return f"towers and projectors: {towers.tensors} tensors, {size(towers.nbytes)}, {how}"


def _kinds(contents: Contents) -> str:
    """One line per kind of tensor; errors are known of a bundle only."""
    from uq.text import size, table

    head = ("kind", "tensors", "weights", "size", "bits/weight", "stored as", "mean error")
    rows = [
        (
            kind.kind,
            kind.tensors,
            kind.weights,
            size(kind.nbytes),
            f"{kind.bits_per_weight:.2f}",
            ", ".join(kind.stored_as),
            "" if kind.relative_error is None else f"{kind.relative_error:.4f}",
        )
        for kind in contents.kinds
    ]
    columns = 7 if contents.what == "bundle" else 6
    return table([row[:columns] for row in rows], head=head[:columns])


def _model(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    full = config["layer_types"].count("full_attention")
    sliding = config["num_layers"] - full
    window = f", {sliding} with a window of {config['sliding_window']}" if sliding else ""
    heads = f"{config['num_heads']} heads of {config['head_dim']}, {config['num_kv_heads']} KV"
    if own := config.get("full"):
        heads += f", in full layers of {own['head_dim']}, {own['num_kv_heads']} KV"
    sizes = f"hidden {config['hidden_size']}, MLP {config['intermediate_size']}"
    tied = "tied head" if config["tied_head"] else "head of its own"
    yield "family", config["family"]
    yield "layers", f"{config['num_layers']}: {full} with full attention{window}"
    yield "sizes", f"{sizes}, {heads}"
    yield from _additions(config)
    yield "vocabulary", f"{config['vocab_size']} tokens, {tied}"
    yield "context", f"{config['max_position_embeddings']} tokens"


def _additions(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What the layers of some models have besides."""
    if shared := config.get("kv_shared_layers"):
        yield "shared", f"the last {shared} layers read keys and values of others"
    if table := config.get("per_layer"):
        yield "per layer", f"an embedding of {table['vocab_size']} tokens, {table['size']} channels"
    if experts := config.get("experts"):
        size = experts["intermediate_size"]
        yield "experts", f"{experts['active']} of {experts['count']}, MLP {size}"


def _flat(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Leaves of nested objects with dotted names; what is None is left away."""
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", str(value)
