"""The build's entry; what is built is described in pyproject.toml."""

from setuptools import setup

setup()
