"""Which quantizer loses least on Gemma at equal bits: one reference, one protocol, every row.

python -m benchmarks.quality --llama-bin BUILD/bin --doc docs/quality.md

Every row is quantized by its own tool in its own process. Its weights are then dequantized and run
in float32 by uq's reference, so that no engine's rounding of activations is measured with them.
"""
