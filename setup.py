"""Packaging of ds_align; tool settings are in pyproject.toml, tested versions in requirements.txt.

The extension ds_align._C is optional. DS_ALIGN_BUILD_EXT=auto|0|1: build it where torch and a C++ compiler
are there, never, or fail where it cannot be built. DS_ALIGN_CUDA=auto|0|1: the same for its CUDA part, which
takes nvcc and a CUDA build of torch, not a GPU. TORCH_CUDA_ARCH_LIST and MAX_JOBS are honoured, as in every
torch extension.
"""

from __future__ import annotations

import os
import re
import subprocess
import warnings
from pathlib import Path

from setuptools import find_packages, setup

REQUIREMENTS = [
    "torch>=2.11",
    "deepspeed>=0.19.8",
    "transformers>=5.0",
    "tokenizers>=0.22",
    "peft>=0.18",
    "accelerate>=1.10",
    "datasets>=4.0",
    "pyarrow>=17.0",
    "pydantic>=2.10",
    "safetensors>=0.6",
    "sentencepiece>=0.2",
    "numpy>=2.0",
    "matplotlib>=3.9",
    "tqdm>=4.66",
    "PyYAML>=6.0",
    "zstandard>=0.23",
    "rapidfuzz>=3.9",
]
EXTRAS = {
    "flash": ["flash-attn>=2.8"],
    "bnb": ["bitsandbytes>=0.48"],
    "trl": ["trl>=1.16"],
    "dev": ["pytest>=8.0", "pytest-timeout>=2.3", "hypothesis>=6.100", "ruff>=0.14", "import-linter>=2.3"],
}

ROOT = Path(__file__).resolve().parent
# The stable ABI of libtorch as of 2.10: one binary for it and all later ones.
MACROS = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
CXX_FLAGS = ["-O3", "-std=c++17", "-g0", "-Wno-psabi"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-DUSE_CUDA"]


class CannotBuildError(RuntimeError):
    """Why the extension, or its CUDA part, cannot be built here."""


def choice(name: str) -> str:
    """An environment variable that is auto, 0 or 1."""
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name}={value!r}; expected auto, 0 or 1")
    return value


def has_cuda() -> bool:
    """Whether the CUDA part is built. A build host needs no GPU."""
    wish = choice("DS_ALIGN_CUDA")
    if wish == "0":
        return False
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        if wish == "1":
            raise CannotBuildError("DS_ALIGN_CUDA=1 needs a CUDA build of torch; this one has none")
        return False
    nvcc = None if CUDA_HOME is None else Path(CUDA_HOME, "bin", "nvcc")
    wanted, found = torch.version.cuda, nvcc_version(nvcc)
    if found is None or found.split(".")[0] != wanted.split(".")[0]:
        problem = f"nvcc of CUDA {wanted} for this torch, found {found or 'none'}; set CUDA_HOME"
        if wish == "1":
            raise CannotBuildError(f"DS_ALIGN_CUDA=1 needs {problem}")
        warnings.warn(f"ds_align._C is built without its CUDA part, which needs {problem}", stacklevel=2)
        return False
    # compute_100 came with CUDA 12.8.
    newest = "9.0;10.0+PTX" if tuple(int(part) for part in found.split(".")) >= (12, 8) else "9.0+PTX"
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"8.0;{newest}")
    return True


def nvcc_version(nvcc: Path | None) -> str | None:
    """Such as "12.8"; None where there is no nvcc."""
    if nvcc is None or not nvcc.is_file():
        return None
    text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+\.\d+)", text)
    return release[1] if release else None


def extension() -> dict[str, object]:
    """The arguments of setup() that build ds_align._C. Raises CannotBuildError, and ImportError without
    torch.
    """
    from torch.utils import cpp_extension

    cuda = has_cuda()
    kind = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    sources = ["csrc/ops.cpp", "csrc/logprob_cpu.cpp", *(["csrc/cuda/logprob_cuda.cu"] if cuda else [])]
    files = (
        path.relative_to(ROOT)
        for path in (ROOT / "csrc").rglob("*")
        if path.is_file() and path.suffix != ".md"
    )
    module = kind(
        "ds_align._C",
        sources,
        depends=sorted(str(path) for path in files if str(path) not in sources),
        extra_compile_args={"cxx": [*CXX_FLAGS, *MACROS], "nvcc": [*NVCC_FLAGS, *MACROS]},
        py_limited_api=True,
    )
    base = cpp_extension.BuildExtension.with_options(use_ninja=cpp_extension.is_ninja_available())
    return {"ext_modules": [module], "cmdclass": {"build_ext": forgiving(base)}}


def forgiving(base: type) -> type:
    """The build command, which DS_ALIGN_BUILD_EXT=auto lets fail."""

    class BuildOrWarn(base):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if choice("DS_ALIGN_BUILD_EXT") == "1" or choice("DS_ALIGN_CUDA") == "1":
                    raise
                warn_without(error)
                self.remove_old()
                self.extensions = []

        def remove_old(self) -> None:
            """What an earlier build left would be used, and packed, as if it were of these sources."""
            inplace, self.inplace = self.inplace, False
            built = [self.get_ext_fullpath(module.name) for module in self.extensions]
            self.inplace = inplace
            for path in [*built, *ROOT.glob("ds_align/_C*.so")]:
                Path(path).unlink(missing_ok=True)

        def get_outputs(self) -> list[str]:
            return [path for path in super().get_outputs() if Path(path).exists()]

    return BuildOrWarn


def warn_without(error: Exception) -> None:
    """Says once that the plain PyTorch kernels will be used."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    warnings.warn(
        f"ds_align._C is not built ({reason}); everything works with the plain PyTorch kernels. A C++ "
        "compiler, torch and `pip install --no-build-isolation` build it; DS_ALIGN_BUILD_EXT=1 makes this an "
        "error",
        stacklevel=2,
    )


def optional_extension() -> dict[str, object]:
    """extension() as the environment wishes it; nothing where it cannot be built."""
    wish = choice("DS_ALIGN_BUILD_EXT")
    if wish == "0":
        if choice("DS_ALIGN_CUDA") == "1":
            raise SystemExit(
                "DS_ALIGN_CUDA=1 with DS_ALIGN_BUILD_EXT=0; the CUDA part is part of the extension"
            )
        for path in [*ROOT.glob("ds_align/_C*.so"), *ROOT.glob("build/lib*/ds_align/_C*.so")]:
            path.unlink()
        return {}
    try:
        return extension()
    except (ImportError, CannotBuildError) as error:
        if wish == "1" or choice("DS_ALIGN_CUDA") == "1":
            raise
        warn_without(error)
        return {}


EXTENSION = optional_extension()

setup(
    name="ds_align",
    version="0.1.0",
    description="Preference training of language models (DPO, IPO, KTO, CPO, SimPO) on DeepSpeed",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    packages=[*find_packages(include=["ds_align", "ds_align.*"]), "ds_align.ds_configs"],
    # The DeepSpeed files lie at the top for reading and editing; an installed package carries a copy.
    package_dir={"ds_align.ds_configs": "ds_configs"},
    package_data={"ds_align.ds_configs": ["*.json"]},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if EXTENSION else {},
    **EXTENSION,
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
