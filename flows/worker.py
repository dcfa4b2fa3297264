"""The process that runs the deployments of prefect.yaml.

    python -m flows.worker      on any machine that has the project, against the servers that
                                PREFECT_API_URL and MLFLOW_TRACKING_URI name

It makes on the Prefect server what the flows need and is not there yet: the work pool, the limit
that lets one training use the GPU at a time, and the automation that tells the runs of killed
processes from those that are at work. It registers the deployments that are new or whose entry has
changed, and becomes a Prefect worker.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.events import ResourceSpecification
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Crashed
from prefect.utilities.callables import parameter_schema
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from cnnpipe import tracking
from cnnpipe.errors import RunFailed, UserError, printable
from cnnpipe.running import prefect_api, shown_address
from cnnpipe.workspace import repository_root
from flows.reproduction import GPU_LIMIT

DEPLOYMENTS = "prefect.yaml"
POOL = "cnnpipe"
TRAINING = "training"
"""The queue for what works in the project's folder, where DVC does one thing at a time."""
AUTOMATION = "Crash killed runs"
SILENCE = timedelta(seconds=70)
"""After so long without a heartbeat, of which flows give one in 30 s, a run is taken for killed."""

_ENDS = ("Completed", "Failed", "Cancelled", "Crashed")
_HEARTBEAT = "prefect.flow-run.heartbeat"


def main() -> int:
    """Makes what is missing and becomes the worker; the exit code where that cannot be."""
    parser = argparse.ArgumentParser(prog="python -m flows.worker")
    parser.add_argument("--wait", action="store_true", help="until the Prefect server answers")
    wait = parser.parse_args().wait
    root = repository_root()
    url = PREFECT_API_URL.value() or prefect_api()
    # For the commands below, and for every run; this process has read its settings already.
    os.environ.update(
        {
            "DO_NOT_TRACK": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PREFECT_API_URL": url,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONUNBUFFERED": "1",
        }
    )
    os.environ.setdefault("PREFECT_WORKER_QUERY_SECONDS", "2")  # until a run begins
    os.environ.setdefault("PREFECT_WORKER_HEARTBEAT_SECONDS", "10")
    # The servers' own business, and what is set below.
    for name in ("PREFECT_API_DATABASE_CONNECTION_URL", "PREFECT_SERVER_DATABASE_CONNECTION_URL",
                 "MLFLOW_BACKEND_STORE_URI", "CNNPIPE_PROJECT"):  # fmt: skip
        os.environ.pop(name, None)
    try:
        with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
            flows = read_flows(root)
            while (error := client.api_healthcheck()) and wait:
                time.sleep(0.5)
            if error:
                raise RunFailed(
                    f"no Prefect server answers at {shown_address(url)}: start one with "
                    "`cnnpipe up`, or set PREFECT_API_URL to yours"
                )
            names = sorted({flow.name for _, flow in flows})
            prepare(client, names)
            register(client, root, flows)
            settle(client, names)
        tracking.settle()
    except (UserError, RunFailed) as error:
        print(f"cnnpipe: {printable(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    # Only now: prefect.yaml is to be registered with the variable's name, not its value here.
    os.environ["CNNPIPE_PROJECT"] = str(root)
    name = f"{platform.node()} {root}".replace("/", "|").replace("%", "|")
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--name", name]
    sys.stdout.flush()
    os.execv(command[0], command)


def read_flows(root: Path) -> list[tuple[dict[str, Any], Flow[..., Any]]]:
    """The entries of the deployments in prefect.yaml, each with its flow.

    Raises:
        UserError: the file cannot be read, or a flow cannot be imported.
    """
    try:
        entries = YAML(typ="safe").load(root / DEPLOYMENTS)["deployments"]
    except (OSError, YAMLError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{DEPLOYMENTS}: deployments cannot be read: {reason}") from None
    flows = []
    for entry in entries:
        try:
            flow = load_flow_from_entrypoint(entry["entrypoint"], use_placeholder_flow=False)
        except (Exception, SystemExit) as error:  # whatever the module does
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"{DEPLOYMENTS}: deployment {entry.get('name')}: {entry.get('entrypoint')} cannot "
                f"be imported: {reason}"
            ) from None
        flows.append((entry, flow))
    return flows


def prepare(client: SyncPrefectClient, flows: list[str], silence: timedelta = SILENCE) -> None:
    """Makes the pool, its queue, the limit and the automation where they are missing.

    What is there stays as it is, whoever has changed it, but for the flows that the automation is
    about.

    Args:
        client: of the server.
        flows: the names of the project's flows.
        silence: without a heartbeat, before a run counts as killed; 10 s at least.
    """
    try:
        client.read_work_pool(POOL)
    except ObjectNotFound:
        _make(lambda: client.create_work_pool(WorkPoolCreate(name=POOL, type="process")))
    try:
        client.read_work_queue_by_name(TRAINING, work_pool_name=POOL)
    except ObjectNotFound:
        _make(lambda: client.create_work_queue(TRAINING, work_pool_name=POOL, concurrency_limit=1))
    try:
        client.read_global_concurrency_limit_by_name(GPU_LIMIT)
    except ObjectNotFound:
        limit = GlobalConcurrencyLimitCreate(name=GPU_LIMIT, limit=1)
        _make(lambda: client.create_global_concurrency_limit(limit))
    there = client.read_automations_by_name(AUTOMATION)
    if not there:
        client.create_automation(automation(flows, silence))
    elif there[0].trigger.match_related != _of_flows(flows):
        content = there[0].model_dump(exclude={"id", "owner_resource"})
        content["trigger"]["match_related"] = _of_flows(flows)
        client.update_automation(there[0].id, AutomationCore(**content))


def register(
    client: SyncPrefectClient, root: Path, flows: list[tuple[dict[str, Any], Flow[..., Any]]]
) -> None:
    """Registers the deployments that the server has not, or not as prefect.yaml has them now.

    Prefect keeps a schedule of the same slug paused when its deployment is registered again, but
    not its parameters, limits and other schedules. So each has the digest of its entry as its
    version, and one that has it already is left as its users have made it.

    Raises:
        RunFailed: Prefect refuses one.
    """
    content = YAML(typ="safe").load(root / DEPLOYMENTS)
    entries = []
    for entry, flow in flows:
        version = _digest(entry, content.get("pull"), parameter_schema(flow).model_dump())
        try:
            there = client.read_deployment_by_name(f"{flow.name}/{entry['name']}").version
        except ObjectNotFound:
            there = None
        if there != version:
            entries.append({**entry, "version": version})
    if not entries:
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / DEPLOYMENTS
        path.write_text(json.dumps({**content, "deployments": entries}))  # which is YAML, too
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all",
             "--prefect-file", str(path)],
            cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    print(done.stdout)
    if done.returncode:
        reason = (done.stdout.strip() or "no word why").splitlines()[-1]
        raise RunFailed(f"{DEPLOYMENTS}: Prefect does not take it: {reason}")


def settle(client: SyncPrefectClient, flows: list[str], silence: timedelta = SILENCE) -> None:
    """Ends the runs of processes that died when the server was not there to notice.

    The automation sees only what falls silent while the server runs.

    Args:
        client: of the server.
        flows: the names of the project's flows.
        silence: without any event, before a run counts as killed.
    """
    unsettled = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    for run in client.read_flow_runs(
        flow_filter=FlowFilter(name=FlowFilterName(any_=flows)),
        flow_run_filter=FlowRunFilter(
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=unsettled))
        ),
    ):
        since = datetime.now(UTC) - silence
        if run.state.timestamp > since:  # its events may be under way
            continue
        of_run = {
            "occurred": {"since": since.isoformat()},
            "resource": {"id": [f"prefect.flow-run.{run.id}"]},
        }
        if not client.request("POST", "/events/filter", json={"filter": of_run}).json()["events"]:
            client.set_flow_run_state(run.id, Crashed(message=_killed(silence)), force=True)
            print(f"{run.name}: its process is gone: Crashed")


def _killed(silence: timedelta) -> str:
    return f"No sign of life for {silence.total_seconds():.0f} s: the process is gone"


def automation(flows: list[str], silence: timedelta) -> AutomationCore:
    """It has the runs of these flows Crashed that give no heartbeat for so long.

    Source: "How to detect and respond to zombie flows", Prefect's documentation.
    """
    return AutomationCore(
        name=AUTOMATION,
        description="A run whose process was killed tells nobody: it has no heartbeat any more.",
        trigger=EventTrigger(
            after={_HEARTBEAT, "prefect.flow-run.Running"},  # it may be killed before its first
            expect={_HEARTBEAT, *(f"prefect.flow-run.{state}" for state in _ENDS)},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            match_related=_of_flows(flows),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=silence,
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message=_killed(silence))],
    )


def _of_flows(flows: list[str]) -> ResourceSpecification:
    """Others on the same server may have a slower heartbeat, by Prefect's default of 180 s."""
    return ResourceSpecification(
        {"prefect.resource.role": ["flow"], "prefect.resource.name": flows}
    )


def _make(create: Callable[[], object]) -> None:
    with suppress(ObjectAlreadyExists):  # by a worker that starts at the same time
        create()


def _digest(*content: object) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
