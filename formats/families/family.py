"""What a file of this folder says of its architecture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uq.formats.config import GemmaConfig
    from uq.formats.families.keys import Keys


class Kind(Enum):
    """What becomes of a tensor."""

    LINEAR = "quantized, (out, in)"
    EXPERTS = "quantized, (experts, out, in) in the file; an expert's rows behind the other's here"
    TABLE = "quantized, read by row"
    NORM = "gain of a norm, in float32"
    KEPT = "never quantized, in float32"


@dataclass(frozen=True)
class Role:
    """A tensor of a layer, or of the model where it is in no layer.

    Attributes:
        name: as in the file, without the prefix of the text model and without `.weight`.
        shape: as in the file.
        bare: the file has it without `.weight`: transformers has a parameter there, no module.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    bare: bool = False

    @property
    def tensor(self) -> str:
        """Canonical name, of a tensor of no layer."""
        return f"{self.name}.weight"

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, in) with all leading axes in one."""
        return math.prod(self.shape[:-1]), self.shape[-1]


@dataclass(frozen=True)
class GgufDefaults:
    """What llama.cpp takes where a GGUF file of the architecture is silent, and what it scales by.

    Attributes:
        window, pattern: sliding window in keys, 0 for full layers only; every so manieth is full.
        scaled_layers: a model of so many layers scales scores by hidden / heads, not by head_dim.
        local_theta: RoPE base of sliding layers; None for that of the full ones.
        linear_rope: RoPE can be scaled.
        post_norms, qk_norm: as in `GemmaConfig`.
    """

    window: int
    pattern: int
    scaled_layers: int | None
    local_theta: float | None
    attn_softcap: float | None
    final_softcap: float
    linear_rope: bool
    post_norms: bool
    qk_norm: bool


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: as manifests of bundles have it.
        model_types: of config.json -> whether the text model is its `text_config`.
        read: the text model's part of config.json -> every field resolved.
        layer_roles: tensors of a layer, linears in the order of the forward pass.
        model_roles: tensors of no layer.
        norm_offset: added to a stored weight of a norm to get its gain.
        stored_names: role -> role as the file has it, where that is another one.
        gguf: None where GGUF files of the architecture are not read.
    """

    name: str
    model_types: Mapping[str, bool]
    read: Callable[[Keys], GemmaConfig]
    layer_roles: Callable[[GemmaConfig, int], tuple[Role, ...]]
    model_roles: Callable[[GemmaConfig], tuple[Role, ...]]
    norm_offset: float
    stored_names: Mapping[str, str] = field(default_factory=dict)
    gguf: GgufDefaults | None = None
