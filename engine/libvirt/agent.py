"""Freezing a guest's file systems through its agent.

We ask libvirt ourselves, which takes a few hundredths of a second; the watchdog of
engine/snapshot/freeze.py has a command (thaw.py) for when we can't any more. When libvirt answers
neither (it hangs), nobody else can reach the agent: then a thread goes on until it does.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from functools import partial
from pathlib import Path

from engine.errors import EngineError, NotFound
from engine.libvirt.binding import NO_SUCH_DOMAIN, LibvirtFault, code_of
from engine.libvirt.domains import DomainFacts
from engine.libvirt.ending import LATER_PAUSE_S, LATER_TIMEOUT_S, FindDomain
from engine.libvirt.setup import LiveSetup
from engine.model import Vm
from engine.snapshot.freeze import NO_HOOK, FreezeHook

log = logging.getLogger(__name__)

_THAW = str(Path(__file__).with_name("thaw.py"))


def agent_hook(
    find: FindDomain, facts: DomainFacts, vm: Vm, setup: LiveSetup
) -> tuple[FreezeHook, str]:
    """(how to freeze the guest, why it can't be frozen)."""
    why = _hindrance(facts, vm)
    if why:
        return NO_HOOK, f"{why}: the snapshot is crash-consistent"
    timeout_s = max(int(setup.freeze_timeout_s), 1)
    hook = FreezeHook(
        command=(sys.executable, _THAW, vm.host),
        vm_uuid=vm.uuid,
        timeout_s=setup.freeze_timeout_s,
        hold_s=setup.freeze_hold_s,
        inside=partial(_ask, find, timeout_s),
        go_on=partial(_thaw_later, find, timeout_s, vm.uuid),
    )
    return hook, ""


def _hindrance(facts: DomainFacts, vm: Vm) -> str:
    if vm.state != "running":
        return f"the VM is {vm.state}"
    if not facts.agent:
        return "no guest agent is configured"
    return "the guest agent is not connected" if facts.agent == "disconnected" else ""


def _ask(find: FindDomain, timeout_s: int, verb: str) -> str:
    try:
        _freeze_or_thaw(find, timeout_s, verb)
    except (LibvirtFault, EngineError) as error:
        return str(error)
    return ""


def _freeze_or_thaw(find: FindDomain, timeout_s: int, verb: str) -> None:
    domain = find()
    domain.agentSetResponseTimeout(timeout_s)
    domain.fsFreeze() if verb == "freeze" else domain.fsThaw()


def _thaw_later(find: FindDomain, timeout_s: int, vm_uuid: str) -> None:
    """Goes on with the thaw, in a thread, until it succeeds or there is nothing to thaw."""

    def go_on() -> None:
        deadline_s = time.monotonic() + LATER_TIMEOUT_S
        while time.monotonic() < deadline_s:
            time.sleep(LATER_PAUSE_S)
            try:
                if not find().isActive():
                    return
                # Of a guest that is paused libvirt says that it does not run; it will again.
                _freeze_or_thaw(find, timeout_s, "thaw")
            except NotFound:
                return
            except (LibvirtFault, EngineError) as error:
                if code_of(error) == NO_SUCH_DOMAIN:
                    return
            else:
                log.warning("thawed_late", extra={"vm": vm_uuid})
                return

    threading.Thread(target=go_on, name="thaw", daemon=True).start()
