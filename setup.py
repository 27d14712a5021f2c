"""Builds the native extension; everything else is in pyproject.toml.

Beside it, where there is a GPU to build for, `lmtt/_lmtt_cuda.so` (csrc/cuda, see `cuda_compiler`).

`LMTT_SANITIZE=1` builds it with the address and undefined-behaviour sanitizers, for `make test-sanitize`.
"""

import os
import platform
import re
import shutil
import subprocess
from glob import glob
from importlib.util import find_spec
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


# Machine code for each, and PTX of the last for chips to come.
CUDA_CHIPS = ("80", "90", "100", "120")


def cuda_compiler() -> str:
    """nvcc, or SystemExit or a reason why the CUDA kernels are left out.

    They are built where nvcc is found and the installed torch was built for CUDA, so that an install for the
    CPU takes no longer because of them. LMTT_CUDA=1 insists, LMTT_CUDA=0 leaves them out.
    """
    wanted = os.environ.get("LMTT_CUDA", "auto")
    if wanted == "0":
        raise LookupError("LMTT_CUDA=0")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    torch = find_spec("torch")
    version = Path(torch.origin).with_name("version.py").read_text() if torch and torch.origin else ""
    if nvcc is None:
        reason = "no nvcc was found; install the CUDA toolkit or set CUDA_HOME"
    elif wanted != "1" and re.search(r"^cuda\b[^=]*=\s*['\"]", version, re.MULTILINE) is None:
        reason = "the installed torch is not built for CUDA; LMTT_CUDA=1 builds them all the same"
    else:
        return nvcc
    if wanted == "1":
        raise SystemExit(f"lmtt: the CUDA kernels cannot be built: {reason}")
    raise LookupError(reason)


def build_cuda(folder: Path) -> None:
    """Compile csrc/cuda into one shared library in `folder`, or say why not."""
    try:
        nvcc = cuda_compiler()
    except LookupError as reason:
        print(f"lmtt: CUDA kernels left out: {reason}")
        return
    listed = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
    only = os.environ.get("LMTT_CUDA_CHIPS", " ".join(CUDA_CHIPS)).split()
    chips = [chip for chip in only if f"compute_{chip}" in listed.split()]
    targets = [f"-gencode=arch=compute_{chip},code=sm_{chip}" for chip in chips]
    targets.append(f"-gencode=arch=compute_{chips[-1]},code=compute_{chips[-1]}")
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [
            *(nvcc, "-std=c++17", "-O3", "-Icsrc", "--threads", "0", "-Xcompiler", "-fPIC", "-shared"),
            *(*targets, "-o", str(folder / "_lmtt_cuda.so"), *sorted(glob("csrc/cuda/*.cu"))),
        ],
        check=True,
    )


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
        build_cuda(Path(self.get_ext_fullpath("lmtt._C")).parent)


setup(
    ext_modules=[
        Pybind11Extension(
            "lmtt._C",
            [*sorted(glob("csrc/core/*.cpp")), "csrc/bindings.cpp"],
            # csrc/cuda among them so that it travels in the source distribution
            depends=sorted(glob("csrc/core/*.h") + glob("csrc/core/*.inl") + glob("csrc/cuda/*")),
            include_dirs=["csrc"],
            extra_compile_args=[*WARN, *OPTIMISE, *ARITHMETIC, *SANITIZERS],
            extra_link_args=SANITIZERS,
            cxx_std=17,
        )
    ],
    cmdclass={"build_ext": BuildExt},
)
