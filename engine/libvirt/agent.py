"""Freezing a guest's file systems through its agent.

We ask libvirt ourselves, which takes a few hundredths of a second; the watchdog of engine/freeze.py
has a command (thaw.py) for when we can't any more.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from engine.freeze import NO_HOOK, FreezeHook
from engine.libvirt.binding import Domain, LibvirtFault
from engine.libvirt.domains import DomainFacts
from engine.libvirt.setup import LiveSetup
from engine.model import Vm

_THAW = str(Path(__file__).with_name("thaw.py"))


def agent_hook(
    domain: Domain, facts: DomainFacts, vm: Vm, setup: LiveSetup
) -> tuple[FreezeHook, str]:
    """(how to freeze the guest, why it can't be frozen)."""
    why = _hindrance(facts, vm)
    if why:
        return NO_HOOK, f"{why}: the snapshot is crash-consistent"
    hook = FreezeHook(
        command=(sys.executable, _THAW, vm.host),
        vm_uuid=vm.uuid,
        timeout_s=setup.freeze_timeout_s,
        hold_s=setup.freeze_hold_s,
        inside=partial(_ask, domain, max(int(setup.freeze_timeout_s), 1)),
    )
    return hook, ""


def _hindrance(facts: DomainFacts, vm: Vm) -> str:
    if vm.state != "running":
        return f"the VM is {vm.state}"
    if not facts.agent:
        return "no guest agent is configured"
    return "the guest agent is not connected" if facts.agent == "disconnected" else ""


def _ask(domain: Domain, timeout_s: int, verb: str) -> str:
    try:
        domain.agentSetResponseTimeout(timeout_s)
        domain.fsFreeze() if verb == "freeze" else domain.fsThaw()
    except LibvirtFault as error:
        return str(error)
    return ""
