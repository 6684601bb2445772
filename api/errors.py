"""The one table of errors: what the engine's and our own codes are called over HTTP.

`scode` is the HTTP status times 100 plus a number inside that class, so it tells its class by
itself. A row's name and scode never change their meaning and are never used again; new rows take
the next free number of their class. The OpenAPI document and /docs list this table.

Every `code` of engine.errors and storage.errors has a row (tests/unit/test_api_errors.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import EngineError
from storage.errors import StorageError, shown


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """One published error. `message` and `message_cn` are its fixed text."""

    name: str
    scode: int
    message: str
    message_cn: str

    @property
    def status(self) -> int:
        """The HTTP status, which is the class of the error."""
        return self.scode // 100


class ApiError(Exception):
    """A request that ends here, before the engine saw it. `str(error)` gives the particulars."""

    def __init__(self, code: str, desc: str) -> None:
        super().__init__(desc)
        self.code = code


INTERNAL = ErrorRow("internal", 50000, "internal error", "内部错误")

ERRORS: tuple[ErrorRow, ...] = (
    # 400: the request is not what it has to be
    ErrorRow("malformed", 40000, "malformed request", "请求格式错误"),
    ErrorRow("invalid_member", 40001, "invalid or missing member", "参数无效或缺失"),
    ErrorRow("disk_not_in_backup", 40002, "the backup has no such disk", "备份中不存在该磁盘"),
    ErrorRow(
        "usd_type_not_offered", 40003, "the pool does not offer this type", "存储池不支持该磁盘类型"
    ),
    # 403: who asks
    ErrorRow("foreign_origin", 40300, "request from a foreign web page", "拒绝跨站请求"),
    ErrorRow(
        "foreign_host", 40301, "request for a host of another name", "请求的主机名不属于本服务"
    ),
    # 404: what is named is not there
    ErrorRow("route_not_found", 40400, "no such call", "接口不存在"),
    ErrorRow("cluster_not_found", 40401, "cluster not found", "集群不存在"),
    ErrorRow("tenant_not_found", 40402, "tenant not found", "租户不存在"),
    ErrorRow("namespace_not_found", 40403, "namespace not found", "命名空间不存在"),
    ErrorRow("zone_not_found", 40404, "zone not found", "资源池不存在"),
    ErrorRow("object_group_not_found", 40405, "object group not found", "分组不存在"),
    ErrorRow("pool_not_found", 40406, "pool not found", "存储池不存在"),
    ErrorRow("vm_not_found", 40407, "VM not found", "虚拟机不存在"),
    ErrorRow("backup_not_found", 40408, "backup not found", "虚拟机备份不存在"),
    ErrorRow("backup_point_not_found", 40409, "backup point not found", "备份点不存在"),
    ErrorRow("job_not_found", 40410, "job not found", "任务不存在"),
    ErrorRow(
        "backup_not_on_point", 40411, "backup not found on the backup point", "备份点上不存在该备份"
    ),
    # 405, 413
    ErrorRow("method_not_allowed", 40500, "wrong method for this call", "请求方法不支持"),
    ErrorRow("body_too_large", 41300, "request body too large", "请求体过大"),
    # 409: sound, but not in the present state
    ErrorRow("vm_busy", 40900, "the VM is in an action", "虚拟机正在执行其他动作"),
    ErrorRow("vm_no_disks", 40901, "the VM has no disks", "虚拟机没有磁盘"),
    ErrorRow("backup_running", 40902, "the backup is in progress", "备份正在进行中"),
    ErrorRow("backup_failed", 40903, "the backup is not complete", "备份未成功完成"),
    ErrorRow("name_taken", 40904, "the name is taken", "名称已被占用"),
    ErrorRow("volume_in_use", 40905, "the volume is in use", "卷正在使用中"),
    ErrorRow("point_in_use", 40906, "the backup point is in use", "备份点正在使用中"),
    ErrorRow("job_finished", 40907, "the job has ended", "任务已结束"),
    ErrorRow("volume_changed", 40908, "the volume changed while it was read", "读取期间卷发生变化"),
    ErrorRow("cancelled", 40909, "cancelled", "已取消"),
    ErrorRow("interrupted", 40910, "interrupted by a stop of the service", "因服务停止而中断"),
    ErrorRow("point_read_only", 40911, "the backup point is read-only", "备份点只读"),
    ErrorRow(
        "point_not_empty", 40912, "the directory is not empty and no point", "目录非空且不是备份点"
    ),
    ErrorRow("point_newer_format", 40913, "written by a newer version", "备份点由更新的版本写入"),
    ErrorRow("point_unsafe_mount", 40914, "the mount options are unsafe", "挂载选项不安全"),
    ErrorRow("refused", 40915, "not valid in the present state", "当前状态不允许该操作"),
    ErrorRow("session_ended", 40916, "the session has ended", "会话已结束"),
    ErrorRow(
        "backup_already_on_point",
        40917,
        "the point has this backup already",
        "备份点上已存在该备份",
    ),
    ErrorRow("already_running", 40918, "the data directory is in use", "数据目录已被占用"),
    ErrorRow("managed_by_libvirt", 40919, "libvirt manages this VM", "该虚拟机由libvirt管理"),
    ErrorRow(
        "domain_busy", 40920, "libvirt runs another job on the VM", "虚拟机上有其他libvirt任务"
    ),
    ErrorRow("domain_stopped", 40921, "the VM stopped during its backup", "备份期间虚拟机已停止"),
    ErrorRow(
        "format_not_readable",
        40922,
        "the disk can't be read in this state",
        "当前状态无法读取该磁盘",
    ),
    # 500: ours
    INTERNAL,
    ErrorRow("engine_failed", 50001, "the engine failed", "备份引擎错误"),
    ErrorRow("storage_failed", 50002, "the storage failed", "存储错误"),
    ErrorRow("data_damaged", 50003, "stored data is damaged", "存储数据已损坏"),
    ErrorRow("chunk_missing", 50004, "stored chunks are missing", "存储数据块缺失"),
    ErrorRow("config_invalid", 50005, "invalid configuration", "配置无效"),
    ErrorRow("disk_server_refused", 50006, "the disk's server refused", "磁盘服务返回错误"),
    ErrorRow(
        "disk_server_broken", 50007, "the disk's server broke the protocol", "磁盘服务违反协议"
    ),
    ErrorRow("hypervisor_refused", 50008, "libvirt refused", "libvirt返回错误"),
    # 503: may work later
    ErrorRow("point_unreachable", 50300, "the backup point is unreachable", "备份点不可达"),
    ErrorRow("point_not_ready", 50301, "the backup point is not ready", "备份点未就绪"),
    ErrorRow("pool_unreachable", 50302, "the pool is unreachable", "存储池不可达"),
    ErrorRow("shutting_down", 50303, "the service is shutting down", "服务正在停止"),
    ErrorRow("overloaded", 50304, "too many requests are waiting", "请求过多"),
    ErrorRow("disk_server_lost", 50305, "the disk's server is unreachable", "磁盘服务不可达"),
    ErrorRow("hypervisor_unreachable", 50306, "libvirt is unreachable", "libvirt不可达"),
    ErrorRow(
        "state_unreachable", 50307, "the data directory does not answer", "数据目录所在磁盘无响应"
    ),
    # 507: no room
    ErrorRow("point_full", 50700, "the backup point is full", "备份点空间不足"),
    ErrorRow("pool_full", 50701, "the pool is full", "存储池空间不足"),
    ErrorRow("scratch_full", 50702, "the scratch directory is full", "临时目录空间不足"),
)

BY_NAME = {row.name: row for row in ERRORS}


def row_of(error: BaseException) -> ErrorRow:
    """The row that an error is published under; INTERNAL for what nobody foresaw."""
    if isinstance(error, ApiError | EngineError | StorageError):
        return BY_NAME.get(error.code, INTERNAL)
    return INTERNAL


def desc_of(error: BaseException) -> str:
    """The particulars for the caller: of a defect of ours its type only, its text may tell more."""
    if isinstance(error, ApiError | EngineError | StorageError):
        return shown(str(error))
    return type(error).__name__
