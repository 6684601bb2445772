"""The tables of the state environment: everything the host knows that is not on a backup point.

Losing it loses no backup: the points hold those. Each `Rows` is one table; a change of several
tables at once goes through `State.store.write()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from engine.model import (
    Backup,
    BackupPoint,
    Baseline,
    Cluster,
    Directory,
    Distrust,
    Job,
    Namespace,
    ObjectGroup,
    Operation,
    PackRead,
    Pool,
    Row,
    Tenant,
    Vm,
    Zone,
)
from storage.lmdb_env.kv import ReadTxn, Store, Table, WriteTxn

RowT = TypeVar("RowT", bound=Row)


class Rows(Generic[RowT]):
    """A table of the state; each call is a transaction of its own, durable on return."""

    def __init__(self, store: Store, table: Table[RowT], key: Callable[[RowT], str]) -> None:
        self._store = store
        self._table = table
        self._key = key

    def get(self, key: str) -> RowT | None:
        with self._store.read() as txn:
            return self.get_in(txn, key)

    def values(self) -> list[RowT]:
        """All rows, in the order of their keys."""
        with self._store.read() as txn:
            return self.values_in(txn)

    def put(self, row: RowT) -> None:
        with self._store.write() as txn:
            self.put_in(txn, row)

    def put_all(self, rows: Iterable[RowT]) -> None:
        with self._store.write() as txn:
            for row in rows:
                self.put_in(txn, row)

    def delete(self, *keys: str) -> None:
        with self._store.write() as txn:
            for key in keys:
                self.delete_in(txn, key)

    # The same inside a transaction that covers more.

    def get_in(self, txn: ReadTxn, key: str) -> RowT | None:
        return txn.get(self._table, key)

    def values_in(self, txn: ReadTxn) -> list[RowT]:
        return list(self.each_in(txn))

    def each_in(self, txn: ReadTxn) -> Iterator[RowT]:
        return (row for _, row in txn.rows(self._table))

    def put_in(self, txn: WriteTxn, row: RowT) -> None:
        txn.put(self._table, self._key(row), row)

    def delete_in(self, txn: WriteTxn, key: str) -> None:
        txn.delete(self._table, key)

    def newest_in(self, txn: ReadTxn) -> RowT | None:
        """The row with the greatest key."""
        return next((row for _, row in txn.rows(self._table, reverse=True)), None)

    def oldest_in(self, txn: ReadTxn) -> RowT | None:
        """The row with the smallest key."""
        return next((row for _, row in txn.rows(self._table)), None)


_clusters = Table("clusters", Cluster)
_tenants = Table("tenants", Tenant)
_namespaces = Table("namespaces", Namespace)
_zones = Table("zones", Zone)
_object_groups = Table("object_groups", ObjectGroup)
_pools = Table("pools", Pool)
_vms = Table("vms", Vm)
_points = Table("points", BackupPoint)
_backups = Table("backups", Backup)
_jobs = Table("jobs", Job)
_operations = Table("operations", Operation)
_distrusts = Table("distrusts", Distrust)
_pack_reads = Table("pack_reads", PackRead)
_baselines = Table("baselines", Baseline)
_directories = Table("directories", Directory)

_TABLES: tuple[Table[Any], ...] = (
    _clusters,
    _tenants,
    _namespaces,
    _zones,
    _object_groups,
    _pools,
    _vms,
    _points,
    _backups,
    _jobs,
    _operations,
    _distrusts,
    _pack_reads,
    _baselines,
    _directories,
)


class State:
    """The environment in directory `path`, with a `Rows` for each table. Thread-safe."""

    def __init__(self, path: str) -> None:
        store = Store(path, _TABLES)
        self.store = store
        self.clusters = Rows(store, _clusters, lambda row: row.uuid)
        self.tenants = Rows(store, _tenants, lambda row: row.uuid)
        self.namespaces = Rows(store, _namespaces, lambda row: row.uuid)
        self.zones = Rows(store, _zones, lambda row: row.uuid)
        self.object_groups = Rows(store, _object_groups, lambda row: row.uuid)
        self.pools = Rows(store, _pools, lambda row: row.uuid)
        self.vms = Rows(store, _vms, lambda row: row.uuid)
        self.points = Rows(store, _points, lambda row: row.uuid)
        self.backups = Rows(store, _backups, lambda row: backup_key(row.cluster_uuid, row.uuid))
        self.jobs = Rows(store, _jobs, lambda row: row.uuid)
        self.operations = Rows(store, _operations, lambda row: operation_key(row.seq))
        self.distrusts = Rows(store, _distrusts, distrust_key)
        self.pack_reads = Rows(
            store, _pack_reads, lambda row: pack_read_key(row.point_uuid, row.pack)
        )
        self.baselines = Rows(
            store, _baselines, lambda row: baseline_key(row.vm_uuid, row.target_device)
        )
        self.directories = Rows(store, _directories, lambda row: row.uuid)

    def close(self) -> None:
        """Ends it; every later call is a StorageError."""
        self.store.close()


def backup_key(cluster_uuid: str, uuid: str) -> str:
    """An imported backup keeps its uuid, so two managed clusters may both have it."""
    return f"{cluster_uuid}/{uuid}"


def distrust_key(row: Distrust) -> str:
    return f"{row.point_uuid}/{row.cluster_uuid}/{row.pack}"


def pack_read_key(point_uuid: str, pack: str) -> str:
    return f"{point_uuid}/{pack}"


def baseline_key(vm_uuid: str, target_device: str) -> str:
    return f"{vm_uuid}/{target_device}"


def operation_key(seq: int) -> str:
    """Keys sort as the numbers do."""
    return f"{seq:016x}"
