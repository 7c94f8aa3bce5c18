"""How the work of a product is cut into workgroups."""

from __future__ import annotations

from dataclasses import dataclass

from uq.kernels.vulkan.weights import Kind, Matrix

MOST_LANES = 512
ENOUGH_LANES = 1 << 17  # that keep the memory of a large GPU busy
SUMS = 4096  # floats of shared memory that a product may use


@dataclass(frozen=True)
class Shape:
    """Of a workgroup: `lanes` is a multiple of 64, `blocks` are 16 rows each."""

    lanes: int
    blocks: int


@dataclass(frozen=True)
class Tuning:
    """Which kernel and which shape serve a matrix on one device.

    Attributes:
        integer_dot: the device multiplies four bytes at once.
    """

    integer_dot: bool

    def kernel(self, kind: Kind) -> str:
        dotted = self.integer_dot and not kind.is_float
        return f"gemv_{kind.name}_dot" if dotted else f"gemv_{kind.name}"

    def shape(self, matrix: Matrix, columns: int, epilogue: int) -> Shape:
        """Few blocks get many lanes each, so that all of the device has work."""
        gated = epilogue == 2
        blocks = 4 if gated else 2 if matrix.blocks >= 4096 else 1
        groups = -(-matrix.blocks // (blocks // 2 if gated else blocks))
        wanted = -(-ENOUGH_LANES // (64 * groups))
        most = min(MOST_LANES // 64, matrix.tiles, SUMS // (16 * blocks * columns))
        return Shape(64 * max(1, min(max(wanted, 2), most)), blocks)
