"""What a caller's scope covers: pairs of a managed cluster and a namespace.

The rules are those of the HTTP contract (api/schemas.py): an empty member does not restrict, and
`multiple` counts only for the tenant named `default`.
"""

from __future__ import annotations

from typing import TypeAlias

from engine.errors import NotFound
from engine.ids import normal
from engine.inventory.inventory import DEFAULT_NAME, Places, called, default_of, find
from engine.model import Cluster, Namespace, Tenant
from engine.verb_types import Scope

Range: TypeAlias = tuple[Cluster, Namespace]


def ranges(places: Places, scope: Scope) -> list[Range]:
    """All pairs in scope, clusters in their order. NotFound for an unknown member of the scope."""
    clusters = (
        (find("cluster", places.clusters, normal(scope.cluster_uuid)),)
        if scope.cluster_uuid
        else places.clusters
    )
    namespaces = _namespaces(places, scope)
    return [(cluster, namespace) for cluster in clusters for namespace in namespaces]


def covers(places: Places, scope: Scope, cluster_uuid: str, namespace_uuid: str) -> bool:
    """Whether something that stands there is in scope. NotFound as for `ranges`.

    An empty scope also covers what stands in a place that is not configured any more.
    """
    if not (scope.cluster_uuid or scope.tenant or scope.namespace_uuid):
        return True
    return any(
        (cluster.uuid, namespace.uuid) == (cluster_uuid, namespace_uuid)
        for cluster, namespace in ranges(places, scope)
    )


def landing(places: Places, scope: Scope) -> Range:
    """Where something new goes: the default of what is in scope. NotFound."""
    found = ranges(places, scope)
    if not found:
        raise NotFound("namespace", scope.namespace_uuid)
    cluster = default_of([cluster for cluster, _ in found])
    return cluster, default_of([namespace for _, namespace in found])


def _namespaces(places: Places, scope: Scope) -> list[Namespace]:
    inside = _tenant_namespaces(places, scope)
    if not scope.namespace_uuid:
        return inside
    return [find("namespace", inside, normal(scope.namespace_uuid))]


def _tenant_namespaces(places: Places, scope: Scope) -> list[Namespace]:
    if not scope.tenant:
        return list(places.namespaces)
    tenant = find_tenant(places, scope.tenant)
    if tenant.name != DEFAULT_NAME:
        return [row for row in places.namespaces if row.tenant == tenant.uuid]
    if scope.multiple or scope.namespace_uuid:
        return list(places.namespaces)
    return [default_of(places.namespaces)]


def find_tenant(places: Places, tenant: str) -> Tenant:
    """The tenant of that uuid, or of that name. NotFound."""
    row = called(places.tenants, tenant)
    if row is None:
        raise NotFound("tenant", tenant)
    return row
