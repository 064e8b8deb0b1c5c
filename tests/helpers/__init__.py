"""What tests share: shards, processes, ranks, a Slurm cluster."""
