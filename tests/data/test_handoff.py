from __future__ import annotations

import numpy as np

from data.handoff import Receiver, Sender


def test_a_shared_buffer_travels_once_and_is_used_in_turn() -> None:
    sender, receiver = Sender((2, 4), num_slots=2, share_memory=True), Receiver()
    travelled = []
    for number in range(6):
        pixels, rows = sender.take(3)
        rows[:] = number
        travelled.append(pixels.buffer is not None)
        receiver.restore(pixels)
        assert pixels.array().shape == (3, 3, 2, 4)
        assert (pixels.array() == number).all()
    assert travelled == [True, True, False, False, False, False]


def test_the_part_before_stays_while_the_next_is_filled() -> None:
    sender, receiver = Sender((2, 2), num_slots=2, share_memory=True), Receiver()
    before, rows = sender.take(1)
    rows[:] = 1
    receiver.restore(before)
    _, rows = sender.take(1)
    rows[:] = 2
    assert (before.array() == 1).all()


def test_a_larger_part_gets_a_larger_buffer_and_a_smaller_one_its_first_rows() -> None:
    sender, receiver = Sender((2, 2), num_slots=1, share_memory=True), Receiver()
    for rows in (2, 5, 0, 4):
        pixels, array = sender.take(rows)
        array[:] = rows
        receiver.restore(pixels)
        np.testing.assert_array_equal(pixels.array(), np.full((rows, 3, 2, 2), rows))


def test_within_a_process_a_part_needs_no_receiver() -> None:
    sender = Sender((2, 2), num_slots=1, share_memory=False)
    for _ in range(3):
        pixels, rows = sender.take(2)
        rows[:] = 7
        assert (pixels.array() == 7).all()
