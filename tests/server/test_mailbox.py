"""Mail waits, is held back, or goes to a receiver; none is lost on the way."""

from __future__ import annotations

import queue

import pytest
from cupy_engine.server.mailbox import Mail, Mailbox

from cupy_engine.messages import SequenceOutput


def output(token_id: int, finish_reason: str | None = None) -> SequenceOutput:
    return SequenceOutput(request_id="r", token_ids=[token_id], finish_reason=finish_reason)


def test_mail_waits_in_order() -> None:
    box, mails = Mailbox(), [[output(1)], [output(2)], ValueError]
    for mail in mails:
        box.put(mail)
    assert [box.get(1.0), box.get_nowait(), box.get_nowait()] == mails
    with pytest.raises(queue.Empty):
        box.get(0.01)


def test_what_is_held_back_comes_in_one_piece_when_a_sequence_ends() -> None:
    box = Mailbox()
    box.hold_back()
    box.put([output(1)])
    with pytest.raises(queue.Empty):
        box.get_nowait()
    box.put([output(2, "stop")])
    assert box.get_nowait() == [output(1), output(2, "stop")]
    box.put([output(3)])
    with pytest.raises(queue.Empty):
        box.get_nowait()


def test_a_first_token_is_not_held_back() -> None:
    box, first = Mailbox(), output(1)
    first.scheduled_time_s = 2.0
    box.hold_back()
    box.put([first])
    box.put([output(2)])
    assert box.get_nowait() == [first]
    with pytest.raises(queue.Empty):
        box.get_nowait()


def test_an_error_is_never_held_back() -> None:
    box = Mailbox()
    box.hold_back()
    box.put([output(1)])
    box.put(ValueError)
    assert box.get_nowait() == [output(1)], "what had come before it, first"
    assert box.get_nowait() is ValueError


def test_a_receiver_gets_what_has_come_and_what_comes() -> None:
    box, received = Mailbox(), list[Mail]()
    box.put([output(1)])
    box.redirect(received.append)
    box.put([output(2)])
    assert received == [[output(1)], [output(2)]]
    box.close()
    box.put([output(3)])
    box.redirect(received.append)
    box.put([output(4)])
    assert len(received) == 2, "a box that has been closed stays so"
