"""`vmkeep cluster|tenant|namespace|zone|group|pool list`: what requests refer to."""

from __future__ import annotations

import click

from api.cli import units
from api.cli.client_command import Here, client_command
from api.cli.screen import table
from api.schemas import RowList
from api.schemas_companion import ClusterRow, NamedRow, NamespaceRow, PoolRow


@click.group()
def cluster() -> None:
    """Managed clusters."""


@cluster.command("list")
@client_command
def list_clusters(here: Here) -> None:
    """The clusters that this service manages."""
    here.screen.answer(
        here.client.get("cluster/list", RowList[ClusterRow]),
        lambda answer: table(
            ("name", "mode", "uuid"), ((row.name, row.mode, row.uuid) for row in answer.rows)
        ),
    )


@click.group()
def namespace() -> None:
    """Namespaces."""


@namespace.command("list")
@client_command
def list_namespaces(here: Here) -> None:
    """The namespaces, and the tenant of each."""
    here.screen.answer(
        here.client.get("namespace/list", RowList[NamespaceRow]),
        lambda answer: table(
            ("name", "uuid", "tenant uuid"),
            ((row.name, row.uuid, row.tenant) for row in answer.rows),
        ),
    )


@click.group()
def pool() -> None:
    """Pools: the directories that volumes live in."""


@pool.command("list")
@client_command
def list_pools(here: Here) -> None:
    """The pools, their directories and their room."""
    here.screen.answer(
        here.client.get("pool/list", RowList[PoolRow]),
        lambda answer: table(
            ("name", "types", ">size", ">free", ">pinned", "uuid", "path"),
            (
                (
                    row.name,
                    " ".join(row.usd_types),
                    units.size(row.capacity),
                    units.size(row.free),
                    units.size(row.pinned),
                    row.pool_uuid,
                    row.error or row.path,
                )
                for row in answer.rows
            ),
        ),
    )


def _named(command: str, route: str, many: str) -> click.Group:
    """A group with a `list` for rows that are a name and a uuid."""

    @client_command
    def listed(here: Here) -> None:
        here.screen.answer(
            here.client.get(route, RowList[NamedRow]),
            lambda answer: table(("name", "uuid"), ((row.name, row.uuid) for row in answer.rows)),
        )

    group = click.Group(command, help=f"{many.capitalize()}.")
    group.add_command(click.command("list", help=f"The {many}, by name and uuid.")(listed))
    return group


tenant = _named("tenant", "tenant/list", "tenants")
zone = _named("zone", "zone/list", "zones")
group = _named("group", "object_group/list", "object groups")

ALL = (cluster, tenant, namespace, zone, group, pool)
