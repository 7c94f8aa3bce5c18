"""What is recorded of a run: what decides whether it may be continued, and the manifest."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict

import numba
import numpy as np

from uq.formats.checkpoint import Checkpoint
from uq.formats.manifest import Calibration, Manifest, Provenance, SourceFile
from uq.formats.sensitive import SENSITIVE
from uq.quantize.calibration_engine import CalibrationEngine
from uq.quantize.options import QuantizeOptions
from uq.quantize.plan import Plan
from uq.quantize.text import Text


def identity_of(
    checkpoint: Checkpoint,
    text: Text | None,
    plan: Plan,
    options: QuantizeOptions,
    tools: dict[str, str],
) -> dict[str, object]:
    """What fixes the bytes of the bundle; what is known later is a fact of the journal."""
    revision = checkpoint.source.revision
    return {
        "repository": checkpoint.source.id if revision else None,
        "revision": revision,
        "model": checkpoint.config.to_json(),
        "options": recorded(options, checkpoint, plan),
        "sizes": asdict(plan.gptq.work),
        "calibration": None if text is None else text.sha256,
        "tools": tools,
    }


def tools_of(engine: CalibrationEngine | None) -> dict[str, str]:
    device = {"calibration": engine.name} if engine and engine.name else {}
    return device | {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
    }


def recorded(options: QuantizeOptions, checkpoint: Checkpoint, plan: Plan) -> dict[str, object]:
    """The options that the bytes depend on, but for the text, which has its own record."""
    names = (
        "recipe",
        "group",
        "bpw",
        "method",
        "targets",
        "calibration_tokens",
        "calibration_length",
        "calibration_seed",
        "calibration_format",
        "calibrate_layers",
    )
    found = {name: getattr(options, name) for name in names}
    found |= {"curvature": True} if plan.bends else {}
    return found | ({"towers": options.towers} if checkpoint.towers else {})


def manifest_of(
    checkpoint: Checkpoint,
    plan: Plan,
    options: QuantizeOptions,
    calibration: Calibration | None,
    files: Mapping[str, SourceFile],
    tools: dict[str, str],
) -> Manifest:
    source = checkpoint.source
    found: dict[str, object] = {"gptq": asdict(plan.gptq) if plan.uses_gptq else None}
    if plan.sensitive:
        found[SENSITIVE] = dict(plan.sensitive)
    return Manifest(
        model=checkpoint.config,
        recipe=plan.recipe,
        options=recorded(options, checkpoint, plan) | found,
        provenance=Provenance(source.kind, source.id, source.revision, checkpoint.dtype, files),
        calibration=calibration,
        left_out=checkpoint.left_out + _dropped(checkpoint, options),
        tools=tools,
    )


def _dropped(checkpoint: Checkpoint, options: QuantizeOptions) -> tuple[str, ...]:
    towers = checkpoint.towers.values()
    if options.towers != "drop" or not towers:
        return ()
    size = sum(info.nbytes for info in towers)
    return (f"towers and projectors: {len(towers)} tensors, {size:,} bytes",)
