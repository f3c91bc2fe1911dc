"""Builds scrimp._C (torch ops, stable ABI) and scrimp._host (pybind11) from the sources it finds by name.

    csrc/*.cpp, csrc/common/*.cpp, csrc/cpu/*.cpp   compiled once                          -> _C
    csrc/cpu/*.kernel.cpp                           compiled once per instruction set      -> _C
    csrc/cpu/*.vnni.kernel.cpp                      and once more for AVX-512 with VNNI    -> _C
    csrc/cuda/*.cu                                  compiled where torch has CUDA          -> _C
    csrc/host/*.cpp                                 compiled once, no torch                -> _host

Adding an op adds files there and nothing here. Environment: SCRIMP_NO_EXT=1 installs without compiling,
SCRIMP_CUDA=1 insists on the CUDA kernels and SCRIMP_CUDA=0 leaves them out (by default they are compiled where torch
has CUDA and nvcc is found), SCRIMP_SANITIZE=address,undefined builds with sanitizers, SCRIMP_EMULATE_VNNI=1 lets the
kernels for VNNI do its instruction in software, CXX and MAX_JOBS as usual.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
NO_EXT = os.environ.get("SCRIMP_NO_EXT") == "1"
SANITIZE = os.environ.get("SCRIMP_SANITIZE", "")
EMULATE_VNNI = os.environ.get("SCRIMP_EMULATE_VNNI") == "1"

# Oldest torch whose stable ABI the binary uses: 2.10.
TARGET_VERSION = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"
FLAGS = ["-std=c++20", "-O1" if SANITIZE else "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
FLAGS += ["-DSCRIMP_EMULATE_VNNI"] if EMULATE_VNNI else []
# The same PTX serves sm_80, sm_86 and sm_89; PTX for compute_90 serves what comes after sm_90.
CUDA_FLAGS = [
    "-std=c++20",
    "-O3",
    "-DUSE_CUDA",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
    "-gencode=arch=compute_80,code=[sm_80,sm_86,sm_89]",
    "-gencode=arch=compute_90,code=[sm_90,compute_90]",
]
ISA_FLAGS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
    vnni = ["-DSCRIMP_VNNI", *([] if EMULATE_VNNI else ["-mavx512vnni"])]
    ISA_FLAGS |= {"avx2": avx2, "avx512": avx2 + avx512, "avx512vnni": avx2 + avx512 + vnni}


# Kernels that promise the bits of operations rounded one by one; what they fuse they write as fma().
KERNEL_FLAGS = {f"{op}.vnni.kernel": ["-ffp-contract=off"] for op in ("int4_linear", "int4_sparse_linear")}


def find_cuda() -> tuple[str, str] | None:
    """nvcc and the libcudart to link, or None where the CUDA kernels are left out."""
    wish = os.environ.get("SCRIMP_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"scrimp: SCRIMP_CUDA={wish} is neither 0 nor 1")
    if wish == "0" or SANITIZE:
        return None
    import torch

    try:
        if torch.version.cuda is None:
            raise LookupError(f"torch {torch.__version__} is built without CUDA")
        return match_cuda(torch.version.cuda)
    except LookupError as reason:
        if wish == "1":
            sys.exit(f"scrimp: SCRIMP_CUDA=1 cannot be met: {reason}")
        if torch.version.cuda:
            print(f"scrimp: the CUDA kernels are left out (Triton serves GPUs): {reason}", file=sys.stderr)
        return None


def match_cuda(wanted: str) -> tuple[str, str]:
    """The first nvcc of the major version of CUDA `wanted`, and its libcudart."""
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    homes += [home for folder in sys.path for home in sorted(Path(folder).glob("nvidia/cu*"))]
    found = [shutil.which("nvcc"), *(str(home / "bin" / "nvcc") for home in homes if (home / "bin" / "nvcc").exists())]
    major, tried = wanted.split(".")[0], []
    for nvcc in filter(None, found):
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        version = (re.findall(r"release ([\d.]+)", said) or ["?"])[0]
        # A wrapper script may stand for nvcc, so nvcc itself says where it lives.
        dry = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        for home in [*map(Path, re.findall(r"TOP=(\S+)", dry)), *homes]:
            for library in (home / "lib64" / f"libcudart.so.{major}", home / "lib" / f"libcudart.so.{major}"):
                if version.split(".")[0] == major and library.exists():
                    return nvcc, str(library.resolve())
        tried.append(f"{nvcc} is of CUDA {version}")
    raise LookupError(
        f"torch is of CUDA {wanted}, and there is no nvcc with libcudart.so.{major} on PATH, in CUDA_HOME, in "
        f"/usr/local/cuda or in the nvidia wheels (requirements-nvcc.txt); {'; '.join(tried) or 'no nvcc at all'}"
    )


def toolchain() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Compile and link flags of the two modules; torch's and pybind11's headers are system headers."""
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError:
        sys.exit(
            "scrimp: torch is not installed in this environment; run `pip install torch ninja pybind11` first and "
            "then `pip install --no-build-isolation .` (or set SCRIMP_NO_EXT=1 to install without the compiled ops)."
        )
    import pybind11

    python = f"-isystem{sysconfig.get_path('include')}"
    compile_flags = {
        "_C": [f"-I{CSRC}", *(f"-isystem{path}" for path in include_paths()), python],
        "_host": [f"-I{CSRC}", f"-isystem{pybind11.get_include()}", python],
    }
    # The libraries are found at run time because `import torch` has loaded them before.
    link_flags = {
        "_C": [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-ltorch", "-lc10"],
        "_host": [],
    }
    return compile_flags, link_flags


def compilations() -> dict[str, list[tuple[Path, str, list[str]]]]:
    """Module -> (source, object name, extra flags) of every C++ file to compile."""
    once = [*CSRC.glob("*.cpp"), *(CSRC / "common").glob("*.cpp"), *(CSRC / "cpu").glob("*.cpp")]
    kernels = sorted((CSRC / "cpu").glob("*.kernel.cpp"))
    ops = [
        (source, source.stem, [TARGET_VERSION, "-DPy_LIMITED_API=0x030a0000"])
        for source in sorted(set(once) - set(kernels))
    ]
    for isa, flags in ISA_FLAGS.items():
        for source in kernels:
            if isa != "avx512vnni" or source.name.endswith(".vnni.kernel.cpp"):
                own = [f"-DSCRIMP_ISA={isa}", *flags, *KERNEL_FLAGS.get(source.stem, [])]
                ops.append((source, f"{source.stem}.{isa}", own))
    host = [(source, source.stem, []) for source in sorted((CSRC / "host").glob("*.cpp"))]
    return {"_C": ops, "_host": host}


def ninja_file(outputs: dict[str, str], build: Path) -> str:
    """The text of a build.ninja that compiles and links both modules to `outputs`."""
    sanitize = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer"] if SANITIZE else []
    flags = " ".join(FLAGS + sanitize)
    link = " ".join(["-shared", "-Wl,--as-needed", *sanitize])
    lines = [
        f"builddir = {build}",
        f"cxx = {os.environ.get('CXX', 'c++')}",
        "rule compile",
        f"  command = $cxx {flags} -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = $cxx {link} $in $libraries -o $out",
        "  description = link $out",
    ]
    compile_flags, link_flags = toolchain()
    cuda = find_cuda()
    if cuda:
        nvcc, cudart = cuda
        lines += [
            "rule compile_cuda",
            f"  command = {nvcc} -ccbin $cxx {' '.join(CUDA_FLAGS)} -MD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $out",
        ]
        link_flags["_C"] += ["-ltorch_cuda", cudart]
    for module, sources in compilations().items():
        objects = []
        for source in sorted((CSRC / "cuda").glob("*.cu")) if cuda and module == "_C" else []:
            objects.append(f"{build}/{module}/{source.stem}.cuda.o")
            lines.append(f"build {objects[-1]}: compile_cuda {source}")
            flags = [flag.replace("-isystem", "-isystem=") for flag in compile_flags[module]]  # nvcc's spelling
            lines.append(f"  flags = {' '.join([*flags, TARGET_VERSION])}")
        for source, name, extra in sources:
            objects.append(f"{build}/{module}/{name}.o")
            lines.append(f"build {objects[-1]}: compile {source}")
            lines.append(f"  flags = {' '.join(compile_flags[module] + extra)}")
        lines.append(f"build {outputs[module]}: link {' '.join(objects)}")
        lines.append(f"  libraries = {' '.join(link_flags[module])}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """Compiles with ninja (header dependencies, incremental), because each kernel has flags of its own."""

    def build_extensions(self) -> None:
        build = ROOT / "build" / (f"sanitize-{SANITIZE.replace(',', '-')}" if SANITIZE else "ninja")
        build.mkdir(parents=True, exist_ok=True)
        outputs = {ext.name.split(".")[-1]: self.get_ext_fullpath(ext.name) for ext in self.extensions}
        for output in outputs.values():
            Path(output).parent.mkdir(parents=True, exist_ok=True)
        outputs = {module: str(Path(output).resolve()) for module, output in outputs.items()}
        (build / "build.ninja").write_text(ninja_file(outputs, build))
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        beside_python = Path(sys.executable).parent / "ninja"
        ninja = str(beside_python) if beside_python.exists() else shutil.which("ninja")
        if ninja is None:
            sys.exit("scrimp: ninja is not installed; run `pip install ninja` first.")
        result = subprocess.run([ninja, "-f", str(build / "build.ninja"), *jobs])
        if result.returncode != 0:
            sys.exit("scrimp: compiling the extension failed (see above); SCRIMP_NO_EXT=1 installs without it.")


extensions = [
    Extension("scrimp._C", sources=[], py_limited_api=True),
    Extension("scrimp._host", sources=[]),
]
setup(
    package_dir={"": "python", "scrimp.kernels": "kernels", "scrimp.benchmarks": "benchmarks"},
    packages=[
        *find_packages("python"),
        "scrimp.kernels",
        "scrimp.benchmarks",
        "scrimp.benchmarks.peers",
    ],
    package_data={
        "scrimp": ["py.typed", "*.pyi", "methods/patterns/*"],
        "scrimp.kernels": ["configs/*/*.json"],
        "scrimp.benchmarks": ["results/*.csv"],
    },
    ext_modules=[] if NO_EXT else extensions,
    cmdclass={"build_ext": NinjaBuild},
    zip_safe=False,
)
