"""The command `vmkeep`: the service itself, and a client for every call that it has.

Read in this order: client_command (what all client commands share), exits (exit codes), backups.
"""

from __future__ import annotations

import sys

import click

from api import VERSION
from api.cli import batches, jobs, machines, places, points, remotes, restores
from api.cli.backups import backup
from api.cli.client_command import Here, client_command
from api.cli.exits import EPILOG, Failure
from api.cli.serve import serve

EXAMPLES = """Keeps backups of VMs.

\b
Start the service, put a VM on record, back it up, restore it as a new one:
  vmkeep serve --data /var/lib/vmkeep
  vmkeep vm create web01 --disk sda=default:web01.img
  vmkeep backup create web01 --wait
  vmkeep backup list
  vmkeep backup restore web01-20261123-183000 --as web01-restored --wait

Every command that talks to the service takes --server URL (or VMKEEP_SERVER) and --json. Where a
uuid is expected, a name or the first digits of the uuid do.
"""


@click.group(help=EXAMPLES, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION)
def cli() -> None:
    """See EXAMPLES."""


@cli.command("openapi")
@client_command
def openapi(here: Here) -> None:
    """Print the service's OpenAPI document."""
    click.echo(here.client.text("/openapi.json"))


for command in (serve, backup, machines.vm, points.point, jobs.job, jobs.operation, *places.ALL):
    cli.add_command(command)
for command in (
    restores.restore,
    remotes.remote_list,
    remotes.import_backups,
    batches.batch_create,
    batches.batch_delete,
):
    backup.add_command(command)


def main() -> None:
    """The entry point of the `vmkeep` command."""
    try:
        cli(prog_name="vmkeep")
    except Failure as failure:
        print(f"vmkeep: {failure}", file=sys.stderr)
        sys.exit(failure.exit_code)
