"""Prefect flows: they run `dvc`, and hold no pipeline logic."""

import os

# Before Prefect is imported: it reads them then.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
# Its quickest. After two and a bit of them without one, flows/worker.py's automation acts.
os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")
