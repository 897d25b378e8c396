"""Finds the packages, and builds the kernel of the engine "compiled" where there is a C compiler; the rest is in setup.cfg."""

from __future__ import annotations

from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDER = "sb3_ppo_from_scratch/engines/compiled/kernel"
SOURCES = [f"{FOLDER}/{name}.c" for name in ("kernel", "epoch_generic", "epoch_avx2", "epoch_avx512")]
HEADERS = [f"{FOLDER}/{name}.h" for name in ("kernel", "epoch", "heads", "products", "vectors")]
# GNU's dialect fuses a * b + c; no result here depends on errno or on floating-point traps
FLAGS = ["-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-g0"]


class BuildLibrary(build_ext):
    """A plain shared library, which ctypes loads, in the place of a Python module."""

    def get_ext_filename(self, fullname: str) -> str:
        """One name for all Pythons, since it knows none."""
        return f"{fullname.replace('.', '/')}.so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """There is no function for Python to call."""
        return list(ext.export_symbols)


class WheelForAnyPython(bdist_wheel):
    """The library needs a platform, but no Python."""

    def get_tag(self) -> tuple[Any, ...]:
        """``py3-none-<platform>``"""
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[*find_packages(include=["sb3_ppo_from_scratch*"]), "sb3_ppo_from_scratch.hyperparams"],
    ext_modules=[
        Extension(
            "sb3_ppo_from_scratch.engines.compiled._kernel",
            SOURCES,
            depends=HEADERS,
            libraries=["m"],
            extra_compile_args=FLAGS,
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": WheelForAnyPython},
)
