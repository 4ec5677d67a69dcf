"""The training stream: every dialogue once an epoch, in an order that the seed decides."""

from __future__ import annotations

import numpy as np
import pytest

from koala_bench.dialogues.encoding import EncodedDialogue
from koala_bench.dialogues.streams import make_stream
from koala_bench.errors import KoalaBenchError


def dialogues(count: int) -> list[EncodedDialogue]:
    lengths = [10 + 7 * i % 50 for i in range(count)]
    return [EncodedDialogue(list(range(length)), [i >= 4 for i in range(length)]) for length in lengths]


def names(count: int) -> list[str]:
    return [f"d{i}" for i in range(count)]


def test_an_epoch_serves_every_dialogue_once_and_the_next_in_another_order() -> None:
    stream = make_stream(dialogues(57), names(57), 200, 64, seed=0)
    seen: list[int] = []
    step = 0
    while len(seen) < 2 * 57:
        seen += stream.samples(step)
        step += 1
    assert sorted(seen[:57]) == sorted(seen[57:]) == list(range(57))
    assert seen[:57] != seen[57:]


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    first, second = (make_stream(dialogues(57), names(57), 200, 64, seed=3) for _ in range(2))
    forward = [first.samples(step) for step in range(20)]
    assert [second.samples(step) for step in reversed(range(20))] == forward[::-1]
    assert (
        first.order_sha256(20)
        == second.order_sha256(20)
        != make_stream(dialogues(57), names(57), 200, 64, seed=4).order_sha256(20)
    )


def test_an_epoch_is_drawn_once_however_many_come_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = make_stream(dialogues(57), names(57), 200, 64, seed=0)
    drawn: list[int] = []
    draw = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: drawn.append(seed[1]) or draw(seed))
    for step in range(100):
        stream.samples(step)
    assert drawn == list(range(len(drawn)))
    assert len(drawn) > 5
    drawn.clear()
    stream.samples(3)  # as a training does after the order's hash was taken
    assert drawn == [0]


def test_batches_are_padded_on_the_right_and_stay_within_their_budget() -> None:
    stream = make_stream(dialogues(57), names(57), 200, 40, seed=0)
    for step in range(10):
        batch = stream.batch(step)
        assert batch.ids.numel() <= 200
        assert batch.ids.shape[1] <= 40
        for row, sample in enumerate(batch.samples):
            length = min(len(stream.dialogues[sample].ids), 40)
            assert batch.ids[row, :length].tolist() == list(range(length))
            assert not batch.supervised[row, length:].any()
        assert batch.lengths.tolist() == [min(len(stream.dialogues[i].ids), 40) for i in batch.samples]


def test_a_dialogue_without_an_answer_is_named() -> None:
    broken = [*dialogues(3), EncodedDialogue(list(range(20)), [False] * 20)]
    with pytest.raises(KoalaBenchError, match="Dialogue d3 has no answer token"):
        make_stream(broken, names(4), 200, 64, seed=0)


def test_nothing_to_train_on_and_too_small_a_batch_are_refused() -> None:
    with pytest.raises(KoalaBenchError, match="no dialogue"):
        make_stream([], [], 200, 64, seed=0)
    with pytest.raises(KoalaBenchError, match="holds only 32"):
        make_stream(dialogues(3), names(3), 32, 64, seed=0)
