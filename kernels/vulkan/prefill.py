"""How the kernels of many tokens are cut into workgroups: their specialization constants.

The sizes leave every AMD iGPU at least 4 waves a SIMD without a spilled register, by the figures of
RADV's compiler (docs/amd.md). Which of them is fastest was not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import lcm

from uq.formats.config import GemmaConfig
from uq.kernels.vulkan.variants import VARIANTS
from uq.kernels.vulkan.weights import Kind

Constants = dict[str, int | float]

ATTENTION_ROWS = (16, 8)  # queries of a workgroup, about
ATTENTION_LANES = (256, 128, 64)  # about
KEYS = (32, 16, 8)  # of a step
# Queries of a workgroup, with matrix instructions; keys of a step; whether subgroups split scores.
MATRIX_ATTENTION = ((64, 32, False), (32, 32, False), (16, 16, True))
MATRIX_SUMS = 64 * 128  # of its registers


@dataclass(frozen=True)
class MatrixCut:
    """Sizes of `gemm_matrix.comp`: (tokens, rows) of a workgroup and of each of its subgroups, and
    channels of a step.
    """

    tokens: int = 128
    rows: int = 128
    subgroup_tokens: int = 64
    subgroup_rows: int = 32
    step: int = 64

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a workgroup: a step of either side with 8 channels behind it, blocks."""
        subgroups = self.tokens // self.subgroup_tokens * (self.rows // self.subgroup_rows)
        return 2 * (self.step + 8) * (self.tokens + self.rows) + 1024 * subgroups

    def constants(self, kind: Kind, subgroup: int) -> Constants:
        """`subgroup`: invocations of a subgroup."""
        across = self.rows // self.subgroup_rows
        return {
            "LANES": subgroup * across * (self.tokens // self.subgroup_tokens),
            **kind.constants,
            "BM": self.tokens,
            "BN": self.rows,
            "SM": self.subgroup_tokens,
            "SN": self.subgroup_rows,
            "STEP": self.step,
        }


SMALL_CUT = MatrixCut(64, 64, 32, 32)  # 22 KiB of shared memory: every device has them
# Tokens up to which a cut serves: of few tokens, smaller workgroups have more on their way.
CUTS = ((32, MatrixCut(32, 128, 32, 32)), (64, SMALL_CUT))


@dataclass(frozen=True)
class PlainCut:
    """Sizes of `gemm.comp`: (tokens, rows) of a workgroup and of each lane."""

    tokens: int = 64
    rows: int = 64
    lane_tokens: int = 4
    lane_rows: int = 4

    def constants(self, kind: Kind) -> Constants:
        return {
            "LANES": self.tokens // self.lane_tokens * (self.rows // self.lane_rows),
            **kind.constants,
            "BM": self.tokens,
            "BN": self.rows,
            "TM": self.lane_tokens,
            "TN": self.lane_rows,
        }


def gemm_module(kind: Kind, *, matrix: bool, integer_dot: bool) -> str:
    """The best module for a weight on a device with these abilities."""
    if matrix and f"gemm_{kind.name}_matrix" in VARIANTS:
        return f"gemm_{kind.name}_matrix"
    if integer_dot and not kind.is_float:
        return f"gemm_{kind.name}_dot"
    return f"gemm_{kind.name}"


def gemm_constants(
    module: str,
    kind: Kind,
    subgroup: int,
    shared_bytes: int,
    columns: int,
    *,
    large_blocks: bool = False,
) -> Constants:
    """
    Args:
        subgroup: invocations of a subgroup.
        shared_bytes: that a workgroup may have.
        columns: tokens.
        large_blocks: a subgroup's registers hold 64 x 64 sums.
    """
    if not module.endswith("_matrix"):
        return PlainCut().constants(kind)
    large = MatrixCut(subgroup_rows=64) if large_blocks else MatrixCut()
    cut = next((cut for tokens, cut in CUTS if columns <= tokens), large)
    cut = cut if cut.shared_bytes <= shared_bytes else SMALL_CUT
    return cut.constants(kind, subgroup)


@dataclass(frozen=True)
class Heads:
    """Of a layer: `dim` channels each, `sharing` query heads for each key head."""

    dim: int
    sharing: int

    @classmethod
    def of(cls, config: GemmaConfig, layer: int) -> Heads:
        return cls(config.layer_head_dim(layer), config.num_heads // config.layer_kv_heads(layer))


def head_shapes(config: GemmaConfig) -> set[Heads]:
    """Of all layers."""
    return {Heads.of(config, layer) for layer in range(config.num_layers)}


@dataclass(frozen=True)
class AttentionCut:
    """Sizes of `attention_prefill.comp`: `rows` queries of a workgroup, `keys` of a step."""

    lanes: int
    rows: int
    keys: int

    def shared_bytes(self, dim: int) -> int:
        """Shared memory of a workgroup: queries, a tile of the cache, scores, what a row keeps."""
        rows = self.rows * (4 * dim + 4 * self.keys + 12)
        return rows + 2 * self.keys * dim + 1024

    def constants(self, heads: Heads) -> Constants:
        return {"LANES": self.lanes, "TOKENS": self.rows // heads.sharing, "KEYS": self.keys}

    @classmethod
    def of(cls, heads: Heads, subgroup: int, shared_bytes: int) -> AttentionCut | None:
        """The largest that fits, if one does.

        Args:
            subgroup: invocations of a subgroup, at most.
            shared_bytes: that a workgroup may have.
        """
        for rows, lanes, keys in product(ATTENTION_ROWS, ATTENTION_LANES, KEYS):
            cut = cls._cut(heads, rows, lcm(subgroup, keys), lanes, keys)
            if cut.shared_bytes(heads.dim) <= shared_bytes:
                return cut
        return None

    @classmethod
    def _cut(cls, heads: Heads, rows: int, unit: int, wanted: int, keys: int) -> AttentionCut:
        """About `wanted` lanes that come out even: over the subgroup, the keys and a row's vectors,
        and over about `rows` in both ways of dealing them out."""
        vectors = heads.dim // 8
        unit = lcm(unit, vectors)
        lanes = unit * max(1, wanted // unit)
        even = lcm(lanes // keys, lanes // vectors, heads.sharing)
        return cls(lanes, even * max(1, rows // even), keys)


@dataclass(frozen=True)
class MatrixAttentionCut:
    """Sizes of `attention_matrix.comp`: `rows` queries of a workgroup of `subgroups`, each of which
    has scores of its own, or, where they are `split`, a part of the channels of all of them."""

    rows: int
    keys: int
    split: bool
    subgroups: int = 4

    def shared_bytes(self, dim: int) -> int:
        """Shared memory of a workgroup: queries, a step of the cache, weights, scores."""
        parts = self.subgroups if self.split else 1
        halves = (self.rows + self.keys) * (dim + 8) + self.rows * (self.keys + 8)
        return 2 * halves + 4 * self.rows * (self.keys + 16) * parts + 4 * self.rows + 1024

    def constants(self, subgroup: int) -> Constants:
        """`subgroup`: invocations of a subgroup."""
        lanes, own = subgroup * self.subgroups, {"ROWS": self.rows, "SUBGROUPS": self.subgroups}
        return {"LANES": lanes, "KEYS": self.keys, "SPLIT": self.split, **own}

    @classmethod
    def of(cls, heads: Heads, subgroup: int, shared_bytes: int) -> MatrixAttentionCut | None:
        """The largest that fits, if one does; arguments as of `AttentionCut.of`."""
        cuts = (cls(*sizes) for sizes in MATRIX_ATTENTION)
        return next((cut for cut in cuts if cut._fits(heads, subgroup, shared_bytes)), None)

    def _fits(self, heads: Heads, subgroup: int, shared_bytes: int) -> bool:
        """A lane or more for each row, a row or more for each head, heads that come out even."""
        dim = heads.dim
        even = dim % (16 * self.subgroups) == 0 and dim * self.rows <= MATRIX_SUMS
        lanes = subgroup * self.subgroups
        even &= heads.sharing <= self.rows <= lanes <= 8 * self.rows
        return even and self.shared_bytes(dim) <= shared_bytes


def attention_constants(config: GemmaConfig, layer: int, slots: int) -> Constants:
    """Of a layer whose cache has `slots` tokens, however it is cut."""
    return {
        "DIM": config.layer_head_dim(layer),
        "HEADS": config.num_heads,
        "KV_HEADS": config.layer_kv_heads(layer),
        "WINDOW": config.window(layer) or 0,
        "SLOTS": slots,
        "SCALE": float(config.attention_scale),
        "CAP": float(config.attn_softcap or 0.0),
    }
