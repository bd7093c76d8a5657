"""Builds the optional C kernels of hexmesh/native; everything else stands in pyproject.toml.

Where there is no compiler the install goes on without them, and stages run on torch alone.
"""

from pathlib import Path

from setuptools import Extension, setup

SOURCES = sorted(Path("hexmesh/native").glob("*.c"))

setup(
    ext_modules=[
        Extension(
            f"hexmesh.native.{source.stem}",
            [str(source)],
            depends=[str(header) for header in Path("hexmesh/native").glob("*.h")],
            extra_compile_args=[
                "-O3",
                "-std=c11",
                "-Wall",
                "-Wextra",
                "-ffp-contract=fast",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-pthread",
            ],
            extra_link_args=["-pthread"],
            optional=True,
        )
        for source in SOURCES
    ]
)
