"""Tests; a package, so that spawned processes can import test functions by name."""
