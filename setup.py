"""Which folders become packages; everything else is in pyproject.toml.

The recipes stand at the top level of a checkout, where a reader finds them, and inside of the package in a wheel; that
takes a list which pyproject.toml cannot compute.
"""

from setuptools import find_namespace_packages, setup

setup(
    packages=[
        *find_namespace_packages(include=["koala_bench*", "heads*"]),
        *(f"koala_bench.{name}" for name in find_namespace_packages(include=["reproduce*"])),
    ]
)
