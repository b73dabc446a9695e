"""Parquet parts, ledger and run directory."""
