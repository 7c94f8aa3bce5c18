"""The quantizers that are compared, one per file."""
