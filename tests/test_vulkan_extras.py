"""The Vulkan kernels of what layers have beside attention and MLP, against slow twins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest

from benchmarks.shapes import shape_config
from tests.test_vulkan_kernels import Doubles, norm_sizes, normal, random_tensor, rms_norm
from tests.vulkan_lab import Lab, no_messages  # noqa: F401
from uq.formats.config import AltUp, Experts
from uq.formats.spec import Spec
from uq.kernels.altup import correct, predict
from uq.kernels.elementwise import gelu_product
from uq.kernels.experts import choose
from uq.kernels.laurel import keep_largest
from uq.kernels.vulkan.push import addresses, floats, words
from uq.kernels.vulkan.state import blank, views
from uq.kernels.vulkan.streams import GATHER, LEAVE, TELL_AND_ENTER
from uq.kernels.vulkan.tuning import GEGLU, TELL
from uq.kernels.vulkan.weights import Kind


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("pipelines"))
    yield lab
    lab.close()


def test_routing_takes_the_first_of_equal_scores(lab: Lab) -> None:
    """What the CPU chooses, two equal scores among the greatest included."""
    count, active = 150, 5  # more experts than lanes
    scores, factors = normal(3, 160), 1 + normal(count, seed=1)
    scores[1, [7, 149]] = scores[1].max() + 1
    scores[2] = 0.25
    chosen, shares = lab.room(3 * active), lab.room(3 * active)
    push = addresses(lab.put(scores), lab.put(factors), chosen, shares) + words(160)
    lab.run("route", push, 3, LANES=64, COUNT=count, ACTIVE=active)
    indices, expected = choose(Experts(count, active, 1), scores[:, :count], factors)
    np.testing.assert_array_equal(lab.get(chosen, np.uint32, 3, active), indices)
    np.testing.assert_allclose(lab.get(shares, np.float32, 3, active), expected, rtol=2e-6)


def test_scores_that_are_no_numbers_choose_some_expert(lab: Lab) -> None:
    scores, factors = np.full((1, 8), np.nan, np.float32), normal(8)
    chosen, shares = lab.room(2), lab.room(2)
    push = addresses(lab.put(scores), lab.put(factors), chosen, shares) + words(8)
    lab.run("route", push, 1, LANES=64, COUNT=8, ACTIVE=2)
    assert (lab.get(chosen, np.uint32, 2) < 8).all()


def gelu(x: Doubles) -> Doubles:
    """In its tanh form."""
    y: Doubles = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return y


@pytest.mark.parametrize("bits", [4, 8])
def test_experts_that_a_column_chooses(lab: Lab, bits: int) -> None:
    """Their gates, and the sum of their outputs; a column behind the last token has none."""
    spec, hidden, size, count, active = Spec(bits, 32), 96, 160, 6, 3
    kind, x, scores = Kind.of(spec), normal(3, hidden), normal(3, count, seed=1)
    gate_up = random_tensor(2 * size * count, hidden, spec)
    down, factors = random_tensor(hidden * count, size, spec), 1 + normal(count, seed=2)
    state, out = blank(), lab.room(3 * hidden)
    views(state)["count"][0] = 2
    given, known = lab.put(state), (lab.put(scores), lab.put(factors))
    chosen, shares, gated = lab.room(9), lab.room(9), lab.room(9 * 2 * 72)
    weight, blocks = lab.weight(gate_up, kind), size // 16
    up = weight.part(weight.nbytes // (2 * count), weight.nbytes // (2 * count))
    push = addresses(weight, up, lab.activations(x), out, *known, chosen, shares, gated, given)
    push += words(blocks, 1, count, size, 2 * blocks)
    how = {"LANES": 64, "BLOCKS": 4, "EPILOGUE": GEGLU, "ACTIVE": active, "COUNT": count}
    lab.run(f"gemv_{kind.name}", push, 5, 1, 3 * active, GROUP=32, **how)
    push = addresses(lab.weight(down, kind), gated, out, chosen, shares, given)
    push += words(2, hidden, hidden // 16)
    lab.run(f"experts_{kind.name}", push, 6, 3, LANES=128, GROUP=32, ACTIVE=active, DEPTH=3)
    indices, parts = choose(Experts(count, active, size), scores[:2], factors)
    np.testing.assert_array_equal(lab.get(chosen, np.uint32, 2, active), indices)
    np.testing.assert_allclose(lab.get(shares, np.float32, 2, active), parts, rtol=2e-6)
    into = gate_up.dequantize().reshape(count, 2, size, hidden).astype(np.float64)[indices]
    both = (into @ x[:2, None, None, :, None].astype(np.float64))[..., 0]
    made = gelu(both[:, :, 0]) * both[:, :, 1]
    back = down.dequantize().reshape(count, hidden, size).astype(np.float64)[indices]
    expected = ((back @ made[..., None])[..., 0] * parts[..., None]).sum(axis=1)
    found = lab.get(out, np.float32, 3, hidden)
    np.testing.assert_allclose(found[:2], expected, atol=3e-4 * np.abs(expected).max())
    assert not found[2].any()


@pytest.mark.parametrize(("size", "lanes"), [(96, 64), (640, 64)])
@pytest.mark.parametrize("active", [1, 3])
def test_mlp_and_experts_join(lab: Lab, size: int, lanes: int, active: int) -> None:
    """The residual stream; of one output, which is a sum, the share does not count."""
    columns, parts = 2, 2
    mlp, experts = normal(parts, columns, size), normal(columns, active, size, seed=1)
    shares, gains = normal(columns, active, seed=2), normal(4, size, seed=3)
    hidden = normal(columns, size, seed=4)
    joined, normed, unused = (lab.room(columns * size) for _ in range(3))
    push = addresses(*map(lab.put, (mlp, hidden)), joined, *map(lab.put, gains[:2]), normed)
    push += addresses(lab.room(columns * 640), unused, unused)
    push += addresses(*map(lab.put, (experts, shares, gains[2], gains[3]))) + floats(1.5)
    sizes = {**norm_sizes(size, lanes), "EXPERTS": active, "PARTS": parts, "KEEP_NORMED": True}
    sizes |= {"HAS_BRANCH": True, "POST_NORM": True, "FLOAT_X": True}
    lab.run("norm_behind_experts", push, columns, **sizes)
    weights = shares[:, :, None] if active > 1 else 1
    total = (experts.astype(np.float64) * weights).sum(axis=1)
    both = rms_norm(mlp.astype(np.float64).sum(axis=0), gains[2]) + rms_norm(total, gains[3])
    expected = 1.5 * (hidden + rms_norm(both, gains[0]))
    found = lab.get(joined, np.float32, columns, size)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    found = lab.get(normed, np.float32, columns, size)
    np.testing.assert_allclose(found, rms_norm(expected, gains[1]), rtol=1e-4, atol=1e-4)


def test_norms_in_front_of_experts(lab: Lab) -> None:
    """One for the MLP, one for the experts, one for their router."""
    size, columns = 96, 2
    hidden, gains = normal(columns, size), normal(3, size, seed=1)
    x, for_experts, plain = (lab.room(columns * 128) for _ in range(3))
    span, unused = lab.put(hidden), lab.room(columns * size)
    push = addresses(span, span, unused, *[lab.put(gains[0])] * 2, unused, x, unused, unused)
    push += addresses(lab.put(gains[1]), lab.put(gains[2]), for_experts, plain) + floats(1.0)
    lab.run("norm_before_experts", push, columns, FLOAT_X=True, **norm_sizes(size, 64))
    for span, gain in zip((x, for_experts, plain), gains, strict=True):
        found = lab.get(span, np.float32, columns, 128)[:, :size]
        np.testing.assert_allclose(found, rms_norm(hidden.astype(np.float64), gain), rtol=1e-5)


def test_a_product_tells_a_layer_of_its_token(lab: Lab) -> None:
    """gelu of the gate's product, times the layer's inputs."""
    rows, cols, columns = 48, 96, 2
    gate, x, inputs = normal(rows, cols), normal(columns, cols, seed=1), normal(columns, rows)
    weight, told = lab.weight(gate, Kind("f32")), lab.room(columns * 128)
    push = addresses(weight, weight, lab.activations(x, is_float=True), lab.put(inputs))
    push += addresses(*[told] * 5, lab.put(blank())) + words(3, 1, rows, rows, 0)
    how = {"LANES": 64, "BLOCKS": 1, "COLUMNS": columns, "EPILOGUE": TELL}
    lab.run("gemv_f32", push, 3, GROUP=32, **how)
    expected = gelu(x.astype(np.float64) @ gate.T.astype(np.float64)) * inputs
    found = lab.get(told, np.float32, columns, 128)
    np.testing.assert_allclose(found[:, :rows], expected, rtol=1e-4, atol=1e-4)
    assert not found[:, rows:].any()


@pytest.mark.parametrize("kind", ["int4", "f32"])
def test_what_layers_are_told_of_a_token(lab: Lab, kind: str) -> None:
    """Of tokens in front of the table's end, and behind it, where the first row stands for all."""
    layers, size, rows, spec = 3, 64, 21, Spec(4, 32)
    tensor, gain = random_tensor(rows, layers * size, spec), normal(size, seed=1)
    table, values = Kind.of(spec), tensor.dequantize()
    weight = lab.weight(tensor, table) if kind == "int4" else lab.weight(values, Kind("f32"))
    state, tokens = blank(), [20, 3, 21, 500]
    views(state)["tokens"][:4] = tokens
    projected, told = normal(4, layers * size, seed=2), lab.room(4 * layers * size)
    push = addresses(weight, lab.put(projected), lab.put(gain), told, lab.put(state))
    sizes = {"SIZE": size, "ROWS": rows, "EPS": 1e-6, "SCALE": 0.125, "GROUP": 32}
    lab.run(f"per_layer_{kind}", push, layers, 4, LANES=64, **sizes)
    parts = 0.125 * projected.astype(np.float64).reshape(4, layers, size)
    told_rows = values[[20, 3, 0, 0]].reshape(4, layers, size).astype(np.float64)
    expected = (rms_norm(parts, gain) + 8 * told_rows) / np.sqrt(2)
    found = lab.get(told, np.float32, layers, 4, size)
    np.testing.assert_allclose(found.swapaxes(0, 1), expected, rtol=1e-5, atol=1e-5)


def test_streams_around_a_layer(lab: Lab) -> None:
    """What a layer leaves, what the streams are told, and what the next layer finds."""
    size, columns, streams, parts, active = 160, 2, 3, 2, 1
    altup = AltUp(streams, active, scaled=True)
    own, hidden = normal(columns, streams, size), normal(columns, size, seed=1)
    branch, branch_gain = normal(parts, columns, size, seed=2), normal(size, seed=3)
    weights = {
        "altup.router_norm": normal(size, seed=4),
        "altup.modality_router": size**0.5 * normal(streams, size, seed=5),
        "altup.prediction_coefs": 0.3 * normal(streams**2, streams, seed=6),
        "altup.correction_coefs": 0.3 * normal(streams, streams, seed=7),
    }
    scale, plain = normal(size, seed=8), lab.room(columns * 256)
    spans = {name: lab.put(value) for name, value in weights.items()}
    stored = lab.put(np.ascontiguousarray(own.swapaxes(0, 1)))
    state = lab.put(hidden)
    push = addresses(stored, state, lab.put(branch), lab.put(branch_gain))
    push += addresses(spans["altup.router_norm"], spans["altup.modality_router"])
    ends = addresses(lab.put(scale), plain)
    sizes = {**norm_sizes(size, 64), "STREAMS": streams, "ACTIVE": active, "PARTS": parts}
    correction, prediction = (spans[f"altup.{x}_coefs"] for x in ("correction", "prediction"))
    lab.run("altup", push + addresses(correction) + ends, columns, MODE=LEAVE, **sizes)
    left = lab.get(stored, np.float32, streams, columns, size).swapaxes(0, 1).copy()
    lab.run("altup", push + addresses(prediction) + ends, columns, MODE=TELL_AND_ENTER, **sizes)
    found = lab.get(stored, np.float32, streams, columns, size).swapaxes(0, 1)

    config = replace(shape_config("270m"), hidden_size=size, altup=altup)
    expected = correct(config, altup, weights, own, hidden)
    np.testing.assert_allclose(left, expected, atol=2e-5)
    told = lab.get(plain, np.float32, columns, 256)[:, :size]
    np.testing.assert_allclose(told, expected[:, active] * scale, atol=2e-5)
    expected[:, 1:] += rms_norm(branch.astype(np.float64).sum(axis=0), branch_gain)[:, None]
    expected = predict(config, altup, weights, expected)
    np.testing.assert_allclose(found, expected, atol=5e-5)
    np.testing.assert_array_equal(lab.get(state, np.float32, columns, size), found[:, active])


def test_streams_are_brought_to_one_size_and_gathered(lab: Lab) -> None:
    size, columns, streams = 96, 2, 3
    own = np.exp(normal(streams, 1, 1)) * normal(streams, columns, size, seed=1)
    hidden, stored = lab.room(columns * size), lab.put(own.astype(np.float32))
    sizes = {**norm_sizes(size, 64), "STREAMS": streams, "MODE": GATHER}
    lab.run("altup", addresses(stored, hidden, *[stored] * 7), columns, **sizes)
    root = np.sqrt(np.square(own.astype(np.float64)).mean(axis=-1, keepdims=True))
    expected = (own * root[0] / root).mean(axis=0)
    np.testing.assert_allclose(lab.get(hidden, np.float32, columns, size), expected, atol=1e-5)


def test_a_product_of_low_rank_joins(lab: Lab) -> None:
    size, columns = 160, 2
    hidden, x, low = (normal(columns, size, seed=i) for i in range(3))
    gain, joined = normal(size, seed=3), lab.put(hidden)
    push = addresses(joined, lab.put(x), lab.put(low), lab.put(gain))
    lab.run("laurel", push, columns, **norm_sizes(size, 64))
    expected = (hidden + x + rms_norm(low.astype(np.float64), gain)) / np.sqrt(2)
    np.testing.assert_allclose(lab.get(joined, np.float32, columns, size), expected, atol=1e-5)


@pytest.mark.parametrize("sparsity", [0.5, 0.95])
def test_a_sparse_gate_keeps_what_exceeds_its_threshold(lab: Lab, sparsity: float) -> None:
    """Two parts of a gate, of a token in two slices; the reference's threshold."""
    columns, size, parts = 2, 192, 2
    gate, up = normal(parts, columns, size), normal(parts, columns, size, seed=1)
    x = lab.room(columns * 256)
    push = addresses(lab.put(gate), lab.put(up), x) + words(size, parts)
    quantile = NormalDist().inv_cdf(sparsity)
    how = {"FLOAT_X": True, "CHANNELS": size, "SPARSE": True, "QUANTILE": quantile}
    lab.run("geglu", push, columns, 2, LANES=64, **how)
    expected = gate.sum(axis=0)
    keep_largest(expected, sparsity)
    gelu_product(expected, up.sum(axis=0))
    found = lab.get(x, np.float32, columns, 256)[:, :size]
    assert (found == 0).mean() > 0.9 * sparsity
    np.testing.assert_allclose(found, expected, atol=1e-5)
