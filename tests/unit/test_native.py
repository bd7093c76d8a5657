"""What is said of the C kernels, built and not."""

from __future__ import annotations

import os
import shutil

import pytest

from hexmesh import native


def test_kernels_are_built_where_there_is_a_compiler() -> None:
    """Without this, a build that broke would only show as skipped tests. HEXMESH_ALLOW_SKIP=kernels allows that."""
    if shutil.which("gcc") is None or "kernels" in os.environ.get("HEXMESH_ALLOW_SKIP", "").split(","):
        pytest.skip("no compiler, or allowed")
    assert set(native.built()) == {*native.MODULES, native.PLANNING}, (
        "python setup.py build_ext --inplace says what is wrong"
    )


def test_built_kernels_are_named_with_their_instruction_set() -> None:
    if "attention" not in native.built():
        pytest.skip("kernels are not built")
    assert native.built()["attention"] in ("avx512", "avx2", "generic")
    assert f"attention {native.built()['attention']}" in native.describe()


def test_what_is_not_built_is_said_to_be_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "MODULES", ("nothing_of_that_name",))
    monkeypatch.setattr(native, "PLANNING", "nor_of_that")

    assert native.built() == {}
    assert native.describe() == "nothing_of_that_name by torch"
