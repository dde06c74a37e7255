"""Options of the commands that talk to a running server: its URL, and the key that it may want."""

from __future__ import annotations

import click


class ServerUrl(click.ParamType):
    """http://HOST:PORT. Anything else is refused at once: no waiting would make a server answer there."""

    name = "url"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        import httpx

        try:
            url = httpx.URL(value)
        except httpx.InvalidURL as error:
            self.fail(f"{value!r} is no URL: {error}", param, ctx)
        if url.scheme not in ("http", "https") or not url.host or not 0 <= (url.port or 0) < 1 << 16:
            self.fail(f"{value!r} is no server's URL: write it as http://HOST:PORT", param, ctx)
        return value


def key_header(api_key: str | None) -> dict[str, bytes]:
    """As bytes: a key may have letters that a header's text may not."""
    return {"Authorization": b"Bearer " + api_key.encode(errors="surrogateescape")} if api_key else {}
