"""What a model from a stranger may try; `SECURITY.md` says what of it cannot work."""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from uq.chat import ChatTemplate
from uq.errors import BundleError, CheckpointError, UqError
from uq.formats.bundle import open_bundle
from uq.formats.checkpoint import open_checkpoint
from uq.formats.decode import MAX_JSON, MAX_VALUES, parse_json
from uq.formats.tokenizer import Tokenizer
from uq.kernels.cpu.session import CpuSession

Tiny = Callable[..., Path]
HELLO: Any = [{"role": "user", "content": "hello"}]


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_modules_in_the_current_folder_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model's folder can hold a `json.py`; a person may start `uq chat .` there."""
    trap = f"open({str(tmp_path / 'sprung')!r}, 'w')"
    for name in ("json.py", "jinja2.py", "uq/__init__.py", "sitecustomize.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(trap)
    monkeypatch.chdir(tmp_path)
    with ChatTemplate("{{ messages[0].content }}", {}) as template:
        assert template.render(HELLO) == "hello"
    assert not (tmp_path / "sprung").exists()


def test_a_template_sees_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with ChatTemplate("x", {}) as template:
        template.render(HELLO)
        assert template._worker is not None
        environment = Path(f"/proc/{template._worker.pid}/environ").read_bytes()
    assert b"PATH=" in environment and b"hf_secret" not in environment


@pytest.mark.parametrize("name", ["LICENSE", "chat_template.jinja", "tokenizer_config.json"])
def test_an_asset_that_is_a_link_out_of_the_folder_is_refused(
    tiny_checkpoint: Tiny, tmp_path: Path, name: str
) -> None:
    (tmp_path / "id_rsa").write_text("{}")
    folder = tiny_checkpoint()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "id_rsa")
    with pytest.raises(CheckpointError, match=f"{name}: is a link out of the folder"):
        open_checkpoint(folder).assets()


def test_an_asset_that_is_no_file_is_refused(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint()
    os.mkfifo(folder / "LICENSE")  # reading it would wait for ever
    with pytest.raises(CheckpointError, match="LICENSE: is not a regular file"):
        open_checkpoint(folder).assets()


@pytest.mark.parametrize(
    "data",
    [b"[" + b"[]," * MAX_VALUES + b"0]", b'"' + b"x" * MAX_JSON + b'"', b"[" * 10**6],
    ids=["values", "bytes", "depth"],
)
def test_json_that_would_fill_the_memory_is_refused(data: bytes) -> None:
    with pytest.raises(BundleError, match="131072 values"):
        parse_json(data, "x.json")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "recursion"),
        (b"[1e999]", "beyond the range"),
        (b"[NaN]", "NaN is not a number"),
        (b'{"a": 1, "a": 2}', "appears twice"),
        (b"[" + b"9" * 5000 + b"]", "Exceeds the limit"),
    ],
    ids=["nested", "infinite", "nan", "twice", "digits"],
)
def test_json_that_python_would_take_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=f"x.json: not valid JSON: .*{message}"):
        parse_json(data, "x.json")


def tokenizer_with(folder: Path, **values: object) -> Tokenizer:
    document = json.loads((folder / "tokenizer.json").read_text()) | values
    return Tokenizer.from_bytes(json.dumps(document).encode(), 2, (1,))


DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
SEARCH = {"type": "Split", "pattern": {"Regex": "(a*)*b"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    "values",
    [
        {"normalizer": {"type": "Sequence", "normalizers": [DOUBLE] * 30}},
        {"normalizer": DOUBLE | {"content": "a" * 1000}},
        {"normalizer": {"type": "NFKC"}},
        {"pre_tokenizer": SEARCH},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SEARCH] * 2}},
    ],
)
def test_a_tokenizer_that_multiplies_text_is_refused(
    tiny_checkpoint: Tiny, values: dict[str, object]
) -> None:
    with pytest.raises(CheckpointError, match="tokenizer.json: .* step"):
        tokenizer_with(tiny_checkpoint(), **values)


def test_padding_of_a_tokenizer_is_ignored(tiny_checkpoint: Tiny) -> None:
    padding = {
        "strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>",
    }  # fmt: skip
    tokenizer = tokenizer_with(tiny_checkpoint(), padding=padding)
    assert len(tokenizer.encode("the time")) < 10


def test_a_token_beyond_the_vocabulary(tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle())
    session = CpuSession(bundle.config, bundle)
    for token in (bundle.config.vocab_size, 2**31 - 1, -1):
        with pytest.raises(UqError, match=f"token {token} is not in the vocabulary"):
            session.prefill([token])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**12),
        ("num_hidden_layers", 1025),
        ("hidden_size", 2**63),
        ("vocab_size", 10**300),
        ("rms_norm_eps", 10**300),
        ("layer_types", [["full_attention"]]),
        ("model_type", ["gemma"]),
        ("hidden_activation", {}),
        ("eos_token_id", "x" * 10**6),
    ],
)
def test_a_configuration_of_enormous_or_strange_values_is_refused(
    tiny_checkpoint: Tiny, key: str, value: object
) -> None:
    folder = tiny_checkpoint()
    edit_json(folder / "config.json", **{key: value})
    with pytest.raises(CheckpointError, match=key) as caught:
        open_checkpoint(folder)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2**62] * 8, "data_offsets": [0, 4]}, "out of range"),
        ({"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]}, "out of range"),
        ({"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}, "expected an integer"),
        ({"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}, "expected a string"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}, "begins at .*, within other"),
    ],
)
def test_a_tensor_of_a_strange_place_or_shape_is_refused(
    tiny_checkpoint: Tiny, entry: dict[str, object], message: str
) -> None:
    folder = tiny_checkpoint()
    other = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"other": other, "x": entry}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(8)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_no_reader_unpickles_or_evaluates() -> None:
    """Of the modules of Python that run what they read, none is imported by ours."""
    root = Path(sys.modules["uq"].__file__ or "").parent
    text = "\n".join(path.read_text() for path in root.rglob("*.py"))
    for forbidden in (
        "import pickle",
        "torch.load",
        "import marshal",
        "import shelve",
        "allow_pickle=True",
    ):
        assert forbidden not in text


def test_the_tests_that_the_page_names_are_there() -> None:
    tests = Path(__file__).parent
    page = (tests.parent / "SECURITY.md").read_text()
    named = re.findall(r"`(test_\w+)(?:::(test_\w+))?`", page)
    assert len(named) > 10
    sources = {file: (tests / f"{file}.py").read_text() for file, _ in named}
    assert [name for name in named if f"def {name[1]}" not in sources[name[0]]] == []
