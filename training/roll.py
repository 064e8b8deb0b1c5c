"""What the roll call makes of the ranks' cards: what is wrong and its likely cause, or one line on who came. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

_SHOWN = 16

Settings = Mapping[str, tuple[str, str]]  # name -> (value without secrets, digest of the value)


@dataclass(frozen=True)
class Card:
    """One process about itself."""

    rank: int
    size: int
    host: str
    pid: int
    local_rank: int
    launcher: str
    job: str = ""
    device: str = "cpu"  # its kind
    gpu: str = ""  # what tells it from other GPUs; empty where ranks may share it
    visible_gpus: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    settings: str = ""  # a digest of the configuration
    problem: str = ""  # why this process cannot take part

    @property
    def place(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" of job {self.job}" if self.job else "")


@dataclass(frozen=True)
class Expected:
    """What rank 0 waits for."""

    size: int
    waited_s: float
    address: str
    nodes: tuple[str, ...] = ()  # where they are known
    remark: str = ""  # on the address, as rank 0 sees it


@dataclass(frozen=True)
class Roll:
    """What all ranks are told. `error` ends the start; `summary` is one line on who came."""

    error: str = ""
    may_pass: bool = False  # another try may succeed
    warnings: tuple[str, ...] = ()
    summary: str = ""


def judge(cards: Sequence[Card], expected: Expected, settings_of: Callable[[str], Settings]) -> Roll:
    """`cards` of those who came, in any order; `settings_of` gives the configuration with a digest."""
    cards = sorted(cards, key=lambda card: (card.rank, card.host, card.pid))
    for error in _errors(cards, expected, settings_of):
        return Roll(error, may_pass=error in _missing(cards, expected))
    return Roll(warnings=tuple(_warnings(cards)), summary=_summary(cards))


def _errors(cards: Sequence[Card], expected: Expected, settings_of: Callable[[str], Settings]) -> Iterator[str]:
    """The telling ones first: a rank that came twice is another rank's absence."""
    yield from _problems(cards)
    yield from _doubled(cards)
    yield from _differences(cards, "world size", lambda card: str(card.size), _OTHER_WORLDS)
    yield from _missing(cards, expected)
    yield from _versions(cards)
    yield from _shared_gpus(cards)
    yield from _other_settings(cards, settings_of)


_OTHER_WORLDS = "is WORLD_SIZE exported by hand, or do two runs share MASTER_ADDR and MASTER_PORT?"


def _problems(cards: Sequence[Card]) -> Iterator[str]:
    bad = [card for card in cards if card.problem]
    if bad:
        others = f" (and {len(bad) - 1} more ranks)" if len(bad) > 1 else ""
        yield f"rank {bad[0].rank} on {bad[0].host}{others}: {bad[0].problem}"


def _doubled(cards: Sequence[Card]) -> Iterator[str]:
    by_rank = defaultdict(list)
    for card in cards:
        by_rank[card.rank].append(card)
    doubled = {rank: found for rank, found in by_rank.items() if len(found) > 1}
    if not doubled:
        return
    rank, found = next(iter(doubled.items()))
    others = f" (and so were {len(doubled) - 1} more ranks)" if len(doubled) > 1 else ""
    who = " and ".join(card.place for card in found[:3])
    if len({card.job for card in found}) > 1 or any(card.launcher == "torchrun" for card in found):
        cause = "two runs share MASTER_ADDR and MASTER_PORT"
    else:
        cause = "two runs share MASTER_ADDR and MASTER_PORT, or RANK is exported alike for several tasks"
    yield f"rank {rank} was started {len(found)} times{others}: {who}. Likely: {cause}"


def _missing(cards: Sequence[Card], expected: Expected) -> Iterator[str]:
    missing = sorted(set(range(expected.size)) - {card.rank for card in cards})
    if missing:
        yield (
            f"{expected.size - len(missing)} of {expected.size} ranks came within {expected.waited_s:.0f} s, "
            f"{_by_host(cards)}; missing: {_some(missing)}. {_why_missing(cards, expected)}"
        )


def _why_missing(cards: Sequence[Card], expected: Expected) -> str:
    if expected.remark:
        return f"Likely: {expected.remark}"
    came = {_short(card.host) for card in cards}
    absent = [node for node in expected.nodes if _short(node) not in came]
    if absent and len(absent) < len(expected.nodes):
        return (
            f"Nobody came from {_some(absent)}: did the program start there, and can these nodes reach rank 0 at "
            f"{expected.address} (firewall, interface)?"
        )
    return (
        "Likely: fewer tasks were started than the world size says (ntasks-per-node, --nproc-per-node, --nnodes), or "
        f"they ended before this, or cannot reach rank 0 at {expected.address}; see what they say"
    )


def _differences(cards: Sequence[Card], what: str, value: Callable[[Card], str], cure: str) -> Iterator[str]:
    by_value = defaultdict(list)
    for card in cards:
        by_value[value(card)].append(card)
    if len(by_value) > 1:
        groups = [f"{key} on {_ranks(found)}" for key, found in by_value.items()]
        yield f"ranks differ in {what}: {', '.join(groups[:4])}; {cure}"


def _versions(cards: Sequence[Card]) -> Iterator[str]:
    for name in dict.fromkeys(name for card in cards for name in card.versions):
        found = {card.rank: card.versions.get(name, "none") for card in cards}
        cure = "all nodes need the same environment"
        yield from _differences(cards, f"the version of {name}", lambda card, found=found: found[card.rank], cure)  # type: ignore[misc]


def _shared_gpus(cards: Sequence[Card]) -> Iterator[str]:
    by_gpu = defaultdict(list)
    for card in cards:
        if card.gpu:
            by_gpu[card.host, card.gpu].append(card)
    for (host, gpu), found in by_gpu.items():
        if len(found) > 1:
            ranks = len([card for card in cards if card.host == host])
            gpus = len({card.gpu for card in cards if card.host == host})
            yield (
                f"{_ranks(found)} on {host} have one GPU ({found[0].device}, {gpu}) in common; {ranks} ranks use "
                f"{gpus} GPUs there. Likely: more tasks than GPUs on the node (ntasks-per-node, --nproc-per-node), one "
                "CUDA_VISIBLE_DEVICES for all tasks, or two launchers on one node"
            )
            return


def _other_settings(cards: Sequence[Card], settings_of: Callable[[str], Settings]) -> Iterator[str]:
    digests = dict.fromkeys(card.settings for card in cards)
    if len(digests) < 2:
        return
    first, second = list(digests)[:2]
    ours, theirs = settings_of(first), settings_of(second)
    names = [name for name in ours if ours[name] != theirs.get(name)] or ["?"]
    shown = [settings.get(names[0], ("?", ""))[0] for settings in (ours, theirs)]
    values = f"{shown[0]} on {_of(cards, first)} and {shown[1]} on {_of(cards, second)}"
    if shown[0] == shown[1]:
        values = f"on {_of(cards, first)} and {_of(cards, second)} in what is masked as secret"
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    yield (
        f"ranks were started with different settings: --{names[0].replace('_', '-')}{more} is {values}; all ranks need "
        "the same command and --config"
    )


def _of(cards: Sequence[Card], digest: str) -> str:
    return _ranks([card for card in cards if card.settings == digest])


def _warnings(cards: Sequence[Card]) -> Iterator[str]:
    """Ranks that leave GPUs of their node idle."""
    by_host = defaultdict(list)
    for card in cards:
        by_host[card.host].append(card)
    idle = {host: found for host, found in by_host.items() if len(found) < max(card.visible_gpus for card in found)}
    if idle:
        host, found = next(iter(idle.items()))
        others = f" (and {len(idle) - 1} more hosts)" if len(idle) > 1 else ""
        yield (
            f"{host}{others} has {max(card.visible_gpus for card in found)} GPUs and {len(found)} ranks: the others "
            "idle. ntasks-per-node (torchrun: --nproc-per-node) usually equals the GPUs of a node"
        )


def _summary(cards: Sequence[Card]) -> str:
    hosts = Counter(card.host for card in cards)
    kinds = Counter(card.device for card in cards)
    devices = ", ".join(f"{count} x {kind}" for kind, count in kinds.items()) if len(kinds) > 1 else next(iter(kinds))
    versions = ", ".join(f"{name} {version}" for name, version in cards[0].versions.items())
    on = f"{len(hosts)} hosts ({_by_host(cards)})" if len(hosts) > 1 else next(iter(hosts))
    return f"{len(cards)} ranks by {cards[0].launcher} on {on}, {devices}; {versions}"


def _by_host(cards: Sequence[Card]) -> str:
    counts = list(Counter(card.host for card in cards).items())
    if len(counts) > 1 and len({count for _, count in counts}) == 1:
        return f"{counts[0][1]} on each of {_some([host for host, _ in counts])}"
    return _some([f"{count} on {host}" for host, count in counts])


def _ranks(cards: Sequence[Card]) -> str:
    return f"rank{'s' if len(cards) > 1 else ''} {_some([card.rank for card in cards], 4)}"


def _some(things: Sequence[object], limit: int = _SHOWN) -> str:
    tail = f" and {len(things) - limit} more" if len(things) > limit else ""
    return ", ".join(map(str, things[:limit])) + tail


def _short(host: str) -> str:
    return host.split(".")[0]
