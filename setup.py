"""What pyproject.toml cannot say: the folder configs/ is installed as seqfair_jax/configs."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["seqfair_jax*"]), "seqfair_jax.configs"],
    package_dir={"seqfair_jax.configs": "configs"},
)
