"""Models that the tests share: small random Gemma checkpoints and the real Gemma 3 270M."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.hub_server.server import HubServer
from tests.tiny import (
    Tiny,
    config_of,
    tokenizer_config,
    tokenizer_of,
    weights_of,
    write_json,
    write_weights,
)
from tests.vulkan_lab import watch_validation
from uq.formats.bundle import Bundle, open_bundle
from uq.formats.checkpoint import open_checkpoint
from uq.formats.checkpoint.cache import cache_folder
from uq.formats.checkpoint.demo import demo_gguf
from uq.formats.checkpoint.read_ahead import THREAD
from uq.formats.config import EMBEDDING, FINAL_NORM, HEAD, layer_tensor
from uq.formats.manifest import Manifest, Provenance, gain_name
from uq.formats.row_scales import round_scales
from uq.formats.spec import QuantTensor, Spec
from uq.formats.tokenizer import Tokenizer
from uq.formats.writer import ArrayEntry, BundleWriter, Entry, QuantEntry
from uq.quantize.pipeline import QuantizeOptions, quantize
from uq.quantize.plan import RECIPES, GptqOptions

# Longest first, so that no worker is left alone with one of them at the end.
LONGEST = (
    *("test_radv", "test_npu_attention", "test_vulkan_persistent", "test_vulkan_session"),
    *("test_reference_real", "test_vulkan_real", "test_npu_device", "test_npu_session"),
    *("test_pipeline", "test_vulkan_calibration_gemma4", "test_gemma4_bundle", "test_docs"),
)


SOFTWARE_DEVICE = "lvp_icd*.json"  # the manifest of Mesa's


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu",
        action="store_true",
        help="run the Vulkan tests on this machine's GPU, without those that are about Mesa's "
        "software device, on which they run otherwise",
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--gpu"):
        see_software_device_only()


def see_software_device_only() -> None:
    """Vulkan finds no other device, where Mesa's is installed and the environment names none."""
    folders = Path("/etc/vulkan/icd.d"), Path("/usr/share/vulkan/icd.d"), cache_folder() / "mesa"
    found = [sorted(map(str, folder.glob(SOFTWARE_DEVICE))) for folder in folders]
    manifests = next(filter(None, found), None)
    if manifests and not {"VK_DRIVER_FILES", "VK_ICD_FILENAMES"} & os.environ.keys():
        for name in ("VK_DRIVER_FILES", "VK_ICD_FILENAMES"):  # new and old name of one variable
            os.environ[name] = os.pathsep.join(manifests)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    if config.getoption("--gpu"):
        left_out = [item for item in items if item.get_closest_marker("mesa")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session", autouse=True)
def small_cache() -> Iterator[None]:
    """A processor whose cache is small: its bandwidth is measured in 256 MiB, not in gigabytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("uq.validate.bandwidth.last_level_cache", lambda: 64 << 20)
        yield


LONG = 10_000  # characters


@pytest.fixture(scope="session", autouse=True)
def texts_tokenized_once() -> Iterator[None]:
    """The calibration text of millions of letters is the same for all tiny tokenizers of a kind."""
    encode, found = Tokenizer.encode, dict[tuple[object, ...], list[int]]()

    def remembered(self: Tokenizer, text: str, **options: bool) -> list[int]:
        if len(text) < LONG or self.inner.get_vocab_size() > LONG:
            return encode(self, text, **options)
        key = self.inner.to_str(), self.bos, text, *sorted(options.items())
        if key not in found:
            found[key] = encode(self, text, **options)
        return list(found[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tokenizer, "encode", remembered)
        yield


SHIPPED = dict(RECIPES)


@pytest.fixture(scope="session", autouse=True)
def rows_alone() -> Iterator[None]:
    """Recipes that round each row for itself: of a tiny model, gradients would take longest."""
    with pytest.MonkeyPatch.context() as patch:
        for name, recipe in SHIPPED.items():
            patch.setitem(RECIPES, name, replace(recipe, gptq=GptqOptions()))
        yield


@pytest.fixture
def shipped_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipes as they are."""
    for name, recipe in SHIPPED.items():
        monkeypatch.setitem(RECIPES, name, recipe)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Factory of Hugging Face style folders with random weights; each call writes a new one."""
    root = tmp_path_factory.mktemp("checkpoints")
    numbers = count()

    def write(**options: Any) -> Path:
        tiny = Tiny(**options)
        folder = root / f"{tiny.family}-{next(numbers)}"
        folder.mkdir()
        write_json(folder / "config.json", config_of(tiny))
        write_json(folder / "generation_config.json", {"eos_token_id": [1, 5]})
        tokenizer_of(tiny.vocab).save(str(folder / "tokenizer.json"))
        write_json(folder / "tokenizer_config.json", tokenizer_config())
        write_weights(folder, dict(weights_of(tiny)), tiny)
        return folder

    return write


@pytest.fixture(scope="session")
def tiny_gemma4(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Factory of Gemma 4 folders by the name of a variant, with the options of `write_gemma4`.

    `text` changes keys of the variant.
    """
    from tests.gemma4 import VARIANTS, write_gemma4  # which imports transformers

    root, numbers = tmp_path_factory.mktemp("gemma4"), count()

    def write(variant: str, *, text: Mapping[str, Any] | None = None, **options: Any) -> Path:
        keys = {**VARIANTS[variant], **(text or {})}
        return write_gemma4(root / f"{variant}-{next(numbers)}", keys, **options)

    return write


@pytest.fixture(scope="session")
def tiny_gemma3n(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Factory of Gemma 3n folders, as `tiny_gemma4`."""
    from tests.gemma3n import VARIANTS, write_gemma3n  # which imports transformers

    root, numbers = tmp_path_factory.mktemp("gemma3n"), count()

    def write(variant: str, *, text: Mapping[str, Any] | None = None, **options: Any) -> Path:
        keys = {**VARIANTS[variant], **(text or {})}
        return write_gemma3n(root / f"{variant}-{next(numbers)}", keys, **options)

    return write


@dataclass(frozen=True)
class Parts:
    """What a `BundleWriter` is given for one small model."""

    shards: list[list[Entry]]
    manifest: Manifest
    assets: dict[str, bytes]

    @property
    def weights(self) -> dict[str, QuantTensor]:
        """Canonical name -> weight, in one piece."""
        entries = (entry for shard in self.shards for entry in shard)
        return {
            entry.name: joined(block for block in entry.blocks if isinstance(block, QuantTensor))
            for entry in entries
            if isinstance(entry, QuantEntry)
        }


@pytest.fixture(scope="session")
def bundle_parts(tiny_checkpoint: Callable[..., Path]) -> Callable[..., Parts]:
    """Factory of the parts of a bundle: a tiny checkpoint, rounded to nearest."""

    def make(
        layout: str = "igpu",
        bits: int = 4,
        group: int = 32,
        specs: Sequence[Spec] = (),
        **options: Any,
    ) -> Parts:
        """`specs`: taken in turn by one tensor after the other, instead of `bits` and `group`."""
        checkpoint = open_checkpoint(tiny_checkpoint(**options))
        config, turns = checkpoint.config, cycle(specs or [Spec(bits, group)])

        def entry(name: str, weight: NDArray[np.float32]) -> Entry:
            if weight.ndim == 1:
                return ArrayEntry(gain_name(name), weight)
            spec = next(turns)
            rows = [weight[start : start + 64] for start in range(0, len(weight), 64)]
            blocks = [rounded(piece, spec) for piece in rows]
            return QuantEntry(name, weight.shape, spec, layout, "rtn", blocks, 0.125)

        first = [entry(EMBEDDING, checkpoint.embedding(0, config.vocab_size))]
        if not config.tied_head:
            first.append(entry(HEAD, checkpoint.head(0, config.vocab_size)))
        shards = [[*first, entry(FINAL_NORM, checkpoint.final_norm())]]
        for layer in range(config.num_layers):
            weights = checkpoint.layer(layer).items()
            shards.append([entry(layer_tensor(layer, role), weight) for role, weight in weights])
        provenance = Provenance("folder", "tiny", None, checkpoint.dtype, {})
        manifest = Manifest(
            model=config,
            recipe=f"int{bits}",
            options={"group": group},
            provenance=provenance,
            calibration=None,
            left_out=checkpoint.left_out,
            tools={"numpy": np.__version__},
        )
        return Parts(shards, manifest, checkpoint.assets())

    return make


@pytest.fixture(scope="session")
def tiny_bundle(
    tmp_path_factory: pytest.TempPathFactory, bundle_parts: Callable[..., Parts]
) -> Callable[..., Path]:
    """Factory of bundles; takes the options of `bundle_parts`; each call writes a new one."""
    root = tmp_path_factory.mktemp("bundles")
    numbers = count()

    def write(**options: Any) -> Path:
        parts = bundle_parts(**options)
        with BundleWriter(root / f"tiny-{next(numbers)}", len(parts.shards), {}) as writer:
            for index, entries in enumerate(parts.shards):
                writer.write_shard(index, entries)
            return writer.finish(parts.manifest, parts.assets)

    return write


def joined(pieces: Iterable[QuantTensor]) -> QuantTensor:
    """Consecutive rows in one tensor."""
    pieces = list(pieces)
    codes, scales = (np.concatenate([getattr(p, f) for p in pieces]) for f in ("codes", "scales"))
    zeros = [piece.zeros for piece in pieces if piece.zeros is not None]
    return QuantTensor(codes, scales, pieces[0].spec, np.concatenate(zeros) if zeros else None)


def rounded(weight: NDArray[np.float32], spec: Spec) -> QuantTensor:
    """Round to nearest on the grid that just holds the group's largest weight, or its range."""
    grouped = weight.reshape(len(weight), -1, spec.group)
    if not spec.zero_point:
        scales = (np.abs(grouped).max(axis=2) / spec.qmax).astype(np.float16)
        zeros = np.zeros(scales.shape, np.int8)
    else:
        low, high = np.minimum(grouped.min(axis=2), 0), np.maximum(grouped.max(axis=2), 0)
        scales = ((high - low) / (spec.qmax - spec.qmin)).astype(np.float16)
        nibbles = np.rint((spec.qmin - low / scales.astype(np.float32)) / spec.zero_step)
        zeros = nibbles.clip(-8, 7).astype(np.int8) * np.int8(spec.zero_step)
    if spec.row_step:
        scales = round_scales(scales)
    codes = np.rint(grouped / scales[:, :, None].astype(np.float32)) + zeros[:, :, None]
    codes = codes.clip(spec.qmin, spec.qmax).astype(np.int8)
    return QuantTensor(
        codes.reshape(weight.shape), scales, spec, zeros if spec.zero_point else None
    )


@pytest.fixture(scope="session", autouse=True)
def fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An empty cache: one of an earlier run may hold what other code made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub on the loopback that the client of this process, and of its children, talks to."""
    from huggingface_hub import close_session, constants

    with HubServer() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        close_session()
        yield server
        end_of_fetching()
        close_session()


def end_of_fetching() -> None:
    """Wait for what checkpoints that are gone still fetch ahead."""
    gc.collect()
    for thread in [thread for thread in threading.enumerate() if thread.name == THREAD]:
        thread.join(timeout=5)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the client wanted to wait before it asked again; none is waited."""
    waited: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waited.append)
    return waited


@pytest.fixture(scope="session")
def interruptible() -> list[str]:
    """`uq` for a subprocess that SIGINT reaches, even if the tests run as a background job.

    A shell starts those with SIGINT ignored, and Python leaves it so.
    """
    code = (
        "import signal, sys, uq.cli; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "sys.exit(uq.cli.main())"
    )
    return [sys.executable, "-c", code]


@pytest.fixture(scope="session")
def real_gguf() -> Path:
    """The real Gemma 3 270M (Q4_K_M) from the packages of the extra `demo`."""
    return demo_gguf()


@pytest.fixture(scope="session")
def real_bundle(real_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same, rounded to the nearest INT4 codes, its embedding INT8."""
    out = tmp_path_factory.mktemp("real") / "bundle"
    return open_bundle(quantize(open_checkpoint(real_gguf), out, QuantizeOptions(method="rtn")))


@pytest.fixture(scope="session", autouse=True)
def vulkan_messages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file with what the Khronos validation layer says about all that the tests run."""
    return watch_validation(tmp_path_factory.mktemp("vulkan"))
