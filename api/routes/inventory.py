"""/v1/cluster/list to /v1/pool/list: what VMs and backups are placed in."""

from __future__ import annotations

from collections.abc import Iterable

from api.calls import AnyCall, Call, Reply
from api.schemas import NoArguments, RowList, RowT
from api.schemas_companion import ClusterRow, NamedRow, NamespaceRow, PoolRow
from engine.model import ObjectGroup, Tenant, Zone
from engine.service import Engine
from engine.verb_types import PoolState


def _listed(rows: Iterable[RowT]) -> Reply[RowList[RowT]]:
    found = list(rows)
    return Reply(RowList(rows=found, total_count=len(found)))


def _clusters(engine: Engine, _query: NoArguments) -> Reply[RowList[ClusterRow]]:
    return _listed(ClusterRow(uuid=c.uuid, name=c.name, mode=c.mode) for c in engine.clusters())


def _tenants(engine: Engine, _query: NoArguments) -> Reply[RowList[NamedRow]]:
    return _listed(_named(tenant) for tenant in engine.tenants())


def _namespaces(engine: Engine, _query: NoArguments) -> Reply[RowList[NamespaceRow]]:
    return _listed(
        NamespaceRow(uuid=n.uuid, name=n.name, tenant=n.tenant) for n in engine.namespaces()
    )


def _zones(engine: Engine, _query: NoArguments) -> Reply[RowList[NamedRow]]:
    return _listed(_named(zone) for zone in engine.zones())


def _object_groups(engine: Engine, _query: NoArguments) -> Reply[RowList[NamedRow]]:
    return _listed(_named(group) for group in engine.object_groups())


def _pools(engine: Engine, _query: NoArguments) -> Reply[RowList[PoolRow]]:
    return _listed(_pool_row(state) for state in engine.pools())


def _named(row: Tenant | Zone | ObjectGroup) -> NamedRow:
    return NamedRow(uuid=row.uuid, name=row.name)


def _pool_row(state: PoolState) -> PoolRow:
    pool = state.pool
    return PoolRow(
        pool_uuid=pool.uuid,
        name=pool.name,
        path=pool.path,
        usd_types=list(pool.usd_types),
        replica=pool.replica,
        capacity=state.capacity,
        free=state.free,
        error=state.error,
        pinned=state.pinned_bytes,
    )


CALLS: tuple[AnyCall, ...] = (
    Call(
        method="GET",
        path="/v1/cluster/list",
        summary="Managed clusters.",
        tag="inventory",
        request=NoArguments,
        answer=RowList[ClusterRow],
        run=_clusters,
    ),
    Call(
        method="GET",
        path="/v1/tenant/list",
        summary="Tenants.",
        tag="inventory",
        request=NoArguments,
        answer=RowList[NamedRow],
        run=_tenants,
    ),
    Call(
        method="GET",
        path="/v1/namespace/list",
        summary="Managed namespaces.",
        tag="inventory",
        request=NoArguments,
        answer=RowList[NamespaceRow],
        run=_namespaces,
    ),
    Call(
        method="GET",
        path="/v1/zone/list",
        summary="Zones that VMs can be placed in.",
        tag="inventory",
        request=NoArguments,
        answer=RowList[NamedRow],
        run=_zones,
    ),
    Call(
        method="GET",
        path="/v1/object_group/list",
        summary="Groups that VMs can be put in.",
        tag="inventory",
        request=NoArguments,
        answer=RowList[NamedRow],
        run=_object_groups,
    ),
    Call(
        method="GET",
        path="/v1/pool/list",
        summary="Pools that volumes live in, and the room that they have.",
        tag="inventory",
        request=NoArguments,
        answer=RowList[PoolRow],
        run=_pools,
        pace="slow",
    ),
)
