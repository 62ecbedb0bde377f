"""Reading a mailbox in tests."""

from __future__ import annotations

from cupy_engine.server.mailbox import Mailbox


def failure_in(mailbox: Mailbox) -> Exception:
    """The bad news that comes next."""
    news = mailbox.get(1)
    assert callable(news), news
    return news()
