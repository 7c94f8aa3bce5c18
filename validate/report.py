"""The numbers of one validation, as `report.json` holds them.

Every class is one JSON object and its fields are the names in it. The order of the fields is the
order in the file.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from uq.errors import BundleError, ThresholdMissed
from uq.formats.decode import OPTIONAL, decode
from uq.kernels.session import Device

SCHEMA = 1
JSON_NAME = "report.json"


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error over the scored tokens."""

    value: float
    stderr: float


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one quantity."""

    median: float
    min: float
    max: float


@dataclass(frozen=True)
class BundleFacts:
    """`sha256` is that of the manifest, which holds those of all other files."""

    name: str
    sha256: str
    bits_per_weight: float
    bytes: int
    recipe: str


@dataclass(frozen=True)
class ReferenceFacts:
    """The model that stands for the truth; it runs in float32 whatever its stored `dtype`."""

    id: str
    revision: str | None
    dtype: str


@dataclass(frozen=True)
class TextFacts:
    """`format` is `plain`, or `chat`: put to the model by its chat template."""

    name: str
    sha256: str
    chunks: int
    tokens_scored: int
    context: int
    format: str = "plain"


@dataclass(frozen=True)
class KldFacts:
    """KL(reference || bundle) per scored token, in nats."""

    mean: float
    stderr: float
    median: float
    p99: float
    p99_9: float
    max: float


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one sequence, and what the memory of this machine allows.

    Attributes:
        context: tokens in the KV cache when the decode measurement begins.
        bytes_per_token: weight bytes read to decode one token.
        bandwidth_gb_s: measured in the same run, 1e9 bytes per second.
        decode_ceiling_tps: bandwidth over bytes per token.
        weights_fit_cache: the last-level cache can hold those bytes, so that decoding may beat
            the ceiling.
    """

    prefill_tps: Spread
    decode_tps: Spread
    batch: int
    context: int
    bytes_per_token: int
    bandwidth_gb_s: float
    decode_ceiling_tps: float
    generated: int
    repeats: int
    weights_fit_cache: bool


@dataclass(frozen=True)
class Memory:
    """Peak resident memory of the whole process, memory-mapped file pages included.

    Attributes:
        peak_bytes: over the whole validation, the float32 reference included.
        bundle_peak_bytes: before the reference was opened, behind the bundle's speed measurement.
    """

    peak_bytes: int
    bundle_peak_bytes: int


@dataclass(frozen=True)
class LayerError:
    """How one tensor was quantized.

    Attributes:
        relative_error: |W - dequantized| / |W| in Frobenius norms, W from the reference.
        method: as in the manifest.
        fallback: why it was not quantized as planned, or None.
    """

    name: str
    bits: int
    group: int
    relative_error: float
    method: str
    fallback: str | None


@dataclass(frozen=True)
class Threshold:
    """A limit given by the user; `name` is `max_kld`, `max_ppl_ratio` or `min_tps`."""

    name: str
    limit: float
    value: float
    passed: bool

    @property
    def option(self) -> str:
        """As it is given on the command line."""
        return "--" + self.name.replace("_", "-")


@dataclass(frozen=True)
class Loss:
    """What is lost up to this point: `name` is `weights`, or what is quantized besides them.

    All of it is computed by the float32 reference on the bundle's dequantized weights, with the
    integers of `uq.kernels.numerics`: exact figures of the loss, and no device's speed.
    """

    name: str
    kld: Estimate
    same_top_percent: float
    perplexity_ratio: Estimate


@dataclass(frozen=True)
class KindSize:
    """Bytes of all tensors of one kind: embedding, attention, mlp, norms."""

    kind: str
    weights: int
    bytes: int
    reference_bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class Curve:
    """Points of a plot; `x` ascends."""

    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Series:
    """What the plots need and the figures above do not hold.

    Attributes:
        perplexity, reference_perplexity: one value per chunk of text.
        kld_survival: x: KL divergence in nats, y: share of the tokens that exceed it.
    """

    perplexity: tuple[float, ...]
    reference_perplexity: tuple[float, ...]
    kld_survival: Curve


@dataclass(frozen=True)
class Environment:
    """Where and how the figures came about; `date` is UTC, ISO 8601."""

    date: str
    command: str
    system: str
    python: str
    numpy: str
    numba: str
    threads: int
    last_level_cache_bytes: int | None


@dataclass(frozen=True)
class Report:
    """One validation of one bundle against one reference on one device.

    `speed` is None when none was to be measured; `reference_speed` also when the reference does
    not fit in memory, where it would be the speed of the disk. `losses` is empty unless activations
    or the KV cache were to be quantized. `warnings` say what a user should doubt, `notes` what is
    good to know.
    """

    schema: int
    uq: str
    bundle: BundleFacts
    reference: ReferenceFacts
    text: TextFacts
    device: Device
    perplexity: Estimate
    reference_perplexity: Estimate
    perplexity_ratio: Estimate
    kld: KldFacts
    same_top_percent: float
    rms_delta_p_percent: float
    speed: Speed | None
    reference_speed: Speed | None
    memory: Memory
    layers: tuple[LayerError, ...]
    thresholds: tuple[Threshold, ...]
    losses: tuple[Loss, ...]
    reference_device: Device
    sizes: tuple[KindSize, ...]
    series: Series
    environment: Environment
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = field(default=(), metadata=OPTIONAL)

    def to_json(self) -> dict[str, Any]:
        """The object that `report.json` holds: dicts, lists, strings, numbers and None."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return plain

    @classmethod
    def from_json(cls, data: object) -> Report:
        """Inverse of `to_json`.

        Raises:
            BundleError: another schema, or a field is missing, unknown or of the wrong type.
        """
        schema = data.get("schema") if isinstance(data, dict) else None
        if type(schema) is int and schema != SCHEMA:
            raise BundleError(f"{JSON_NAME}: schema {schema}; this version reads schema {SCHEMA}")
        return decode(cls, data, JSON_NAME)

    def check(self) -> None:
        """Raise ThresholdMissed, naming every limit that was not met."""
        missed = [limit for limit in self.thresholds if not limit.passed]
        if missed:
            parts = [
                f"{limit.option} {limit.limit:g}: measured {limit.value:.5g}" for limit in missed
            ]
            raise ThresholdMissed(f"{self.bundle.name}: {'; '.join(parts)}")
