"""The roll call before the process group: who was expected, who came, from where, with which versions.

A missing or doubled rank makes NCCL and gloo wait for minutes and then say little. Here every rank hands a card
into the store, rank 0 reads them within a short limit, and all learn one verdict (`training.roll`).

torchrun's store may outlive a start of the ranks, and its count of restarts differs between agents. So rank 0 draws
a name for each roll call, and everything happens in the key space of that name. A rank that meets an older name is
no part of that verdict, which says how many it covers, and waits for the next one. No step costs rank 0 more than a
few calls, whatever the number of ranks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import random
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist

from training.config import ClusterConfig
from training.errors import ConfigError, LaunchError
from training.launch import Launch
from training.rendezvous import STORE_ERRORS, Address, find_address, is_here, is_served_by_agent
from training.roll import Card, Expected, Roll, Settings, judge
from training.secrets import mask_secrets

_GRACE_S = 10.0  # rank 0's limit begins when it comes, which may be later
_LINGER_S = 10.0


@dataclass(frozen=True)
class _Caller:
    """One process at the roll call."""

    store: dist.Store
    card: Card
    settings: Settings
    timeout_s: float
    reused: bool  # the store may hold an earlier roll call

    def enter(self, name: str) -> tuple[dist.Store, int]:
        """Hand in the card; returns the key space and how many had come, this one included."""
        space = dist.PrefixStore(name, self.store)
        if not space.check([_settings_key(self.card.settings)]):
            space.set(_settings_key(self.card.settings), json.dumps(self.settings))
        # Order matters: who counts himself has handed in his card.
        space.append("cards", json.dumps(dataclasses.asdict(self.card)) + "\n")  # type: ignore[attr-defined]
        return space, space.add("came", 1)

    def late(self) -> ConfigError:
        return ConfigError(
            f"rank {self.card.rank} ({self.card.place}): the ranks at this address are complete without it. Likely: "
            "two runs share MASTER_ADDR and MASTER_PORT, or this rank was started twice"
        )


def call_roll(
    store: dist.Store, launch: Launch, cluster: ClusterConfig, card: Card, settings: Mapping[str, Any]
) -> tuple[Roll, dist.Store]:
    """Every rank reports; all return together, or all raise the same ConfigError. The store returned is fresh."""
    address = find_address(launch, cluster)
    caller = _Caller(store, card, shown(settings), cluster.rendezvous_timeout_s, is_served_by_agent(address))
    try:
        roll, space = _lead(caller, launch, address) if launch.rank == 0 else _follow(caller)
    except STORE_ERRORS as exc:
        raise LaunchError(f"rank {launch.rank}: rank 0 at {address} went away during the roll call ({exc})") from exc
    if roll.error:
        raise (LaunchError if roll.may_pass else ConfigError)(roll.error)
    return roll, dist.PrefixStore("group", space)


def _lead(caller: _Caller, launch: Launch, address: Address) -> tuple[Roll, dist.Store]:
    name = uuid.uuid4().hex[:12]
    space, _ = caller.enter(name)
    caller.store.set("name", name)
    _wait(lambda: space.add("came", 0) >= launch.size, caller.timeout_s)
    cards = [Card(**json.loads(line)) for line in space.get("cards").decode().splitlines()]
    # A name that does not resolve takes its time: it is looked at when somebody is missing only.
    remark = _remark(address.host) if len(cards) < launch.size else ""
    expected = Expected(launch.size, caller.timeout_s, str(address), launch.nodes, remark)
    roll = judge(cards, expected, lambda digest: json.loads(space.get(_settings_key(digest))))
    space.set("verdict", json.dumps({**dataclasses.asdict(roll), "covers": len(cards)}))
    if roll.error:
        # The store ends with this process: the others must have read it.
        _wait(lambda: space.add("heard", 0) >= len(cards) - 1, _LINGER_S)
    return roll, space


def _follow(caller: _Caller) -> tuple[Roll, dist.Store]:
    deadline = time.monotonic() + caller.timeout_s + _GRACE_S
    known, space, number = "", caller.store, 0
    while (left := deadline - time.monotonic()) > 0 and _wait(lambda: caller.store.check(["name"]), left):
        name = caller.store.get("name").decode()
        if name != known:
            known, (space, number) = name, caller.enter(name)
        # An older roll call may never be judged: then the next one is looked for now and again.
        patience = min(1.0, left) if caller.reused else left
        if not _wait(lambda space=space: space.check(["verdict"]), patience):  # type: ignore[misc]
            continue
        verdict = json.loads(space.get("verdict"))
        if number <= verdict.pop("covers"):
            space.add("heard", 1)
            return Roll(**{**verdict, "warnings": tuple(verdict["warnings"])}), space
        if not caller.reused:
            raise caller.late()
        time.sleep(0.2)
    raise LaunchError(
        f"rank {caller.card.rank} on {caller.card.host}: a store answers at rank 0's address, but no word from rank 0 "
        f"within {caller.timeout_s:.0f} s; see what rank 0 says, and whether another job uses MASTER_PORT there"
    )


def _wait(ready: Callable[[], bool], timeout_s: float) -> bool:
    """Asks until it is so: a wait in the store prints lines of its own when it ends in vain."""
    deadline, pause = time.monotonic() + timeout_s, 0.01
    while not ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause * random.uniform(0.5, 1.5))
        pause = min(1.5 * pause, 0.3)
    return True


def _remark(host: str) -> str:
    """What rank 0 knows of its address that the others do not."""
    if is_here(host):
        return ""
    return f"the others look for rank 0 on {host}, and it is on {_host()}; export MASTER_ADDR as the name of that node"


def make_card(launch: Launch, device: torch.device, backend: str, settings: Mapping[str, Any], problem: str) -> Card:
    """This process about itself."""
    on_gpu = device.type == "cuda" and not problem
    return Card(
        rank=launch.rank,
        size=launch.size,
        host=_host(),
        pid=os.getpid(),
        local_rank=launch.local_rank,
        launcher=launch.launcher,
        job=launch.job,
        device=torch.cuda.get_device_name(device) if on_gpu else device.type,
        gpu=_identity(device) if on_gpu and backend == "nccl" else "",
        visible_gpus=_visible_gpus() if on_gpu else 0,
        versions=versions(on_gpu),
        settings=digest(settings),
        problem=problem,
    )


def _host() -> str:
    return socket.gethostname()


def _identity(device: torch.device) -> str:
    """A GPU's name for itself; none for slices of a GPU, which share that of the whole one."""
    properties = torch.cuda.get_device_properties(device)
    return "" if " MIG " in f"{properties.name} " else str(getattr(properties, "uuid", device.index))


def _visible_gpus() -> int:
    """Of the node as far as it can be seen: Slurm may show each task one GPU only."""
    visible = torch.cuda.device_count()
    on_node = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return max(visible, int(on_node)) if visible == 1 and on_node.isdigit() else visible


def versions(on_gpu: bool) -> dict[str, str]:
    """Of what must be equal everywhere."""
    found = {"torch": str(torch.__version__)}
    if on_gpu:
        found |= {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
    found["Python"] = ".".join(platform.python_version_tuple()[:2])
    for name in ("timm", "clipyard"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def digest(value: Any) -> str:
    """Equal for equal values of any kind that settings have."""
    return hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()


def shown(settings: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Each setting as others may see it, and what tells its values apart."""
    masked = mask_secrets(dict(settings))
    return {name: (str(masked[name]), digest(value)) for name, value in settings.items()}


def _settings_key(digest: str) -> str:
    return f"settings-{digest}"
