import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+?)"', (HERE / "fastgpt/__init__.py").read_text(), re.M)
assert VERSION is not None

# kernels/ is imported as fastgpt.kernels and has no __init__.py: `kernels` is Hugging Face's name,
# and a package of ours by that name would shadow theirs in this folder. The symlink serves
# checkouts, package_dir serves wheels.
setup(
    name="fastgpt",
    version=VERSION[1],
    description="nanoGPT's GPT with fused Triton kernels underneath",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="fastgpt contributors",
    license="MIT",
    license_files=["LICENSE"],
    # the addresses of this repository belong here once it is published
    project_urls={"nanoGPT (what this drops into)": "https://github.com/karpathy/nanoGPT"},
    keywords=["GPT", "nanoGPT", "Triton", "PyTorch", "CUDA", "training"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: MIT License",
        "Operating System :: POSIX :: Linux",
        "Operating System :: MacOS",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=[
        "fastgpt",
        "fastgpt.commands",
        "fastgpt.decoding",
        "fastgpt.fused",
        "fastgpt.implementations",
        "fastgpt.kernels",
        "fastgpt.storage",
        "fastgpt.training",
    ],
    package_dir={"fastgpt.kernels": "kernels"},
    package_data={
        "fastgpt": ["py.typed"],
        "fastgpt.decoding": ["step.c"],
        "fastgpt.implementations": ["native.c", "vectors.h"],
        "fastgpt.kernels": ["tuned.json"],
    },
    install_requires=["torch>=2.6", "triton>=3.2; platform_system == 'Linux'", "tqdm"],
    extras_require={
        "flash": ["flash-attn>=2.6"],
        "data": ["tiktoken", "numpy"],
        "hf": ["transformers", "safetensors"],
        "plot": ["matplotlib"],
        "dev": [
            *("pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "ruff", "mypy"),
            *("numpy", "scipy", "matplotlib"),
        ],
    },
    entry_points={"console_scripts": ["fastgpt=fastgpt.cli:main"]},
)
