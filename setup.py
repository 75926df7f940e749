from setuptools import setup

# kernels/ is imported as fastgpt.kernels and has no __init__.py: `kernels` is Hugging Face's name,
# and a package of ours by that name would shadow theirs in this folder. The symlink serves
# checkouts, package_dir serves wheels.
setup(
    name="fastgpt",
    version="0.1.0",
    description="nanoGPT's GPT with fused Triton kernels underneath",
    python_requires=">=3.10",
    packages=[
        "fastgpt",
        "fastgpt.commands",
        "fastgpt.decoding",
        "fastgpt.fused",
        "fastgpt.implementations",
        "fastgpt.kernels",
    ],
    package_dir={"fastgpt.kernels": "kernels"},
    package_data={"fastgpt.kernels": ["tuned.json"], "fastgpt.decoding": ["native.c"]},
    install_requires=["torch>=2.6", "triton>=3.2; platform_system == 'Linux'"],
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
