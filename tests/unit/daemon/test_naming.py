"""What a person types names one node or is refused."""

from __future__ import annotations

import pytest

from daemon.naming import find_node
from hexmesh.errors import InvalidInput

TOKYO, OSAKA, OTHER_OSAKA = "a" * 40, "b" * 40, "bbbbbb" + "c" * 34
NAMES = {TOKYO: "tokyo", OSAKA: "osaka", OTHER_OSAKA: "osaka", "d" * 40: "aaaaaab"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("tokyo", TOKYO),
        (TOKYO, TOKYO),
        ("aaaaaa", TOKYO),
        (OTHER_OSAKA[:7], OTHER_OSAKA),
        ("dddddd", "d" * 40),
    ],
)
def test_nodes_are_found_by_name_id_or_the_start_of_one(text: str, found: str) -> None:
    assert find_node(NAMES, text) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kyoto", "no node 'kyoto' is known here"),
        ("aaaaa", "no node 'aaaaa' is known here"),
        ("", "no node '' is known here"),
        ("osaka", "'osaka' may mean bbbbbbbb, bbbbbbcc"),
        ("bbbbbb", "'bbbbbb' may mean bbbbbbbb, bbbbbbcc"),
        ("f" * 40, "no node"),
    ],
)
def test_no_node_or_several_are_an_error(text: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        find_node(NAMES, text)


def test_a_name_that_looks_like_another_nodes_id_decides_nothing() -> None:
    with pytest.raises(InvalidInput, match="may mean aaaaaaaa, dddddddd"):
        find_node({TOKYO: "tokyo", "d" * 40: TOKYO}, TOKYO)
