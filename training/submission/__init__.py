"""A run handed to Slurm: checked, written as a script, its code kept beside it. Needs neither torch nor a GPU."""
