"""A relay's book: limits, offers that lapse, and that nothing stays in it."""

from __future__ import annotations

import random

import pytest

from hexmesh.errors import Refused
from hexmesh.membership.circuits import OFFER_S, CircuitBook


def new_book(**limits: int) -> CircuitBook:
    return CircuitBook(random.Random(1), **limits)


def refusal(book: CircuitBook, src: str, dst: str, *, is_connected: bool = True) -> str:
    with pytest.raises(Refused) as refused:
        book.open(src, dst, is_connected=is_connected, now_s=0.0)
    return refused.value.code


def test_an_offer_is_taken_once_and_only_by_the_one_it_is_for() -> None:
    book = new_book()
    offer = book.open("a", "b", is_connected=True, now_s=1.0)
    for node in ("a", "c"):
        with pytest.raises(Refused):
            book.take(offer.circuit, node)
    assert book.take(offer.circuit, "b") == offer
    assert book.n_running == 1
    with pytest.raises(Refused):
        book.take(offer.circuit, "b")
    book.end(offer.circuit)
    assert len(book) == 0


def test_offers_lapse_and_running_circuits_do_not() -> None:
    book = new_book()
    taken = book.open("a", "b", is_connected=True, now_s=0.0)
    book.take(taken.circuit, "b")
    waiting = book.open("a", "b", is_connected=True, now_s=1.0)
    assert book.lapsed(1.0 + OFFER_S - 0.1) == []
    assert book.lapsed(1.0 + OFFER_S) == [waiting]
    assert (len(book), book.n_running) == (1, 1)


def test_what_is_refused() -> None:
    book = new_book(max_of_member=2, max_circuits=3)
    assert refusal(book, "a", "a") == "bad_circuit"
    assert refusal(book, "a", "b", is_connected=False) == "not_connected"
    running = book.open("a", "b", is_connected=True, now_s=0.0)
    book.take(running.circuit, "b")
    book.open("a", "c", is_connected=True, now_s=0.0)
    assert refusal(book, "a", "d") == "too_many_circuits"
    book.open("b", "a", is_connected=True, now_s=0.0)  # another's share is its own
    assert refusal(book, "c", "a") == "relay_full"
    book.end(running.circuit)
    book.open("a", "d", is_connected=True, now_s=0.0)


def test_a_removed_member_leaves_nothing() -> None:
    book = new_book()
    offers = [book.open(*pair, is_connected=True, now_s=0.0) for pair in (("a", "b"), ("b", "a"), ("b", "c"))]
    book.take(offers[0].circuit, "b")
    assert {offer.circuit for offer in book.of("a")} == {offer.circuit for offer in offers[:2]}
    assert len(book) == 1
