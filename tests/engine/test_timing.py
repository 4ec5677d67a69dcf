"""Clocks: how a stopwatch puts together what the host and the device say, and what is kept from running meanwhile."""

from __future__ import annotations

import gc

import pytest
import torch

from koala_bench.engine.timing import Stopwatch, without_collection


class Moment:
    """An event of a device whose clock runs apart from the host's, in milliseconds."""

    def __init__(self, when: float) -> None:
        self.when = when

    def elapsed_time(self, later: Moment) -> float:
        return later.when - self.when


def test_parts_are_put_together_from_two_clocks() -> None:
    """Two steps: the device is given work at once, the host waits for it, then works alone."""
    watch = Stopwatch(torch.device("cpu"))
    watch._marks = [
        ("start", 100.0, Moment(5.0)),
        ("draft", 100.001, Moment(7.0)),  # the device drafts 2 ms; the host is done with asking long before
        ("verify", 100.002, Moment(17.0)),  # and verifies 10
        ("accept", 100.013, None),  # the host has waited: 13 ms, of which the device took 12
        ("commit", 100.0135, None),
        ("rest", 100.0145, Moment(19.5)),
        ("draft", 100.015, Moment(21.5)),
        ("verify", 100.016, Moment(31.5)),
        ("accept", 100.0265, None),  # sooner than the device, by what an event may come late: nothing is left for it
        ("commit", 100.0275, None),
        ("rest", 100.0285, Moment(33.5)),
    ]
    found = watch.seconds()
    assert {name: round(1000 * seconds, 6) for name, seconds in found.items()} == {
        "draft": 4.0,
        "verify": 20.0,
        "accept": 1.0,
        "commit": 1.5,
        "rest": 2.0,
    }


def test_on_the_cpu_parts_add_up_to_the_whole() -> None:
    watch = Stopwatch(torch.device("cpu"))
    for name in ("draft", "verify", "accept", "rest"):
        watch.mark(name, waited=name == "accept")
    first, last = watch._marks[0][1], watch._marks[-1][1]
    assert sum(watch.seconds().values()) == pytest.approx(last - first)


def test_the_garbage_collector_is_as_it_was_before() -> None:
    @without_collection()
    def enabled() -> bool:
        return gc.isenabled()

    try:
        for before in (True, False, True):
            (gc.enable if before else gc.disable)()
            assert not enabled()
            assert gc.isenabled() == before
        with pytest.raises(ZeroDivisionError), without_collection():
            raise ZeroDivisionError
        assert gc.isenabled()
    finally:
        gc.enable()
