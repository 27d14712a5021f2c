"""Builds the native extension; everything else is in pyproject.toml.

`LMTT_SANITIZE=1` builds it with the address and undefined-behaviour sanitizers, for `make test-sanitize`.
"""

import os
import platform
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext, has_flag
from setuptools import setup

SANITIZE = os.environ.get("LMTT_SANITIZE") == "1"
WARN = ["-Wall", "-Wextra"]
OPTIMISE = ["-O1", "-g", "-fno-omit-frame-pointer"] if SANITIZE else ["-O3"]
# Errno and traps are never looked at; NaN and infinities keep their meaning, and sums their order.
ARITHMETIC = ["-fno-math-errno", "-fno-trapping-math"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"] if SANITIZE else []

# One file for each instruction set; which one runs is decided on the machine. (GCC believes that its own
# AVX-512 intrinsics read uninitialised registers.)
INSTRUCTIONS = {
    "kernels_avx2.cpp": ["-mavx2", "-mfma", "-mbmi", "-mpopcnt"],
    "kernels_avx512.cpp": [
        *("-mavx512f", "-mavx512dq", "-mfma", "-mbmi", "-mpopcnt"),
        *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),
    ],
    "dequant_avx2.cpp": ["-mavx2", "-mf16c"],
    "dequant_avx512.cpp": [
        *("-mavx512f", "-mavx512dq"),
        *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),
    ],
}
ON_X86 = platform.machine().lower() in {"x86_64", "amd64"}

ParallelCompile("LMTT_BUILD_JOBS", default=0).install()


class BuildExt(build_ext):
    """Adds OpenMP where the compiler has it, and each file's own instruction set."""

    def build_extensions(self) -> None:
        if self.compiler.compiler_type != "unix":
            raise SystemExit("lmtt: the native extension needs GCC or Clang; on Windows, build it in WSL")
        try:
            openmp = ["-fopenmp"] if has_flag(self.compiler, "-fopenmp") else []
            if not openmp and not has_flag(self.compiler, "-std=c++17"):
                raise SystemExit("lmtt: no working C++17 compiler; install g++ or clang++, or set CXX")
        except OSError as error:
            raise SystemExit(
                f"lmtt: no working C++17 compiler ({error}); install g++ or clang++, or set CXX"
            ) from error
        for extension in self.extensions:
            extension.extra_compile_args += openmp
            extension.extra_link_args += openmp

        compile_one = self.compiler._compile

        def compile_with_instructions(obj, src, ext, cc_args, extra, pp):  # type: ignore[no-untyped-def]
            own = INSTRUCTIONS.get(Path(src).name, []) if ON_X86 else []
            compile_one(obj, src, ext, cc_args, [*extra, *own], pp)

        self.compiler._compile = compile_with_instructions
        super().build_extensions()


setup(
    ext_modules=[
        Pybind11Extension(
            "lmtt._C",
            [*sorted(glob("csrc/core/*.cpp")), "csrc/bindings.cpp"],
            depends=sorted(glob("csrc/core/*.h") + glob("csrc/core/*.inl")),
            include_dirs=["csrc"],
            extra_compile_args=[*WARN, *OPTIMISE, *ARITHMETIC, *SANITIZERS],
            extra_link_args=SANITIZERS,
            cxx_std=17,
        )
    ],
    cmdclass={"build_ext": BuildExt},
)
