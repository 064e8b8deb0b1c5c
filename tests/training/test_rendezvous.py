"""Where rank 0 listens, and why it cannot be reached: each cause has a line of its own, within the limit."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from models.errors import ConfigError
from tests.helpers.gloo import free_port
from tests.helpers.process import poll
from training.config import ClusterConfig
from training.launch import Launch
from training.rendezvous import find_address, is_here, open_store

LIMIT_S = 2.0
CLUSTER = ClusterConfig(device="cpu", rendezvous_timeout_s=LIMIT_S)


def _launch(rank: int, host: str = "127.0.0.1", port: int | None = None, **more: object) -> Launch:
    return replace(Launch(rank, 2, rank, 2, host, port or free_port(), "srun"), **more)


@pytest.fixture
def stranger() -> Iterator[int]:
    """A port at which something listens that is no store and never says anything."""
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        yield server.getsockname()[1]
    # What was waiting for its word gives up soon after it is gone: torch retries in C++, where nothing can stop it.
    poll(lambda: not any(thread.name == "store-client" for thread in threading.enumerate()), 20, "clients to end")


def _refused(launch: Launch, cluster: ClusterConfig = CLUSTER) -> str:
    started = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        open_store(launch, cluster)
    assert time.monotonic() - started < LIMIT_S + 20
    return str(caught.value)


def test_nobody_at_the_address_is_a_refusal() -> None:
    said = _refused(_launch(1))
    assert said.startswith("rank 1 on ") and "within 2 s: nobody listens there (connection refused)" in said


def test_a_name_that_does_not_resolve_is_named() -> None:
    assert "the name no-such-host.invalid does not resolve" in _refused(_launch(1, "no-such-host.invalid"))


def test_packets_that_are_dropped_point_to_a_firewall(monkeypatch: pytest.MonkeyPatch) -> None:
    def dropped(*_: object, timeout: float, **__: object) -> None:
        time.sleep(min(timeout, 0.2))
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", dropped)
    assert "no answer (connection timed out), so a firewall drops the packets" in _refused(_launch(1, "10.0.0.1"))


def test_the_launch_nodes_address_is_told_when_it_was_only_a_substitute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    said = _refused(_launch(1, "no-such-host.invalid"))
    assert "127.0.0.1 is SLURM_LAUNCH_NODE_IPADDR, taken because the name no-such-host.invalid does not resolve" in said
    assert "on a submit node it is not rank 0's: export MASTER_ADDR" in said


def test_localhost_as_the_address_of_several_nodes_is_named() -> None:
    assert "127.0.0.1 is every node itself: export MASTER_ADDR" in _refused(_launch(1, local_size=1))


def test_a_port_that_is_taken_is_named_at_once_with_the_cure(stranger: int) -> None:
    said = _refused(_launch(0, port=stranger))
    assert f"port {stranger} is taken" in said and "export MASTER_PORT=" in said


def test_a_stranger_at_the_port_does_not_hold_a_rank_for_ever(stranger: int) -> None:
    said = _refused(_launch(1, port=stranger))
    assert f"what listens at port {stranger} does not answer as a store: another program has this port" in said


def test_all_ranks_move_to_the_same_spare_port_when_the_first_is_taken(stranger: int) -> None:
    ports = {"port": stranger, "spare_ports": (free_port(),), "job": "7.0"}
    patient = replace(CLUSTER, rendezvous_timeout_s=60.0)
    server = open_store(_launch(0, **ports), patient)
    client = open_store(_launch(1, **ports), patient)
    server.set("word", "heard")
    assert client.get("word") == b"heard"


def test_the_store_of_another_job_is_passed_over() -> None:
    taken, spare = free_port(), free_port()
    patient = replace(CLUSTER, rendezvous_timeout_s=60.0)
    other = open_store(_launch(0, port=taken, job="6.0"), patient)
    own = open_store(_launch(0, port=taken, spare_ports=(spare,), job="7.0"), patient)
    client = open_store(_launch(1, port=taken, spare_ports=(spare,), job="7.0"), patient)
    own.set("word", "7")
    assert client.get("word") == b"7"
    assert not other.check(["word"])


def test_a_given_url_wins_and_another_form_is_refused() -> None:
    given = find_address(_launch(0), replace(CLUSTER, dist_url="tcp://h:7"))
    assert (given.host, given.ports) == ("h", (7,))
    with pytest.raises(ConfigError, match="not of the form tcp://host:port"):
        find_address(_launch(0), replace(CLUSTER, dist_url="h"))


def test_a_machine_knows_its_own_addresses() -> None:
    assert is_here("127.0.0.1")
    assert not is_here("192.0.2.1")  # reserved for documentation
    assert not is_here("no-such-host.invalid")
