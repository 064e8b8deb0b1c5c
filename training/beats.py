"""What ranks tell each other beside the training: a heartbeat each, questions, and one alarm, in the session's store.

Knows keys and their content, not when to write them. Costs a rank two small requests a period; all heartbeats are
one request of rank 0, made only when it suspects something (4,096 of them: 0.05 to 0.1 s, measured).
"""

from __future__ import annotations

import json
import socket
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_TIMEOUT_S = 20.0
_ALARM, _QUESTION = "alarm", "question"


def place(phase: str, step: int) -> str:
    """Where a rank is, for a sentence."""
    return f"at step {step} ({phase})" if step else f"at the start ({phase})"


@dataclass(frozen=True)
class Beat:
    """A rank's own description. number: counts its beats. seconds: since the last sign of progress.

    collectives: how many it has entered since the start, which tells who is behind. shard, sample: last taken.
    """

    rank: int
    host: str
    pid: int
    number: int = 0
    phase: str = "start"
    step: int = 0
    wait: str = ""
    seconds: float = 0.0
    collectives: int = 0
    shard: str = ""
    sample: str = ""
    ended: bool = False

    @property
    def place(self) -> str:
        """Where the rank is, for a sentence."""
        return place(self.phase, self.step)


@dataclass(frozen=True)
class Alarm:
    """Why the run cannot go on: what became of `rank`, and the exit code of all."""

    rank: int
    text: str
    code: int


@dataclass(frozen=True)
class Question:
    """Rank 0 asks some ranks where they are."""

    number: int
    ranks: tuple[int, ...]


class Board:
    """The keys, seen by one rank. Has a connection of its own: a training thread that waits must not block it."""

    def __init__(self, store: dist.Store, rank: int, size: int):
        self._server = _server_of(store)
        own = store.clone()
        own.set_timeout(timedelta(seconds=_TIMEOUT_S))
        self._store = dist.PrefixStore("health", own)
        self._rank = rank
        self._size = size
        if rank == 0:
            self._store.set(_ALARM, "")
            self._store.set(_QUESTION, "")

    @property
    def address(self) -> str:
        """Where the store is served."""
        return "{}:{}".format(*self._server)

    def is_gone(self) -> bool:
        """True when nobody listens where the store was. A host that does not answer may come back."""
        try:
            socket.create_connection(self._server, timeout=3).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
        return False

    def publish(self, beat: Beat) -> None:
        """This rank's heartbeat; at least one before anybody reads."""
        self._store.set(f"beat/{beat.rank}", json.dumps(asdict(beat)))

    def has_come(self, rank: int) -> bool:
        """True once `rank` has published."""
        return bool(self._store.check([f"beat/{rank}"]))

    def beats(self, ranks: range | None = None) -> list[Beat]:
        """The last heartbeat of each rank."""
        values = self._store.multi_get([f"beat/{rank}" for rank in ranks or range(self._size)])
        return [Beat(**json.loads(value)) for value in values]

    def notices(self) -> tuple[Alarm | None, Question | None]:
        """What all ranks look at once a period."""
        alarm, question = map(_decoded, self._store.multi_get([_ALARM, _QUESTION]))
        return (
            Alarm(**alarm) if alarm else None,
            Question(question["number"], tuple(question["ranks"])) if question else None,
        )

    def raise_alarm(self, alarm: Alarm) -> Alarm:
        """The alarm that counts: the first one of all ranks."""
        return Alarm(**_decoded(self._store.compare_set(_ALARM, "", json.dumps(asdict(alarm)))))

    def ask(self, question: Question) -> None:
        """Ask for `answers`."""
        self._store.set(_QUESTION, json.dumps(asdict(question)))

    def answer(self, question: Question, lines: list[str]) -> None:
        """What this rank has to say."""
        self._store.set(self._answer_key(question, self._rank), json.dumps(lines))

    def answers(self, question: Question) -> dict[int, list[str]]:
        """Those that have come, by rank."""
        keys = {rank: self._answer_key(question, rank) for rank in question.ranks}
        return {rank: json.loads(self._store.get(key)) for rank, key in keys.items() if self._store.check([key])}

    def _answer_key(self, question: Question, rank: int) -> str:
        return f"answer/{question.number}/{rank}"


def _server_of(store: dist.Store) -> tuple[str, int]:
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return (store.host, store.port) if isinstance(store, dist.TCPStore) else ("", 0)


def _decoded(value: bytes) -> Any:
    return json.loads(value) if value else None
