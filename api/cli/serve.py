"""`vmkeep serve`: the service itself. What it is made of: api.server."""

from __future__ import annotations

from pathlib import Path

import click

from api.cli import params
from api.cli.client_command import DEFAULT_LISTEN
from api.cli.exits import FAILED, USAGE, Failure
from api.printable import one_line
from engine.errors import ConfigInvalid, EngineError
from storage.errors import StorageError


@click.command()
@click.option(
    "--data",
    required=True,
    type=params.OwnDirectory(),
    help="Directory of the service's own: made when it is not there.",
)
@click.option("--listen", default=DEFAULT_LISTEN, show_default=True, metavar="HOST:PORT")
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="TOML; see deploy/vmkeep.toml.",
)
@click.option(
    "--log-format",
    type=click.Choice(["json", "text"]),
    help="Default: the configuration's; text without one.",
)
def serve(data: Path, listen: str, config: Path | None, log_format: str | None) -> None:
    """Run the service until SIGTERM or Ctrl-C.

    Without --config it makes all that is needed in the data directory: a pool, a backup point, and
    what else requests refer to, each named `default`. There is no authentication: listen on
    loopback, or put a proxy before it.

    \b
      vmkeep serve --data /var/lib/vmkeep
    """
    from api import server  # all of the service, which no other command needs

    json_logs = log_format == "json" if log_format or config is None else None
    try:
        server.parse_listen(listen)
    except server.CannotListen as error:
        raise Failure(USAGE, str(error)) from error
    try:
        server.run(str(data), listen, str(config or ""), json_logs=json_logs, tell=_tell)
    except ConfigInvalid as error:
        raise Failure(USAGE, str(error)) from error
    except (server.CannotListen, EngineError, StorageError) as error:
        raise Failure(FAILED, str(error)) from error


def _tell(line: str) -> None:
    """In one piece, unlike print: nothing that is logged meanwhile gets between it and its end."""
    click.echo(one_line(line))
