"""Compiles the shaders before setuptools collects the files; the rest is pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

import uq  # the folder beside this file: setup.py runs there

ROOT = Path(__file__).resolve().parent


class BuildWithShaders(build_py):
    def run(self) -> None:
        from uq.kernels.vulkan.compile import compile_all

        compile_all()
        super().run()


uq.__path__.append(str(ROOT))  # uq.kernels is ROOT/kernels, also where links do not exist
setup(cmdclass={"build_py": BuildWithShaders})
