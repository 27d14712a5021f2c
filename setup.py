"""Builds the native extension; everything else is in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

ParallelCompile("LMTT_BUILD_JOBS").install()

setup(
    ext_modules=[
        Pybind11Extension(
            "lmtt._C",
            sorted(glob("csrc/core/*.cpp")) + ["csrc/bindings.cpp"],
            depends=sorted(glob("csrc/**/*.h", recursive=True)),
            include_dirs=["csrc"],
            cxx_std=17,
        )
    ],
    cmdclass={"build_ext": build_ext},
)
