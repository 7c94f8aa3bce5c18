"""Options of every command that lets a model write: how a token is chosen, and where it runs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from uq.commands.arguments import DEVICE_HELP, device, real, whole

if TYPE_CHECKING:
    from uq.kernels.numerics import Numerics
    from uq.kernels.session import Sampling


def add_sampling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--temperature", type=real(0), default=0.0, metavar="T",
        help="0 (default): always the likeliest token; above: sample",
    )  # fmt: skip
    add("--top-k", type=whole(0), default=0, metavar="K", help="0 (default): all tokens")
    add("--top-p", type=real(0, 1, above=True), default=1.0, metavar="P", help="default: 1")
    add("--seed", type=whole(0, 2**63 - 1), default=0, metavar="S", help="default: %(default)s")


def add_speculate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--speculate", action="store_true",
        help="check several guessed tokens at once where the text repeats itself, on a GPU; "
        "greedy text stays the same",
    )  # fmt: skip


def read_sampling(args: argparse.Namespace) -> Sampling:
    from uq.kernels.session import Sampling

    return Sampling(args.temperature, args.top_k, args.top_p, args.seed)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=device, default="auto", metavar="D", help=DEVICE_HELP)
    parser.add_argument("--threads", type=whole(1), metavar="N", help="default: one per core")
    parser.add_argument(
        "--activations", choices=("float", "int8"), default="float",
        help="int8: inputs of linears in 8 instead of 16 bits, on a GPU; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--kv", choices=("float", "int8", "int4"), default="float",
        help="int8: a KV cache of about half the size, on a GPU; an NPU has int8 (its default) and "
        "int4; default: %(default)s",
    )  # fmt: skip


def read_numerics(args: argparse.Namespace) -> Numerics:
    from uq.kernels.numerics import ACTIVATIONS, KV, Numerics

    return Numerics(ACTIVATIONS[args.activations], KV[args.kv])
