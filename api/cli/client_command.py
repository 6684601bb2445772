"""What all commands that talk to a server share: --server, --json, and errors to exit codes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, TypeVar

import click
from msgspec.structs import replace

from api.cli import exits
from api.cli.screen import Screen
from api.client import CallFailed, Client, NotVmkeep, ServerUnreachable
from api.schemas import ScopeMembers

P = ParamSpec("P")
ScopedT = TypeVar("ScopedT", bound=ScopeMembers)

DEFAULT_LISTEN = "127.0.0.1:8080"
DEFAULT_SERVER = f"http://{DEFAULT_LISTEN}"


@dataclass(frozen=True, slots=True)
class Here:
    """What a command works with: the server, and where its answers go."""

    client: Client
    screen: Screen


def client_command(command: Callable[Concatenate[Here, P], None]) -> Callable[P, None]:
    """Gives a command --server and --json, and turns a server's errors into exit codes."""

    @click.option(
        "--server",
        metavar="URL",
        envvar="VMKEEP_SERVER",
        default=DEFAULT_SERVER,
        show_default=True,
        show_envvar=True,
        help="The service to talk to.",
    )
    @click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
    @functools.wraps(command)
    def called(server: str, as_json: bool, *args: P.args, **kwargs: P.kwargs) -> None:
        screen = Screen(json=as_json)
        with Client(server) as client:
            try:
                command(Here(client, screen), *args, **kwargs)
            except CallFailed as error:
                if as_json:
                    screen.document(error.raw)
                raise exits.Failure(exits.of_status(error.status), str(error)) from error
            except NotVmkeep as error:
                raise exits.Failure(exits.BROKEN, str(error)) from error
            except ServerUnreachable as error:
                raise exits.Failure(exits.UNREACHABLE, str(error)) from error

    return called  # type: ignore[return-value]  # click fills in the two options


def scoped(command: Callable[P, None]) -> Callable[P, None]:
    """Adds the options that say where a call applies; they arrive as one `scope`: see `within`."""

    @click.option("--cluster", default="", help="Cluster uuid; all managed ones when absent.")
    @click.option("--tenant", default="", help="Tenant uuid; all when absent.")
    @click.option("--namespace", default="", help="Namespace uuid.")
    @click.option("--multiple", is_flag=True, help="Tenant `default`: every managed namespace.")
    @functools.wraps(command)
    def called(
        cluster: str, tenant: str, namespace: str, multiple: bool, *args: P.args, **kwargs: P.kwargs
    ) -> None:
        scope = ScopeMembers(
            cluster_uuid=cluster, tenant=tenant, namespace_uuid=namespace, multiple=multiple
        )
        command(*args, **{**kwargs, "scope": scope})  # type: ignore[arg-type]

    return called  # type: ignore[return-value]  # click fills in the four options


def within(scope: ScopeMembers, request: ScopedT) -> ScopedT:
    """The request, in that scope."""
    return replace(
        request,
        cluster_uuid=scope.cluster_uuid,
        tenant=scope.tenant,
        namespace_uuid=scope.namespace_uuid,
        multiple=scope.multiple,
    )
