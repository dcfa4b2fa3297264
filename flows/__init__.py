"""Prefect flows: they run `dvc`, and hold no pipeline logic."""
