"""Packaging of ds_align; tool settings are in pyproject.toml, tested versions in requirements.txt."""

from __future__ import annotations

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
    "pydantic>=2.10",
    "safetensors>=0.6",
    "sentencepiece>=0.2",
    "numpy>=2.0",
    "matplotlib>=3.9",
    "tqdm>=4.66",
    "PyYAML>=6.0",
    "zstandard>=0.23",
]
EXTRAS = {
    "flash": ["flash-attn>=2.8"],
    "bnb": ["bitsandbytes>=0.48"],
    "trl": ["trl>=1.16"],
    "dev": ["pytest>=8.0", "pytest-timeout>=2.3", "ruff>=0.14", "import-linter>=2.3"],
}

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
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
