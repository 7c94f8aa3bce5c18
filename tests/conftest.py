"""Models that the tests share: small random Gemma checkpoints and the real Gemma 3 270M."""

from __future__ import annotations

import gc
import json
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from tests.hub_server.server import HubServer
from tests.vulkan_lab import watch_validation
from uq.formats.bundle import Bundle, open_bundle
from uq.formats.checkpoint import open_checkpoint
from uq.formats.checkpoint.demo import demo_gguf
from uq.formats.checkpoint.read_ahead import THREAD
from uq.formats.config import EMBEDDING, FINAL_NORM, HEAD, layer_tensor
from uq.formats.manifest import Manifest, Provenance, gain_name
from uq.formats.row_scales import round_scales
from uq.formats.spec import QuantTensor, Spec
from uq.formats.writer import ArrayEntry, BundleWriter, Entry, QuantEntry
from uq.quantize.pipeline import QuantizeOptions, quantize
from uq.quantize.plan import RECIPES, GptqOptions

SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
MODEL_TYPES = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "vaultgemma": "vaultgemma",
}
CLASSES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "vaultgemma": "VaultGemmaForCausalLM",
}
DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
WORDS = """the of and to in is was for that with as on by from at his her which were are had this
not have their one first also two new after into time city world during than other been year"""


@dataclass(frozen=True)
class Tiny:
    """What `tiny_checkpoint` writes; every field is a keyword of the fixture.

    Attributes:
        window, pattern: sliding window in keys; every `pattern`-th layer is full (gemma3 only;
            gemma2 always alternates, gemma has full layers only).
        prefix: `model.`, or `language_model.model.` / `model.language_model.` for a multimodal
            gemma3 with a few vision tensors.
        shards: number of safetensors files; more than one writes an index.
        spread: standard deviation of the logits, about.
        config: keys that replace or extend those of config.json (of its text part).
        extra: further tensors, written as they are under these names.
    """

    family: str = "gemma3"
    hidden: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    ffn: int = 256
    vocab: int = 512
    window: int = 16
    pattern: int = 2
    dtype: str = "bf16"
    shards: int = 1
    tied: bool = True
    prefix: str = "model."
    seed: int = 0
    spread: float = 2.0
    config: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def multimodal(self) -> bool:
        return self.prefix != "model."


@pytest.fixture(scope="session", autouse=True)
def small_cache() -> Iterator[None]:
    """A processor whose cache is small: its bandwidth is measured in 256 MiB, not in gigabytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("uq.validate.bandwidth.last_level_cache", lambda: 64 << 20)
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


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2))


def config_of(tiny: Tiny) -> dict[str, Any]:
    """config.json as the Hub has them: keys equal to the class defaults are left out."""
    text: dict[str, Any] = {
        "hidden_size": tiny.hidden,
        "intermediate_size": tiny.ffn,
        "num_hidden_layers": tiny.layers,
        "num_attention_heads": tiny.heads,
        "num_key_value_heads": tiny.kv_heads,
        "head_dim": tiny.head_dim,
        "vocab_size": tiny.vocab,
        "model_type": MODEL_TYPES[tiny.family],
    }
    if tiny.family != "gemma":
        text |= {"sliding_window": tiny.window, "query_pre_attn_scalar": tiny.head_dim}
    if tiny.family == "gemma3":
        text |= {"sliding_window_pattern": tiny.pattern}
    if not tiny.tied:
        text["tie_word_embeddings"] = False
    text |= tiny.config
    dtype = {"torch_dtype": DTYPES[tiny.dtype]}
    if not tiny.multimodal:
        return {"architectures": [CLASSES[tiny.family]]} | text | dtype
    outer: dict[str, Any] = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "eos_token_id": [1, 5],
        "text_config": text,
        "vision_config": {"hidden_size": 8, "num_hidden_layers": 1},
    }
    return outer | dtype | ({} if tiny.tied else {"tie_word_embeddings": False})


def weights_of(tiny: Tiny) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Names as in the file. Linears keep the scale of their input, norm gains are 1 + N(0, 0.1)."""
    rng = np.random.default_rng(tiny.seed)

    def normal(*shape: int, std: float) -> NDArray[np.float32]:
        return (rng.standard_normal(shape) * std).astype(np.float32)

    def linear(rows: int, cols: int) -> NDArray[np.float32]:
        return normal(rows, cols, std=cols**-0.5)

    hidden, ffn, dim = tiny.hidden, tiny.ffn, tiny.head_dim
    q_size, kv_size = tiny.heads * dim, tiny.kv_heads * dim
    block = ["input_layernorm", "post_attention_layernorm"]
    outputs = ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    norms = {
        "gemma": block,
        "vaultgemma": ["input_layernorm", "pre_feedforward_layernorm"],
    }.get(tiny.family, block + outputs)

    table = tiny.spread * hidden**-0.5
    yield f"{tiny.prefix}embed_tokens.weight", normal(tiny.vocab, hidden, std=table)
    for layer in range(tiny.layers):
        name = f"{tiny.prefix}layers.{layer}."
        for norm in norms:
            yield f"{name}{norm}.weight", normal(hidden, std=0.1)
        if tiny.family == "gemma3":
            yield f"{name}self_attn.q_norm.weight", normal(dim, std=0.1)
            yield f"{name}self_attn.k_norm.weight", normal(dim, std=0.1)
        yield f"{name}self_attn.q_proj.weight", linear(q_size, hidden)
        yield f"{name}self_attn.k_proj.weight", linear(kv_size, hidden)
        yield f"{name}self_attn.v_proj.weight", linear(kv_size, hidden)
        yield f"{name}self_attn.o_proj.weight", linear(hidden, q_size)
        yield f"{name}mlp.gate_proj.weight", linear(ffn, hidden)
        yield f"{name}mlp.up_proj.weight", linear(ffn, hidden)
        yield f"{name}mlp.down_proj.weight", linear(hidden, ffn)
    yield f"{tiny.prefix}norm.weight", normal(hidden, std=0.1)
    if not tiny.tied:
        head = "language_model.lm_head" if tiny.prefix.startswith("language_model.") else "lm_head"
        yield f"{head}.weight", normal(tiny.vocab, hidden, std=table)
    if tiny.multimodal:
        vision = "model." if tiny.prefix == "model.language_model." else ""
        yield f"{vision}vision_tower.vision_model.post_layernorm.weight", normal(8, std=0.1)
        yield f"{vision}vision_tower.vision_model.embeddings.weight", normal(4, 8, std=0.1)
        yield f"{vision}multi_modal_projector.mm_input_projection_weight", normal(8, 4, std=0.1)
    yield from tiny.extra.items()


def write_weights(folder: Path, weights: dict[str, NDArray[np.float32]], tiny: Tiny) -> None:
    names = list(weights)
    if tiny.shards == 1:
        write_shard(folder / "model.safetensors", weights, tiny.dtype)
        return
    where: dict[str, str] = {}
    for number in range(tiny.shards):
        file = f"model-{number + 1:05}-of-{tiny.shards:05}.safetensors"
        mine = names[number :: tiny.shards]
        write_shard(folder / file, {name: weights[name] for name in mine}, tiny.dtype)
        where |= dict.fromkeys(mine, file)
    total = sum(weights[name].size for name in names) * (4 if tiny.dtype == "f32" else 2)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    write_json(folder / "model.safetensors.index.json", index)


def write_shard(path: Path, weights: Mapping[str, NDArray[np.float32]], dtype: str) -> None:
    """One safetensors file: header size (uint64), JSON header, the tensors one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, values in weights.items():
        data = encode(values, dtype)
        offsets = [len(body), len(body) + len(data)]
        header[name] = {
            "dtype": dtype.upper(),
            "shape": list(values.shape),
            "data_offsets": offsets,
        }
        body += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def encode(values: NDArray[np.float32], dtype: str) -> bytes:
    """Bytes of a float array in the file's dtype; bf16 rounds to nearest, ties to even."""
    if dtype == "f32":
        return values.tobytes()
    if dtype == "f16":
        return values.astype(np.float16).tobytes()
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype(np.uint16).tobytes()


def tokenizer_of(size: int) -> Tokenizer:
    """A byte-fallback BPE of Gemma's kind with exactly `size` tokens."""
    pieces = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\n", "\t", "▁", *(chr(code) for code in range(33, 127)), "é", "世"]
    merges: list[tuple[str, str]] = []
    room = size - len(pieces)
    if room < 0:
        raise ValueError(f"a tiny vocabulary needs at least {len(pieces)} tokens")
    for left, right in word_merges():
        if len(merges) == room:
            break
        merges.append((left, right))
    pieces += [left + right for left, right in merges]
    pieces += [f"<unused{number}>" for number in range(size - len(pieces))]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(piece, normalized=False, special=True) for piece in SPECIALS]
    )
    return tokenizer


def word_merges() -> Iterator[tuple[str, str]]:
    """Left-to-right merges that build each word behind a space, without duplicates."""
    seen: set[str] = set()
    for word in WORDS.split():
        left = "▁"
        for letter in word:
            if left + letter not in seen:
                seen.add(left + letter)
                yield left, letter
            left += letter


def tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "GemmaTokenizer",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "chat_template": CHAT_TEMPLATE,
    }


@pytest.fixture(scope="session", autouse=True)
def vulkan_messages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file with what the Khronos validation layer says about all that the tests run."""
    return watch_validation(tmp_path_factory.mktemp("vulkan"))
