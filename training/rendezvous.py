"""The key-value store of all ranks: where it is, who serves it, and why it cannot be reached. Knows no roll call.

torch's own client waits silently, for ever where something else listens. Here a rank first knocks, so that it can
tell a refusal from packets that are dropped and from a name that does not resolve.
"""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from training.config import ClusterConfig
from training.errors import ConfigError, LaunchError, first_line
from training.launch import Launch

STORE_ERRORS = (dist.DistError, RuntimeError, TimeoutError)

_KNOCK_S = 5.0
_GREETING_S = 5.0  # for a server of several candidates to say whose it is


@dataclass(frozen=True)
class Address:
    """Where rank 0 listens: at the first of `ports` that is free there."""

    host: str
    ports: tuple[int, ...]
    remark: str = ""  # on how the host was found, for the error

    def __str__(self) -> str:
        return f"{self.host}:{' or '.join(map(str, self.ports))}"


def open_store(launch: Launch, cluster: ClusterConfig) -> dist.Store:
    """The store, in a key space of this job. Raises LaunchError when rank 0 cannot be reached in time."""
    address = find_address(launch, cluster)
    if launch.rank == 0 and not is_served_by_agent(address):
        store = _serve(address, cluster.rendezvous_timeout_s)
        store.set(_greeting(launch), "")
    else:
        store = _reach(address, launch, cluster.rendezvous_timeout_s)
    return dist.PrefixStore(f"clipyard-{launch.job}", store)


def find_address(launch: Launch, cluster: ClusterConfig) -> Address:
    """--dist-url, or what the launcher says. Raises ConfigError for an address of another form."""
    if cluster.dist_url:
        host, _, port = cluster.dist_url.removeprefix("tcp://").rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"--dist-url {cluster.dist_url!r} is not of the form tcp://host:port")
        return Address(host, (int(port),))
    ports, substitute = (launch.port, *launch.spare_ports), os.environ.get("SLURM_LAUNCH_NODE_IPADDR")
    if substitute and not _resolves(launch.host):
        remark = (
            f"{substitute} is SLURM_LAUNCH_NODE_IPADDR, taken because the name {launch.host} does not resolve on "
            f"{socket.gethostname()}; where srun was called on a submit node it is not rank 0's: "
        )
        return Address(substitute, ports, remark)
    return Address(launch.host, ports)


def is_served_by_agent(address: Address) -> bool:
    """True where torchrun's agent serves the store, which may then outlive a start of the ranks."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    return (address.host, str(address.ports[0])) == (os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT"))


def _resolves(host: str) -> bool:
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:
        return False


def is_here(host: str) -> bool:
    """True when `host` is an address of this machine."""
    try:
        family, _, _, _, (ip, *_) = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((ip, 0))
        return True
    except OSError:
        return False


def _greeting(launch: Launch) -> str:
    return f"open-{launch.job}"


def _serve(address: Address, timeout_s: float) -> dist.Store:
    """Binding is the only test of a port that cannot be wrong a moment later."""
    for port in address.ports:
        try:
            # The server listens on all interfaces; the address is that of this rank's own client.
            return dist.TCPStore(
                "127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
            )
        except STORE_ERRORS as exc:
            if "EADDRINUSE" not in str(exc) and "already in use" not in str(exc):
                raise ConfigError(f"rank 0 cannot listen on port {port}: {first_line(exc)}; {_CHOOSE}") from exc
    taken = " and ".join(map(str, address.ports))
    raise LaunchError(
        f"rank 0 cannot listen on {socket.gethostname()}: port {taken} is taken, by another job on this node or by a "
        f"second process that was started as rank 0; {_CHOOSE}"
    )


_CHOOSE = "export MASTER_PORT=<a free port below the ephemeral range, as 20000> to choose another one"


def _reach(address: Address, launch: Launch, timeout_s: float) -> dist.Store:
    deadline = time.monotonic() + timeout_s
    pause, reason = 0.05, ""
    while (left := deadline - time.monotonic()) > 0:
        for port in address.ports:
            reason = _knock(address.host, port, min(left, _KNOCK_S))
            if not reason:
                store, reason = _client(address, port, launch, deadline)
                if store is not None:
                    return store
        # Thousands of ranks may wait for rank 0: not all of them at once, and ever more rarely.
        time.sleep(pause * random.uniform(0.5, 1.5))
        pause = min(2 * pause, 1.0)
    raise LaunchError(
        f"rank {launch.rank} on {socket.gethostname()} cannot reach rank 0 at {address} within {timeout_s:.0f} s: "
        f"{reason}; {_cure(address, launch)}"
    )


def _cure(address: Address, launch: Launch) -> str:
    if address.remark:
        return f"{address.remark}export MASTER_ADDR as rank 0's address"
    if address.host.startswith(("localhost", "127.")) and launch.rank >= launch.local_size:
        return f"{address.host} is every node itself: export MASTER_ADDR as the name of rank 0's node"
    return "see what rank 0 says, and export MASTER_ADDR (and MASTER_PORT) if this is not where it is"


def _knock(host: str, port: int, timeout_s: float) -> str:
    """Why nobody opens, or an empty string."""
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
    except socket.gaierror:
        return f"the name {host} does not resolve"
    except ConnectionRefusedError:
        return "nobody listens there (connection refused), so rank 0 did not start, has ended or is on another host"
    except TimeoutError:
        return "no answer (connection timed out), so a firewall drops the packets, or that is the wrong interface"
    except OSError as exc:
        return exc.strerror or str(exc)
    return ""


def _client(address: Address, port: int, launch: Launch, deadline: float) -> tuple[dist.Store | None, str]:
    """A client of the store, or why there is none. Where rank 0 had a choice of ports, the server must say its job."""
    left = max(1.0, deadline - time.monotonic())
    several = len(address.ports) > 1
    patience = min(left, _GREETING_S) if several else left
    answer: list[dist.Store | BaseException] = []

    def connect() -> None:
        try:
            timeout = timedelta(seconds=max(patience, _KNOCK_S))
            store = dist.TCPStore(address.host, port, is_master=False, wait_for_workers=False, timeout=timeout)
            store.set_timeout(timedelta(seconds=max(left, _KNOCK_S)))
            answer.append(store)
        except STORE_ERRORS as exc:
            answer.append(exc)

    # torch's client has no limit of its own where the server accepts and then says nothing.
    thread = threading.Thread(target=connect, name="store-client", daemon=True)
    thread.start()
    thread.join(patience)
    if not answer:
        return None, f"what listens at port {port} does not answer as a store: another program has this port"
    if isinstance(answer[0], BaseException):
        return None, first_line(answer[0])
    if several and not _greets(answer[0], launch):
        return None, f"the store at port {port} belongs to another job"
    return answer[0], ""


def _greets(store: dist.Store, launch: Launch) -> bool:
    patience = time.monotonic() + 1.0  # rank 0 may be between opening and saying so
    while not store.check([_greeting(launch)]):
        if time.monotonic() > patience:
            return False
        time.sleep(0.05)
    return True
