"""Compiles the shaders before setuptools collects the files; the rest is pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithShaders(build_py):
    def run(self) -> None:
        sys.path.insert(0, str(ROOT))
        import uq

        uq.__path__.append(str(ROOT))  # uq.kernels is ROOT/kernels, also where links do not exist
        from uq.kernels.vulkan.compile import compile_all

        compile_all()
        super().run()


setup(cmdclass={"build_py": BuildWithShaders})
