"""Tests of training/run_report."""
