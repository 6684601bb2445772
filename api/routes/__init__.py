"""Every call, by thing. The order is that of the OpenAPI document and of /docs."""

from api.calls import AnyCall, Batch
from api.routes import backups, computes, inventory, jobs, points, remote

CALLS: tuple[AnyCall | Batch, ...] = (
    *backups.CALLS,
    *remote.CALLS,
    *computes.CALLS,
    *points.CALLS,
    *jobs.CALLS,
    *inventory.CALLS,
)
