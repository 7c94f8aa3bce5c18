"""uq: quantize, package and validate Gemma for AMD Ryzen AI machines."""

__version__ = "0.1.0"
