"""Plans: recipes applied to models, and the requests that are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from uq.errors import UsageError
from uq.formats.config import EMBEDDING, FULL, HEAD, GemmaConfig, layer_tensor
from uq.formats.spec import BITS, Spec
from uq.quantize.plan import RECIPES, Budget, choose_recipe, make_plan

CONFIG = GemmaConfig(
    family="gemma3",
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    rms_norm_eps=1e-6,
    query_pre_attn_scalar=32.0,
    sliding_window=16,
    layer_types=(FULL, FULL),
    rope_theta=1e6,
    rope_local_theta=1e4,
    rope_scaling=1.0,
    attn_softcap=None,
    final_softcap=None,
    post_norms=True,
    qk_norm=True,
    tied_head=True,
    max_position_embeddings=1024,
    bos_token_id=2,
    eos_token_ids=(1,),
    pad_token_id=0,
)
DOWN = layer_tensor(1, "mlp.down_proj")


def test_default_recipe_keeps_the_embedding_in_int8() -> None:
    plan = make_plan(CONFIG)
    assert plan.tensors[EMBEDDING].spec == Spec(8, 64)
    assert plan.tensors[EMBEDDING].method == "rtn"
    assert plan.tensors[DOWN].spec == Spec(4, 32)
    assert plan.tensors[DOWN].method == "gptq"


def test_plan_holds_every_quantized_tensor() -> None:
    plan = make_plan(replace(CONFIG, tied_head=False))
    assert len(plan.tensors) == 2 + 2 * 7
    assert HEAD in plan.tensors


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_applies(recipe: str) -> None:
    plan = make_plan(CONFIG, recipe)
    assert plan.tensors[layer_tensor(0, "self_attn.v_proj")].spec == RECIPES[recipe].linear
    assert (plan.budget is not None) == RECIPES[recipe].mixed


def test_group_replaces_that_of_the_linears_alone() -> None:
    plan = make_plan(CONFIG, "int4", group=128)
    assert plan.budget is None
    assert plan.tensors[DOWN].spec == Spec(4, 128)
    assert plan.tensors[EMBEDDING].spec == Spec(8, 64)


def test_a_mixed_recipe_takes_the_bytes_of_its_linears_on_one_grid() -> None:
    plan = make_plan(CONFIG, "int4")
    weights = 2 * sum(rows * cols for rows, cols in CONFIG.linear_shapes(0).values())
    assert plan.budget == Budget(weights * 9 // 16, tables=False)  # 4.5 bits
    assert make_plan(CONFIG, "int4", method="rtn").budget is None


def test_bits_per_weight_count_the_norms_and_tables() -> None:
    plan = make_plan(CONFIG, bpw=6.0)
    norms = CONFIG.hidden_size + 2 * (4 * CONFIG.hidden_size + 2 * CONFIG.head_dim)
    assert plan.recipe == "bpw6"
    assert plan.budget == Budget(CONFIG.num_parameters() * 6 // 8 - 4 * norms, tables=True)


def test_bits_per_weight_need_a_calibration() -> None:
    with pytest.raises(UsageError, match="--bpw .* --method rtn"):
        make_plan(CONFIG, bpw=6.0, method="rtn")


def test_too_few_bits_are_refused_before_anything_is_measured() -> None:
    with pytest.raises(
        UsageError, match=r"--bpw 3: the smallest grids take 4[.]\d+; use that"
    ) as no:
        make_plan(CONFIG, bpw=3.0)
    enough = float(str(no.value).split("take ")[1].split(";")[0])
    assert make_plan(CONFIG, bpw=enough).budget is not None


def test_embedding_follows_the_group_when_its_own_does_not_divide() -> None:
    plan = make_plan(replace(CONFIG, hidden_size=96), group=32)
    assert plan.tensors[EMBEDDING].spec == Spec(8, 32)


def test_group_that_does_not_divide_names_tensor_columns_and_remedy() -> None:
    config = replace(CONFIG, intermediate_size=224)
    message = "model.layers.0.mlp.down_proj.weight: 224 columns do not divide by group 64"
    with pytest.raises(UsageError, match=message + "; use --group 32$"):
        make_plan(config, group=64)


def test_columns_that_no_group_divides() -> None:
    with pytest.raises(UsageError, match="40 columns .* no offered group divides them"):
        make_plan(replace(CONFIG, hidden_size=40))


def test_target_decides_the_layout() -> None:
    assert make_plan(CONFIG).tensors[DOWN].layout == "igpu"
    assert make_plan(CONFIG, targets=("npu", "igpu")).tensors[DOWN].layout == "npu-aie2p"
    assert make_plan(CONFIG, targets=("cpu",)).tensors[DOWN].layout == "row"


def test_rtn_needs_no_calibration() -> None:
    assert not make_plan(CONFIG, method="rtn").calibrated
    assert make_plan(CONFIG, method="gptq").calibrated
    assert not make_plan(CONFIG, "int8", method="rtn").calibrated


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"group": 80}, "--group 80 is not offered; use 32, 64 or 128"),
        ({"method": "awq"}, "method 'awq' is not known; use auto, rtn or gptq"),
        ({"targets": ("igpu", "tpu")}, "target 'tpu' is not known"),
        ({"targets": ()}, "no target"),
        ({"recipe": "int3"}, "recipe 'int3' is not known"),
        ({"bpw": 6.0, "group": 64}, "--bpw chooses the groups, too"),
        ({"bpw": float("nan")}, "--bpw nan: expected a number"),
    ],
)
def test_unknown_choices_are_refused(asked: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_plan(CONFIG, **asked)  # type: ignore[arg-type]


def test_bits_choose_a_recipe() -> None:
    assert choose_recipe(None, None) == "int4"
    assert choose_recipe(None, 8) == "int8"
    for bits in BITS:
        assert RECIPES[choose_recipe(None, bits)].linear.bits == bits
    with pytest.raises(UsageError, match="--bits 3 is not offered; use 4, 5, 6 or 8"):
        choose_recipe(None, 3)
    with pytest.raises(UsageError, match="recipe 'int3' is not known"):
        choose_recipe("int3", None)
    with pytest.raises(UsageError, match="exclude each other"):
        choose_recipe("int4", 4)
