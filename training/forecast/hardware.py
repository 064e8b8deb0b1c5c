"""The machines that runs are planned for, as their vendors describe them. Facts only."""

from __future__ import annotations

from dataclasses import dataclass

from training.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """memory_bytes: what the driver leaves to a process, about; peak_flops: dense bf16, as the data sheet has it."""

    name: str
    memory_bytes: int
    peak_flops: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40", int(39.4 * 2**30), 312e12),
        Gpu("a100-80", int(79.2 * 2**30), 312e12),
        Gpu("h100", int(79.1 * 2**30), 989e12),
        Gpu("h200", int(139.8 * 2**30), 989e12),
    )
}


@dataclass(frozen=True)
class Cluster:
    """num_gpus of one kind in nodes of `gpus_per_node`, with `link_gbit` of network between nodes for each GPU."""

    gpu: Gpu
    num_gpus: int
    gpus_per_node: int = 8
    link_gbit: float = 100.0

    def __post_init__(self) -> None:
        if self.num_gpus > self.gpus_per_node and self.num_gpus % self.gpus_per_node:
            raise ConfigError(f"--gpus {self.num_gpus} does not fill nodes of {self.gpus_per_node} GPUs")

    @property
    def num_nodes(self) -> int:
        """Nodes, of which the only one may be partly used."""
        return -(-self.num_gpus // self.gpus_per_node)

    def __str__(self) -> str:
        nodes = f"{self.num_nodes} node{'s' if self.num_nodes > 1 else ''}"
        return f"{self.num_gpus} {self.gpu.name} in {nodes}, {self.link_gbit:g} Gbit/s a GPU between nodes"
