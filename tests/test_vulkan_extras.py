"""The Vulkan kernels of what layers have beside attention and MLP, against slow twins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest

from benchmarks.shapes import shape_config
from tests.test_vulkan_kernels import norm_sizes, normal, random_tensor, rms_norm
from tests.vulkan_lab import Lab, no_messages  # noqa: F401
from uq.formats.config import AltUp, Experts
from uq.formats.spec import Spec
from uq.kernels.altup import correct, predict
from uq.kernels.elementwise import gelu_product
from uq.kernels.experts import choose
from uq.kernels.laurel import keep_largest
from uq.kernels.vulkan.push import addresses, words
from uq.kernels.vulkan.state import blank, views
from uq.kernels.vulkan.streams import GATHER, LEAVE, TELL_AND_ENTER
from uq.kernels.vulkan.tuning import BRANCH
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


@pytest.mark.parametrize("bits", [4, 8])
def test_a_product_reads_the_chosen_experts(lab: Lab, bits: int) -> None:
    """Each column and expert is a product of its own; a column behind the last token is none."""
    spec, rows, cols, count, active = Spec(bits, 32), 48, 96, 6, 2
    stack, x = random_tensor(count * rows, cols, spec), normal(3 * active, cols)
    kind, chosen = Kind.of(spec), np.array([5, 1, 1, 3, 0, 4], np.uint32)
    state, y = blank(), lab.room(3 * active * rows)
    views(state)["count"][0] = 2
    weight = lab.weight(stack, kind)
    push = addresses(weight, weight, lab.activations(x), y, lab.put(chosen), *[y] * 4)
    push += addresses(lab.put(state)) + words(3, 1, rows, rows, rows // 16)
    how = {"LANES": 64, "BLOCKS": 1, "COLUMNS": 1, "EPILOGUE": BRANCH, "ACTIVE": active}
    lab.run(f"gemv_{kind.name}", push, 3, 1, 3 * active, GROUP=32, **how)
    weights = stack.dequantize().reshape(count, rows, cols)[chosen].astype(np.float64)
    expected = (weights @ x[:, :, None].astype(np.float64))[:, :, 0]
    expected[2 * active :] = 0
    found = lab.get(y, np.float32, 3 * active, rows)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(("size", "lanes"), [(96, 64), (640, 64)])
def test_mlp_and_experts_join(lab: Lab, size: int, lanes: int) -> None:
    columns, active, parts = 2, 3, 2
    mlp, experts = normal(parts, columns, size), normal(columns, active, size, seed=1)
    shares, gains = normal(columns, active, seed=2), normal(2, size, seed=3)
    mixed = lab.room(columns * size)
    given = [lab.put(values) for values in (mlp, experts, shares, *gains)]
    sizes = {**norm_sizes(size, lanes), "ACTIVE": active, "PARTS": parts}
    lab.run("mixture", addresses(*given, mixed), columns, **sizes)
    total = (experts.astype(np.float64) * shares[:, :, None]).sum(axis=1)
    own = rms_norm(mlp.astype(np.float64).sum(axis=0), gains[0])
    expected = own + rms_norm(total, gains[1])
    found = lab.get(mixed, np.float32, columns, size)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


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
