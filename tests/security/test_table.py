"""The table in README.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_every_test_in_the_table_exists() -> None:
    folder = file = None
    for name, function in re.findall(r"`([\w/]+\.py)?(?:::(\w+))?`", (HERE / "README.md").read_text()):
        if name:
            file = HERE.parent / name if "/" in name else folder / name
            folder = file.parent
            assert file.exists(), name
        if function:
            assert f"def {function}(" in file.read_text(), f"{name}::{function}"
