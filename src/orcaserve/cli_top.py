"""The command `orcaserve top`: what a running server's iterations do, in the terminal."""

from __future__ import annotations

import click

from orcaserve.cli_client import ServerUrl, key_header


@click.command()
@click.option("--url", type=ServerUrl(), default="http://127.0.0.1:8000", show_default=True, help="A running server.")
@click.option("--api-key", help="If the server wants one.")
@click.option("--once", is_flag=True, help="Print what is there and leave.")
def top(url: str, api_key: str | None, once: bool) -> None:
    """Watch a running server's batch: who takes part in its iterations, who waits, and why. Ctrl-C ends."""
    from rich.console import Console

    from orcaserve.serve.top import NotWatchable, glance, watch

    headers = key_header(api_key)
    try:
        if once:
            Console().print(glance(url, headers))
        else:
            watch(url, headers)
    except NotWatchable as error:
        raise click.ClickException(str(error)) from None
