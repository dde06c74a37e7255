"""`PAGE_FILES`: the live page's own files, by the paths at which they are served; they are all that it needs."""

from __future__ import annotations

from importlib.resources import files

_FOLDER = files("orcaserve.serve") / "static"
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}


def _read(name: str) -> tuple[bytes, str]:
    return (_FOLDER / name).read_bytes(), f"{_TYPES[name.rpartition('.')[2]]}; charset=utf-8"


# Path → content and media type. What they say is the same for everybody, so that they need no API key.
PAGE_FILES: dict[str, tuple[bytes, str]] = {
    "/": _read("page.html"),
    "/page.css": _read("page.css"),
    **{f"/{name}": _read(name) for name in ("page.js", "state.js", "draw.js", "feed.js", "play.js")},
}
