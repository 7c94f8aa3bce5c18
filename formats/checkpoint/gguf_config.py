"""GGUF metadata and tensor names -> GemmaConfig, canonical names, and where the tensors lie."""

from __future__ import annotations

from dataclasses import replace

from uq.errors import CheckpointError
from uq.formats.checkpoint.gguf_file import GgufFile
from uq.formats.checkpoint.gguf_metadata import Metadata, common
from uq.formats.checkpoint.gguf_newer import NEWER
from uq.formats.checkpoint.hf_config import check_heads
from uq.formats.checkpoint.tensors import TensorInfo
from uq.formats.config import (
    ALTUP_PROJECTIONS,
    ALTUP_UNEMBED_PROJECTIONS,
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    PER_LAYER_EMBEDDING,
    PER_LAYER_NORM,
    PER_LAYER_PROJECTION,
    GemmaConfig,
    layer_tensor,
)
from uq.formats.families.registry import FAMILIES, known

# Those whose files the tables of `GgufDefaults` are enough for, and all.
ARCHITECTURES = {name: family for name, family in FAMILIES.items() if family.gguf is not None}
READABLE = ARCHITECTURES | {name: FAMILIES[name] for name in NEWER}
ROLES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "post_per_layer_input_norm": "post_norm",
    "layer_scalar": "layer_output_scale",
    "experts.gate_up_proj": "ffn_gate_up_exps",
    "experts.down_proj": "ffn_down_exps",
    "router.proj": "ffn_gate_inp",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
    "post_feedforward_layernorm_1": "post_ffw_norm_1",
    "post_feedforward_layernorm_2": "post_ffw_norm_2",
    "altup.correct_output_scale": "altup_correct_scale",
    "altup.correction_coefs": "altup_correct_coef",
    "altup.prediction_coefs": "altup_predict_coef",
    "altup.modality_router": "altup_router",
    "altup.router_norm": "altup_router_norm",
    "laurel.linear_left": "laurel_l",
    "laurel.linear_right": "laurel_r",
    "laurel.post_laurel_norm": "laurel_post_norm",
}
MODEL_NAMES = {
    EMBEDDING: "token_embd.weight",
    FINAL_NORM: "output_norm.weight",
    HEAD: "output.weight",
    PER_LAYER_EMBEDDING: "per_layer_token_embd.weight",
    f"{PER_LAYER_PROJECTION}.weight": "per_layer_model_proj.weight",
    f"{PER_LAYER_NORM}.weight": "per_layer_proj_norm.weight",
}
# Matrices that a file holds as one tensor, (matrices, rows, in).
STACKED = {
    ALTUP_PROJECTIONS: "altup_proj.weight",
    ALTUP_UNEMBED_PROJECTIONS: "altup_unembd_proj.weight",
}


def gguf_config(file: GgufFile) -> GemmaConfig:
    """Resolve every field of the model.

    Raises:
        CheckpointError: another architecture, one part of a split file, or a missing or
            unsupported value.
    """
    arch = file.metadata.get("general.architecture")
    family = known(arch, READABLE, f"{file.path.name}: architecture")
    if file.metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError(
            f"{file.path.name}: one part of a split GGUF; join the parts with "
            "llama-gguf-split --merge"
        )
    if family.name in NEWER:
        defaults, read = NEWER[family.name]
        config = read(Metadata(file, family.name, defaults))
    else:
        assert family.gguf is not None
        config = _uniform(Metadata(file, family.name, family.gguf))
    check_heads(config, file.path.name)
    return config


def _uniform(meta: Metadata) -> GemmaConfig:
    """Of a family whose layers are alike."""
    fields = common(meta)
    hidden, heads = fields["hidden_size"], fields["num_heads"]
    head_dim = meta.integer("attention.key_length", max(hidden // heads, 1))
    scaled = meta.defaults.scaled_layers == fields["num_layers"]
    return GemmaConfig(
        family=meta.arch,
        **fields,
        intermediate_size=meta.integer("feed_forward_length"),
        num_kv_heads=meta.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        query_pre_attn_scalar=float(hidden // heads if scaled else head_dim),
    )


def gguf_names(config: GemmaConfig) -> dict[str, str]:
    """Canonical tensor name -> name in a GGUF file, but for what is `STACKED` there."""
    roles = dict(ROLES)
    if not config.post_norms:
        # gemma has one norm in front of the MLP, which is post_attention_layernorm there.
        roles["post_attention_layernorm"] = "ffn_norm"
    needed = {**config.table_shapes(), **config.model_norms(), **config.model_kept()}
    names = {name: stored for name, stored in MODEL_NAMES.items() if name in needed}
    for layer in range(config.num_layers):
        shapes = (config.linear_shapes, config.norm_shapes, config.kept_shapes)
        for role in (role for part in shapes for role in part(layer)):
            stored = f"blk.{layer}.{roles[role]}"
            names[layer_tensor(layer, role)] = stored + ".weight" * (not stored.endswith(".scale"))
    return names


def gguf_tensors(file: GgufFile, config: GemmaConfig) -> dict[str, TensorInfo]:
    """Canonical name -> where the tensor lies, of those that the file has."""
    names = gguf_names(config)
    found = {name: file.tensors[own] for name, own in names.items() if own in file.tensors}
    for role, stored in STACKED.items():
        if config.altup is not None and stored in file.tensors:
            matrices = _matrices(file.tensors[stored])
            found |= {f"{role}.{number}.weight": info for number, info in enumerate(matrices)}
    return found


def _matrices(stack: TensorInfo) -> list[TensorInfo]:
    """The matrices of a stack, one behind the other in the file."""
    count, nbytes = stack.shape[0], stack.nbytes // max(1, stack.shape[0])
    return [
        replace(stack, offset=stack.offset + number * nbytes, shape=stack.shape[1:], nbytes=nbytes)
        for number in range(count)
    ]
