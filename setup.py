"""Only the one thing pyproject.toml cannot say: kernels/ stands at the top and is installed as smaug.kernels."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["smaug", "smaug.*"]), "smaug.kernels"],
    package_dir={"smaug.kernels": "kernels"},
)
