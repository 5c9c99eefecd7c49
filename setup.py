"""Packaging: what the trainer needs at run time, and the extras for GPUs, servers and logging."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="megatron_rlvr",
    version="0.1.0",
    description="Reinforcement learning with verifiable rewards on megatron-core, on forking tokens only",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_rlvr", "megatron_rlvr.*"]),
    install_requires=[
        "megatron-core>=0.16.1",
        "torch>=2.6",
        "transformers>=4.57",
        "sentencepiece>=0.2",
        "safetensors>=0.5",
        "math-verify>=0.9",
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
        "gpu": ["transformer-engine[pytorch]", "apex"],
        "sglang": ["sglang", "sglang-router"],
        "wandb": ["wandb"],
    },
)
