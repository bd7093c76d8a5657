"""What is said of the C kernels, built and not."""

from __future__ import annotations

import pytest

from hexmesh import native
from hexmesh.runtime import native_attention


def test_built_kernels_are_named_with_their_instruction_set() -> None:
    if native_attention.KERNELS is None:
        pytest.skip("kernels are not built")
    assert native.built()["attention"] in ("avx512", "avx2", "generic")
    assert f"attention {native.built()['attention']}" in native.describe()


def test_what_is_not_built_is_said_to_be_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "MODULES", ("nothing_of_that_name",))

    assert native.built() == {}
    assert native.describe() == "nothing_of_that_name by torch"
