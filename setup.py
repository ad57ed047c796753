"""What a wheel holds: the packages, and the examples of `configs/` as a part of qlora_jax. All else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["qlora_jax*", "convert*"]), "qlora_jax.configs"],
    package_dir={"qlora_jax.configs": "configs"},
    package_data={"qlora_jax": ["py.typed"], "convert": ["py.typed"], "qlora_jax.configs": ["*.yaml", "data/*"]},
)
