"""What gunicorn's workers do when they start."""

from __future__ import annotations

import gc
from types import SimpleNamespace

from cupy_engine.server import gunicorn_conf


def test_the_garbage_collector_passes_over_what_a_worker_is_made_of() -> None:
    worker = SimpleNamespace(app=SimpleNamespace(wsgi=object))
    kept = [[] for _ in range(1000)]  # type: ignore[var-annotated]
    before = gc.get_freeze_count()
    try:
        gunicorn_conf.post_worker_init(worker)
        assert gc.get_freeze_count() > before + len(kept)
    finally:
        gc.unfreeze()
