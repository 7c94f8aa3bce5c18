"""Quantized models as float32 weights, whoever wrote them, and what they take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.results import Sizes
from benchmarks.quality.texts import CONTEXT
from uq.formats.bundle import open_bundle
from uq.formats.checkpoint import Checkpoint, open_checkpoint
from uq.formats.config import EMBEDDING, GemmaConfig, layer_tensor
from uq.kernels.numerics import Numerics
from uq.kernels.reference import ReferenceSession
from uq.kernels.weights import BundleWeights, WeightSource
from uq.validate.weights import kind_sizes

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Model:
    """A quantized model.

    Attributes:
        content: hash of all that decides the scores.
        gguf: the file, where llama.cpp can run it.
    """

    weights: WeightSource
    content: str
    sizes: Sizes
    gguf: Path | None = None

    def session(self, numerics: Numerics) -> ReferenceSession:
        """Runs the weights in float32, but for what `numerics` says."""
        return ReferenceSession(self.weights, max_context=CONTEXT, numerics=numerics)


def open_bundle_model(path: Path, reference: Checkpoint) -> Model:
    """A bundle of uq."""
    bundle = open_bundle(path)
    sizes = {kind.kind: kind for kind in kind_sizes(bundle.manifest, reference)}
    body = [sizes["attention"], sizes["mlp"]]
    specs = {name: str(record.spec) for name, record in bundle.manifest.tensors.items()}
    return Model(
        BundleWeights(bundle),
        bundle.sha256,
        Sizes(
            bits=bundle.bits_per_weight,
            body_bits=8 * sum(kind.bytes for kind in body) / sum(kind.weights for kind in body),
            nbytes=bundle.nbytes,
            embedding=specs[EMBEDDING],
            body=shares(specs[name] for name in linears(bundle.config)),
        ),
    )


def open_gguf_model(path: Path) -> Model:
    """A GGUF file of llama.cpp."""
    checkpoint = open_checkpoint(path)
    config, tensors = checkpoint.config, checkpoint.tensors
    names = linears(config)
    body = sum(rows * cols for rows, cols in config.linear_shapes(0).values()) * config.num_layers
    (file,) = checkpoint.fingerprint().values()
    return Model(
        checkpoint,
        str(file["sha256"]),
        Sizes(
            bits=8 * sum(info.nbytes for info in tensors.values()) / config.num_parameters(),
            body_bits=8 * sum(tensors[name].nbytes for name in names) / body,
            nbytes=path.stat().st_size,
            embedding=tensors[EMBEDDING].dtype.upper(),
            body=shares(tensors[name].dtype.upper() for name in names),
        ),
        path,
    )


def linears(config: GemmaConfig) -> list[str]:
    """Canonical names of the layers' linears."""
    return [
        layer_tensor(layer, role)
        for layer in range(config.num_layers)
        for role in config.linear_shapes(0)
    ]


def shares(grids: Iterable[str]) -> str:
    """`Q4_0`, or `Q5_0 108, Q6_K 18` where the linears differ."""
    counts = Counter(grids).most_common()
    if len(counts) == 1:
        return counts[0][0]
    return ", ".join(f"{grid} {count}" for grid, count in counts)
