"""``streamlstm health``: one line and an exit code, for a container's HEALTHCHECK."""

import http.client
import os
from pathlib import Path
from urllib.parse import urlsplit

import click

from streamlstm.cli.options import examples

DEFAULT_URL = "http://127.0.0.1:9108"
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104, because it is what is asked, not where we listen


@click.command(
    epilog=examples(
        "streamlstm health",
        "streamlstm health --ready -c forecasts.yaml",
        "streamlstm health --url http://forecasts:9108 --timeout 2",
    )
)
@click.option("--url", help=f"Where the service listens.  [default: {DEFAULT_URL}]")
@click.option("-c", "--config", "config_file", type=click.Path(path_type=Path), help="Take http.listen from this file.")
@click.option("--ready", is_flag=True, help="Ask whether it is processing, not only whether its loop turns.")
@click.option("--timeout", "timeout_s", default=5.0, show_default=True, help="Seconds.")
@click.pass_context
def health(ctx: click.Context, url: str | None, config_file: Path | None, *, ready: bool, timeout_s: float) -> None:
    """Ask a running service whether it is well: exit 0 or 1, and one line."""
    if url and config_file:
        raise click.UsageError("--url and --config both say where the service listens; give one of them")
    base = url or (_url_of(config_file) if config_file else DEFAULT_URL)
    well, line = ask(base, "/readyz" if ready else "/healthz", timeout_s)
    click.echo(line)
    ctx.exit(0 if well else 1)


def ask(base: str, path: str, timeout_s: float) -> tuple[bool, str]:
    """Whether the service says it is well, and what to tell."""
    try:
        where = urlsplit(base if "//" in base else f"http://{base}")
        if where.scheme != "http" or not where.hostname:
            return False, f"{base}: write an address like {DEFAULT_URL}"
        connection = http.client.HTTPConnection(where.hostname, where.port or 80, timeout=timeout_s)
        try:
            connection.request("GET", where.path.rstrip("/") + path)
            response = connection.getresponse()
            said = response.read(200).decode("utf-8", "replace").strip()
        finally:
            connection.close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__
        return False, f"{base}{path}: {reason}"
    line = "".join(c if c.isprintable() else " " for c in said)
    return response.status == http.HTTPStatus.OK, f"{base}{path}: {line}"


def _url_of(config_file: Path) -> str:
    """Where a service with this configuration listens, as this machine reaches it."""
    # Imported here, because a check without --config must not wait for pydantic.
    from streamlstm.config.load import load  # noqa: PLC0415, because of the line above

    listen = load(config_file, environ=os.environ).config.http.listen
    host, _, port = listen.rpartition(":")
    if port == "0":
        raise click.UsageError(f"http.listen is {listen}: port 0 is a free one that only its log tells; use --url")
    return f"http://{_ANYWHERE.get(host, host)}:{port}"
