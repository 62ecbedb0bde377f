"""The page for people at ``/``: a playground and a live view, plain files without a build step or outside requests."""

from __future__ import annotations

from pathlib import Path

from flask import Blueprint, Response

FOLDER = Path(__file__).parent / "web"
OPEN_ENDPOINTS = frozenset({"pages.index", "pages.static"})  # the page itself asks for the key
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def pages_blueprint() -> Blueprint:
    """``/`` and its files under ``/assets``."""
    pages = Blueprint("pages", __name__, static_folder=FOLDER, static_url_path="/assets")
    pages.get("/")(index)
    pages.after_request(_secure)
    return pages


def index() -> Response:
    return Response((FOLDER / "index.html").read_bytes(), mimetype="text/html")


def _secure(response: Response) -> Response:
    response.headers.update(_HEADERS)
    return response
