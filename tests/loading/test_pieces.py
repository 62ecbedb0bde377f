"""How arrays are cut for the way to the GPU: everything once, in bounds, whatever the layout."""

from __future__ import annotations

import numpy as np
import pytest

from cupy_engine.pinned_uploads import pieces

BASE = np.arange(60_000, dtype=np.float32).reshape(200, 300)
SOURCES = {
    "vector": BASE.reshape(-1),
    "matrix": BASE,
    "transposed": BASE.T,
    "rows apart": BASE[::3],
    "wide rows apart": np.broadcast_to(BASE.reshape(1, -1), (4, BASE.size)),
    "overlapping windows": np.lib.stride_tricks.as_strided(BASE, (150, 200), (8, 4)),
    "three axes": BASE.reshape(10, 20, 300).swapaxes(1, 2),
    "one item": BASE[:1, 0],
    "no rows": BASE[:0],
}


@pytest.mark.parametrize("max_bytes", [4096, 100_000, 1 << 20])
@pytest.mark.parametrize("name", SOURCES)
def test_pieces_are_the_whole(name: str, max_bytes: int) -> None:
    source = SOURCES[name]
    target = np.full(source.shape, np.nan, np.float64)
    for piece, goal in pieces(source, target, max_bytes):
        assert piece.shape == goal.shape
        assert 0 < piece.nbytes <= max_bytes
        assert np.isnan(goal).all()
        goal[...] = piece
    np.testing.assert_array_equal(target, source)
