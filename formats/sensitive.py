"""What is told of tensors that plain 4 bits would break: by the quantizer, and by the report."""

from __future__ import annotations

from collections.abc import Mapping

from uq.formats.manifest import Manifest
from uq.formats.spec import Spec

SENSITIVE = "sensitive"  # among a manifest's options: tensor -> nats per token


def sensitivity_note(name: str, nats: float, spec: Spec | None) -> str:
    """`spec` is what the tensor has instead; None where it is never quantized."""
    done = "stays in float32" if spec is None else f"has {spec}"
    return f"{name}: plain 4 bits would cost {nats:.2g} nats per token; it {done}"


def sensitivities(manifest: Manifest) -> list[str]:
    """A line for each tensor that was measured to do harm when the bundle was made."""
    found = manifest.options.get(SENSITIVE)
    nats = found if isinstance(found, Mapping) else {}
    specs = {name: tensor.spec for name, tensor in manifest.tensors.items()}
    return [
        sensitivity_note(name, value, specs.get(name))
        for name, value in nats.items()
        if isinstance(value, float)
    ]
