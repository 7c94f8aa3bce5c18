"""Attention of Gemma with an integer KV cache: prefill and decode, any length, GQA, windows."""
