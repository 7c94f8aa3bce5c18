"""Passes of mlir-aie, in the order of its driver (aiecc, March 2026)."""

from __future__ import annotations

from uq.kernels.npu.target import Place

DEVICE = ",".join(
    (
        "aie-assign-lock-ids",
        "aie-register-objectFifos",
        "aie-objectFifo-stateful-transform{dynamic-objFifos=false packet-sw-objFifos=false}",
        "aie-assign-bd-ids",
        "aie-lower-cascade-flows",
        "aie-lower-broadcast-packet",
        "aie-lower-multicast",
        "aie-assign-tile-controller-ids",
        "aie-generate-column-control-overlay{route-shim-to-tile-ctrl=false}",
        "aie-assign-buffer-addresses{alloc-scheme=bank-aware}",
        "aie-vector-transfer-lowering{max-transfer-rank=1}",
    )
)
ROUTING = "builtin.module(aie.device(aie-create-pathfinder-flows))"
SEQUENCE = ",".join(
    (
        "aie-materialize-bd-chains",
        "aie-substitute-shim-dma-allocations",
        "aie-assign-runtime-sequence-bd-ids",
        "aie-dma-tasks-to-npu",
        "aie-dma-to-npu",
        "aie-lower-set-lock",
    )
)
TO_LLVM = ",".join(
    (
        "canonicalize",
        "cse",
        "expand-strided-metadata",
        "lower-affine",
        "arith-expand",
        "finalize-memref-to-llvm",
        "convert-func-to-llvm{use-bare-ptr-memref-call-conv=true}",
        "convert-to-llvm{dynamic=true}",
        "canonicalize",
        "cse",
    )
)


def device_pipeline(architecture: str) -> str:
    """FIFOs become buffers, locks and DMA programs with addresses."""
    vectors = f"convert-vector-to-aievec{{aie-target={architecture} target-backend=llvmir}}"
    before = f"{vectors},lower-affine,aie-canonicalize-device"
    return f"builtin.module({before},aie.device({DEVICE}),convert-scf-to-cf)"


def sequence_pipeline() -> str:
    """The runtime sequence becomes register writes."""
    return f"builtin.module(aie.device({SEQUENCE}))"


def core_pipeline(architecture: str, core: Place, symbol: str | None) -> str:
    """The program of one core becomes LLVM IR."""
    device = f"device={symbol} " if symbol else ""
    place = f"{{{device}tilecol={core.column} tilerow={core.row}}}"
    local = "aie.device(aie-localize-locks,aie-normalize-address-spaces,aie-transform-bfp-types)"
    lowered = f"aie-standard-lowering{place},aiex-standard-lowering"
    vectors = f"convert-aievec-to-llvm{{aie-target={architecture}}}"
    return f"builtin.module({local},{lowered},{vectors},{TO_LLVM})"
