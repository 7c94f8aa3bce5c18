"""Examples below every `--help`. A test parses each of them."""

from __future__ import annotations

from collections.abc import Mapping

EXAMPLES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "quantize": (
        ("uq quantize google/gemma-3-1b-it --dry-run", "the plan, memory, disk and time"),
        ("uq quantize google/gemma-3-1b-it", "writes gemma-3-1b-it-int4"),
        ("uq quantize ./checkpoint -o small --recipe int4-small", "from a folder, smaller"),
        ("uq quantize model.gguf --bits 8", "from a GGUF file, 8 bits"),
        ("uq quantize MODEL --scheduler tcp://10.0.0.1:8786", "with the help of Dask workers"),
    ),
    "sweep": (
        ("uq sweep google/gemma-3-1b-it", "every recipe: bits, size, KL divergence, time"),
        ("uq sweep MODEL --recipe int4 --recipe bpw=5 -o tried.json", "two, and what they gave"),
        ("uq sweep MODEL --scheduler tcp://10.0.0.1:8786", "one on each of several machines"),
    ),
    "validate": (
        ("uq validate gemma-3-1b-it-int4", "writes report.html into the bundle"),
        ("uq validate BUNDLE --text mine.txt --chunks all", "over all of your own text"),
        ("uq validate BUNDLE --max-kld 0.1 --json", "exit code 1 if it lost more"),
    ),
    "export": (
        ("uq export gemma-3-1b-it-int4 --format gguf", "for llama.cpp, with the same codes"),
        ("uq export BUNDLE --format compressed-tensors", "for transformers and vLLM, packed"),
        ("uq export BUNDLE --format hf --dtype bfloat16", "plain weights for transformers"),
    ),
    "publish": (
        ("uq publish BUNDLE you/name --dry-run", "shows the model card and the files"),
        ("uq publish BUNDLE you/name --private", "uploads them"),
    ),
    "bench": (
        ("uq bench BUNDLE", "tokens per second beside what the memory allows"),
        ("uq bench BUNDLE --device vulkan --by-kernel", "where a decode step's time goes"),
        ("uq bench BUNDLE --device vulkan --trace step.json", "the same for ui.perfetto.dev"),
    ),
    "compare": (("uq compare BUNDLE OTHER", "their reports side by side"),),
    "generate": (
        ('uq generate BUNDLE -p "Once upon a time"', "the likeliest continuation"),
        ('uq generate BUNDLE -p "Hello" --chat --temperature 0.8 --seed 1', "an answer, sampled"),
        ("uq generate BUNDLE -p - < text.txt", "the text comes from a file"),
    ),
    "chat": (
        ("uq chat BUNDLE", "talk; Ctrl-C stops an answer"),
        ('uq chat BUNDLE --system "Be brief." --temperature 0.7', "with instructions"),
    ),
    "serve": (
        ("uq serve BUNDLE", "OpenAI's API on http://127.0.0.1:8000/v1"),
        ("uq serve BUNDLE --host 0.0.0.0 --api-key-file key.txt", "for other machines"),
    ),
    "inspect": (
        ("uq inspect google/gemma-3-1b-it", "a checkpoint"),
        ("uq inspect gemma-3-1b-it-int4 --json", "a bundle, for programs"),
        ("uq inspect design.xclbin", "a file for an NPU"),
    ),
    "npu": (
        ("uq npu verify design.mlir --device npu2", "exit code 1 if it cannot run there"),
        ("uq npu lower design.mlir -o insts.bin", "its sequence in words, without mlir-aie"),
        ("uq npu build design.mlir", "writes aie.xclbin and insts.bin"),
        ("uq npu build BUNDLE --device npu2", "puts its designs into a bundle, and compiles them"),
        ("uq npu build design.mlir --dry-run", "the commands, without running them"),
        ("uq npu run design.mlir --device npu-emulator", "a run without an NPU"),
    ),
    "doctor": (
        ("uq doctor", "what runs here, and the line to type for what does not"),
        ("uq doctor --fix", "offers what can be undone, one by one"),
    ),
    "completion": (
        ("uq completion bash > ~/.local/share/bash-completion/completions/uq", "bash"),
        ("uq completion zsh > ~/.zfunc/_uq", "zsh, with ~/.zfunc in its fpath"),
    ),
}


def epilog(command: str) -> str:
    """The examples of a command as the end of its help."""
    lines = EXAMPLES.get(command, ())
    return "\n".join(
        ["examples:"] * bool(lines) + [f"  {line}\n      {why}" for line, why in lines]
    )
