"""Designs as text: read, printed, read again, in every spelling; and text that is no design."""

from __future__ import annotations

from pathlib import Path

import pytest

from uq.errors import DesignError
from uq.kernels.npu.dialect.structure import LegacyRuntimeSequence, RuntimeSequence
from uq.kernels.npu.source import parse_design, print_design, read_design
from uq.kernels.npu.syntax import SYNTAXES, to_syntax

DESIGNS = Path(__file__).parent / "npu"
EVERY = sorted(DESIGNS.rglob("*.mlir"))
SMALL = [path for path in EVERY if path.stat().st_size < 20_000]
LOWLEVEL = DESIGNS / "lowlevel.mlir"
LEGACY = DESIGNS / "legacy.mlir"


def name(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", EVERY, ids=name)
def test_printed_text_parses_to_the_same_design(path: Path) -> None:
    module = read_design(path).module
    text = print_design(module)
    again = parse_design(text).module
    assert module.is_structurally_equivalent(again)
    assert print_design(again) == text


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("path", SMALL, ids=name)
def test_every_spelling_parses_to_the_same_design(path: Path, syntax: str) -> None:
    module = to_syntax(read_design(path).module, SYNTAXES[syntax])
    assert module.is_structurally_equivalent(parse_design(print_design(module)).module)


@pytest.mark.parametrize("path", [LOWLEVEL, LEGACY], ids=name)
def test_spelling_there_and_back_changes_nothing(path: Path) -> None:
    newest = to_syntax(read_design(path).module, SYNTAXES["2026"])
    oldest = to_syntax(newest, SYNTAXES["1.0"])
    back = to_syntax(to_syntax(oldest, SYNTAXES["2026"]), SYNTAXES["1.0"])
    assert print_design(back) == print_design(oldest)


def test_old_spelling_has_the_old_names() -> None:
    text = print_design(to_syntax(read_design(LOWLEVEL).module, SYNTAXES["1.0"]))
    assert "aie.device(npu1_4col) {" in text
    assert "aiex.runtime_sequence @sequence(" in text
    assert "aie.shim_dma_allocation @from_array(S2MM, 0, 1)" in text
    assert 'stack_size = 2048 : i32, link_with = "add.o"}' in text


def test_new_spelling_has_the_new_names() -> None:
    text = print_design(to_syntax(read_design(LEGACY).module, SYNTAXES["2026"]))
    assert "aie.device(npu1) @main {" in text
    assert "aie.runtime_sequence(" in text
    assert "aie.shim_dma_allocation @extra(%shim, S2MM, 1)" in text
    assert (
        "func.func private @work(memref<16xi8>, memref<16xi8>) -> () attributes {link_with" in text
    )


def test_respelling_leaves_the_design_alone() -> None:
    module = read_design(LEGACY).module
    before = print_design(module)
    to_syntax(module, SYNTAXES["2026"])
    assert print_design(module) == before


def test_one_function_in_two_object_files_has_no_new_spelling() -> None:
    core = """aie.core(%{0}) {{
      func.call @f() : () -> ()
      aie.end
    }} {{link_with = "{0}.o"}}"""
    tiles = "%a = aie.tile(0, 2)\n%b = aie.tile(0, 3)\nfunc.func private @f() -> ()\n"
    text = f"module {{ aie.device(npu1) {{ {tiles} {core.format('a')} {core.format('b')} }} }}"
    with pytest.raises(DesignError, match='@f comes from "a.o" and from "b.o"'):
        to_syntax(parse_design(text).module, SYNTAXES["2026"])


def test_two_object_files_of_one_core_have_no_old_spelling() -> None:
    text = """module { aie.device(npu1) { %a = aie.tile(0, 2)
      func.func private @f() -> () attributes {link_with = "f.o"}
      func.func private @g() -> () attributes {link_with = "g.o"}
      aie.core(%a) {
        func.call @f() : () -> ()
        func.call @g() : () -> ()
        aie.end
      } } }"""
    with pytest.raises(DesignError, match='links "f.o", "g.o"'):
        to_syntax(parse_design(text).module, SYNTAXES["1.1"])


def test_values_that_are_named_like_a_second_one_stay_apart() -> None:
    tiles = "\n".join(f"%{name} = aie.tile({n}, 0)" for n, name in enumerate(("a_1", "a", "a_1_1")))
    module = parse_design(
        f"module {{ aie.device(npu1) {{ {tiles}\n%a_2 = aie.tile(3, 0) }} }}"
    ).module
    assert module.is_structurally_equivalent(parse_design(print_design(module)).module)


def test_letters_beyond_ascii_are_printed_and_read() -> None:
    text = 'module { aie.device(npu1) { %t = aie.tile(0, 2) {note = "größer"} } }'
    module = parse_design(text).module
    assert module.is_structurally_equivalent(parse_design(print_design(module)).module)
    with pytest.raises(DesignError, match="not UTF-8"):
        parse_design(text.replace("ö", "\\F6"))


def test_both_names_of_the_sequence_are_read() -> None:
    for path, kind in ((LOWLEVEL, RuntimeSequence), (LEGACY, LegacyRuntimeSequence)):
        assert any(isinstance(op, kind) for op in read_design(path).module.walk())


def test_every_operation_knows_its_line() -> None:
    source = read_design(LOWLEVEL)
    lines = LOWLEVEL.read_text().split("\n")
    named = [op for op in source.lines if op.name.startswith(("aie.", "aiex."))]
    assert len(named) > 80
    assert all(op.name in lines[source.lines[op] - 1] for op in named)


NESTED = "".join(f"scf.for %i{n} = %c to %c step %c {{\n" for n in range(5000))
HOSTILE = {
    "empty": ("", "1:1: "),
    "unknown operation": (
        "module {\n  aie.device(npu1) {\n    aie.frobnicate(1) } }",
        "3:5: unknown operation aie.frobnicate",
    ),
    "unknown dialect": (
        "module {\n llvm.unreachable\n}",
        "2:2: unknown operation llvm.unreachable",
    ),
    "undefined value": ("module { aie.device(npu1) { aie.core(%q) {} } }", "not defined: .%q"),
    "use before definition": (
        "module { aie.device(npu1) { aie.cascade_flow(%q, %q)\n func.func @f() {} } }",
        "%q|before assignment|not defined",
    ),
    "use beyond its region": (
        "module { aie.device(npu1) {\n%t = aie.tile(0, 2) }\n"
        "aie.device(npu1) { aie.cascade_flow(%t, %t) } }",
        ".%t|not defined",
    ),
    "a label twice": (
        "module { aie.device(npu1) {\n%t = aie.tile(0, 2)\naie.mem(%t) {\n"
        "%0 = aie.dma_start(S2MM, 0, ^a, ^a)\n^a:\naie.end\n^a:\naie.end } } }",
        "7:1: .*block .a is defined twice",
    ),
    "use before its operation": (
        "module {\nfunc.func @f() { aie.core(%x) {} }\nfunc.func @g(%x : index) { func.return } }",
        "2: aie.core uses a value that is not defined",
    ),
    "deep braces": ("{" * 100_000, "1:1: "),
    "deep regions": (
        "module { aie.device(npu1) { %c = arith.constant 1 : index\n" + NESTED,
        "deep",
    ),
    "deep types": ("module { func.func private @f(" + "tuple<" * 5000, "deep"),
    "5000 digits": (
        "module { aie.device(npu1) { %t = aie.tile(" + "9" * 5000 + ", 0) } }",
        "digits",
    ),
    "column of 37 bits": ("module { aie.device(npu1) { %t = aie.tile(99999999999, 0) } }", "range"),
    "integers of 9 GB": ("module { %v = arith.constant 1 : i77777777777 }", "1:34: "),
    "open string": ('module { aie.device(npu1) { } {sym_name = "' + "a" * 200, "1: a string"),
    "wrong escape": (
        'module { aie.device(npu1) { } {sym_name = "' + "a" * 200 + '\\q"} }',
        "escape",
    ),
    "huge dense": (
        "module { memref.global @g : memref<99999999999xi32> = dense<0> }",
        "dense value of more than",
    ),
    "huge splat": (
        "module { %v = arith.constant dense<0> : vector<99999999999xi32> }",
        "dense value of more than",
    ),
    "nul": ("\0\0", "1:1: "),
    "no port": ("module { aie.device(npu1) { %t = aie.tile(0, 2)\n aie.flow(%t, Dma : 0", "2:15: "),
    "given twice": ('module { aie.device(npu1) @a {} {sym_name = "b"} }', "given twice"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_text_is_one_line_with_a_place(case: str) -> None:
    text, expected = HOSTILE[case]
    with pytest.raises(DesignError, match=expected) as caught:
        parse_design(text, "x.mlir")
    assert str(caught.value).startswith("x.mlir:")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("start", range(7))
def test_truncated_text_is_refused(start: int) -> None:
    text = LOWLEVEL.read_text().rstrip()
    for length in range(300 + start * 19, len(text) - 1, 7 * 19):
        with pytest.raises(DesignError):
            parse_design(text[:length])


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "design.mlir"
    path.write_bytes(b"module \xff")
    with pytest.raises(DesignError, match="byte 7 is not UTF-8"):
        read_design(path)
