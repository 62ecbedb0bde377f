"""The server fetches nothing that a request names."""

from __future__ import annotations

import ast
from pathlib import Path

SERVER = Path(__file__).parents[2] / "server"
FETCHERS = {"urllib.request", "http.client", "requests", "httpx", "aiohttp", "ftplib", "smtplib"}
ALLOWED = {"ray_app.py"}  # hands requests on to its own server on loopback


def test_no_http_client_in_the_server() -> None:
    found = set()
    for path in SERVER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            if FETCHERS & set(names):
                found.add(path.name)
    assert found <= ALLOWED
