"""Progress: lines with rate and time left where there is no terminal, a bar where there is one."""

from __future__ import annotations

import io
import sys

import pytest
import tqdm

from koala_bench.common.progress import log_line, progress


class Clock:
    """A clock that stands still until it is told otherwise."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(tqdm.std, "time", clock)
    return clock


def test_results_and_progress_do_not_mix(capsys: pytest.CaptureFixture[str]) -> None:
    log_line("working")
    with progress("work", 1, "turns") as advance:
        advance()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("working\nwork: 1/1 turns")


def test_a_line_now_and_then_says_how_far_how_fast_and_how_long(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("train", 1000, "steps") as advance:
        for _ in range(100):
            clock.now += 1
            advance(2, "loss 1.0")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 7  # every fifteen seconds, and at the end
    assert lines[0] == "train: 30/1,000 steps,  2.00 steps/s, 00:15 elapsed, 08:05 left, loss 1.0"


def test_the_end_is_always_told(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("decode", 3, "turns") as advance:
        for _ in range(3):
            clock.now += 0.5
            advance()
    assert capsys.readouterr().err == "decode: 3/3 turns,  2.00 turns/s, 00:01 elapsed, 00:00 left\n"


def test_what_was_done_before_does_not_count_towards_the_rate(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("train", 7300, "steps", done=100) as advance:
        clock.now += 20
        advance(20)
    assert capsys.readouterr().err == "train: 120/7,300 steps,  1.00 steps/s, 00:20 elapsed, 1:59:40 left\n"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with progress("decode", 4, "turns", done=1) as advance:
        for _ in range(3):
            advance(1, "eagle")
    shown = terminal.getvalue()
    assert "decode" in shown and "4/4" in shown and "turns/s" in shown and "eagle" in shown
