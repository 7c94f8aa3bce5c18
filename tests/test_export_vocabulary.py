"""Vocabularies like those of Gemma's published tokenizer.json, in GGUF files and in folders."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import AutoTokenizer

from uq.errors import BundleError
from uq.export.export import Exported, ExportOptions, export
from uq.export.gguf_vocabulary import vocabulary
from uq.formats.bundle import Bundle, open_bundle
from uq.formats.checkpoint import open_checkpoint
from uq.quantize.pipeline import QuantizeOptions, quantize

Change = Callable[[dict[str, Any]], None]
SPACES = [f"{'▁' * count}" for count in range(2, 9)]
LINES = [f"{chr(10) * count}" for count in range(2, 6)]
TEXTS = (
    "a  b",
    "was\n    the world",
    "the        first  time   was",
    "the\n\n\nwas",
    "<table>  the",
    "  first",
    "    was  ",
    "the" + " " * 11 + "world",
)


@pytest.fixture
def bundle_of(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Bundle]:
    """A tiny bundle whose tokenizer.json was changed, or came alone."""

    def make(change: Change, *, alone: bool = False, vocab: int = 600) -> Bundle:
        folder = tiny_checkpoint(vocab=vocab)
        path = folder / "tokenizer.json"
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document, ensure_ascii=False))
        if alone:
            (folder / "tokenizer_config.json").unlink()
        options = QuantizeOptions(method="rtn", group=32)
        return open_bundle(quantize(open_checkpoint(folder), tmp_path / "bundle", options))

    return make


def rename(document: dict[str, Any], names: list[str]) -> None:
    """Give unused tokens of the vocabulary other names."""
    vocab = document["model"]["vocab"]
    free = [name for name in sorted(vocab, key=vocab.get) if name.startswith("<unused")]
    new = dict(zip(free, names, strict=False))
    assert len(new) == len(names)
    document["model"]["vocab"] = {new.get(name, name): index for name, index in vocab.items()}


def add(document: dict[str, Any], name: str, index: int, *, special: bool) -> None:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    document["added_tokens"].append({"id": index, "content": name, **flags, "special": special})
    document["added_tokens"].sort(key=lambda token: int(token["id"]))


def with_runs(document: dict[str, Any]) -> None:
    """Runs of spaces and line ends, and a tag, as Gemma has them: added, and merged first."""
    rename(document, [*SPACES, *LINES, "<table>"])
    merges = [[run[:at], run[at:]] for run in SPACES + LINES for at in range(1, len(run))]
    document["model"]["merges"] = merges + document["model"]["merges"]
    for name in (*SPACES, *LINES, "\n", "<table>"):
        add(document, name, document["model"]["vocab"][name], special=False)


def with_image_token(document: dict[str, Any]) -> None:
    """As Gemma 3's text models have it: one more token than rows."""
    add(document, "<image_soft_token>", len(document["model"]["vocab"]), special=True)


def exported(bundle: Bundle, form: str) -> Exported:
    return export(bundle, bundle.path.with_name(f"out.{form}"), ExportOptions(form))


def llama_cpp_tokens(path: Path) -> list[list[int]]:
    """What llama.cpp makes of each of `TEXTS`, `<bos>` in front."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(path), 64, 1
    params.warmup, params.cpuparams.n_threads = False, 1
    server = xllamacpp.Server(params)
    found = []
    for text in TEXTS:
        request = urllib.request.Request(
            f"{server.listening_address}/tokenize",
            json.dumps({"content": text, "add_special": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            found.append(json.load(response)["tokens"])
    return found


def test_runs_of_spaces_are_the_same_tokens_in_a_gguf(bundle_of: Callable[..., Bundle]) -> None:
    bundle = bundle_of(with_runs)
    wanted = [bundle.tokenizer().encode(text) for text in TEXTS]
    assert len(wanted[1]) < len(TEXTS[1])  # the runs are in use
    path = exported(bundle, "gguf").path
    assert [open_checkpoint(path).tokenizer().encode(text) for text in TEXTS] == wanted
    assert llama_cpp_tokens(path) == wanted


def test_a_token_without_a_row_is_left_out_of_a_gguf(bundle_of: Callable[..., Bundle]) -> None:
    made = exported(bundle_of(with_image_token), "gguf")
    assert made.left_out == ("tokens that the embedding has no row of: <image_soft_token>",)
    tokens = gguf.GGUFReader(made.path).fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == 600 and "<image_soft_token>" not in tokens


@pytest.mark.parametrize(
    ("merges", "named"),
    [
        ([["b", "c"], ["a", "b"], ["ab", "c"]], "a and bc"),  # by scores a and bc become abc
        ([["b", "c"]], "a and b"),  # without a score it is a token that neighbours may become
    ],
)
def test_what_scores_would_merge_otherwise_is_refused(
    bundle_of: Callable[..., Bundle], merges: list[list[str]], named: str
) -> None:
    def change(document: dict[str, Any]) -> None:
        rename(document, ["bc", "ab", "abc"])
        document["model"]["merges"] = merges + document["model"]["merges"]

    with pytest.raises(BundleError, match=f"what becomes of {named}; llama.cpp would split"):
        exported(bundle_of(change), "gguf")


def test_a_tokenizer_without_unknown_token_becomes_a_gguf(
    bundle_of: Callable[..., Bundle],
) -> None:
    def change(document: dict[str, Any]) -> None:
        document["model"]["unk_token"] = None

    made = exported(bundle_of(change), "gguf")
    assert "tokenizer.ggml.unknown_token_id" not in gguf.GGUFReader(made.path).fields


def test_special_tokens_beside_the_vocabulary_are_found(bundle_of: Callable[..., Bundle]) -> None:
    """The tokenizer's configuration is made from them, where none came with the model."""

    def change(document: dict[str, Any]) -> None:
        names = {token["content"]: token["id"] for token in document["added_tokens"]}
        assert {"<bos>": 2, "<eos>": 1}.items() <= names.items()
        vocab = document["model"]["vocab"]
        moved = ("<bos>", "<eos>", "<pad>")
        document["model"]["vocab"] = {n: i for n, i in vocab.items() if n not in moved}

    bundle = bundle_of(change, alone=True)
    loaded = AutoTokenizer.from_pretrained(exported(bundle, "hf").path)
    text = "the time of the world"
    assert loaded(text)["input_ids"] == bundle.tokenizer().encode(text)


def test_a_vocabulary_of_more_tokens_than_rows_is_refused(
    bundle_of: Callable[..., Bundle],
) -> None:
    data = bundle_of(with_runs).asset("tokenizer.json")
    with pytest.raises(BundleError, match="has token 599, but the embedding 599 rows"):
        vocabulary(data, 599, scored=True)
