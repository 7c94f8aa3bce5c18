"""Bytes in, the same bytes out: the smallest design that proves a machine."""
