"""Packaging: the trainer's run-time dependencies, and extras for GPUs, servers and logging."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version() -> str:
    """Read ``__version__`` from the source of the package, which a build cannot always import."""
    source = (HERE / "megatron_rlvr" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    if found is None:
        raise RuntimeError("megatron_rlvr/__init__.py has no __version__; restore the line")
    return found[1]


setup(
    name="megatron_rlvr",
    version=version(),
    description="Reinforcement learning with verifiable rewards on megatron-core, on forking tokens only",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["megatron_rlvr", "megatron_rlvr.*"]),
    package_data={"megatron_rlvr": ["py.typed"], "megatron_rlvr.analysis": ["page/*"]},
    entry_points={"console_scripts": ["rlvr = megatron_rlvr.cli:main"]},
    install_requires=[
        # 0.16.1 is the last release for Python 3.11.
        "megatron-core>=0.16.1,<0.17; python_version < '3.12'",
        # Each release may move what this package overrides, and GPTModel is deprecated since 0.19.
        "megatron-core>=0.19.2,<0.20; python_version >= '3.12'",
        "torch>=2.8",  # matrix products of bfloat16 with a result in float32
        "transformers>=4.57",
        "sentencepiece>=0.2",
        "safetensors>=0.5",
        "mpmath>=1.3",
        "pyarrow>=18",
        "pydantic>=2.10",
        "PyYAML>=6",
        "rich>=13",
        "tensorboard>=2.18",
        "aiohttp>=3.10",
        "numpy>=1.26",
        "psutil>=5.9",  # megatron-core imports it without declaring it
    ],
    extras_require={
        # Transformer Engine's part for torch is compiled when it is installed, against the torch that is there already:
        # pip install --no-build-isolation. NVIDIA's apex is built from source, as in NVIDIA's PyTorch images: the
        # package of that name on PyPI is another program. Without it megatron.gradient_accumulation_fusion is
        # unavailable. NCCL connects only processes of the same version: this is the servers' in tools/sglang_gpu, and
        # makes pip choose the torch that needs it.
        "gpu": ["transformer-engine[pytorch,core-cu13]>=2.8", "nvidia-nccl-cu13==2.30.7"],
        "sglang": ["sglang", "sglang-router"],
        "wandb": ["wandb"],
        "plot": ["matplotlib"],
        "gym": ["reasoning-gym"],
        "gguf": ["gguf>=0.17"],
    },
)
