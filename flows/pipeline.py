"""The pipeline as a Prefect flow: each DVC stage a task, in order.

DVC decides whether a stage must run, and the task's state says what it decided: Completed where
the stage ran, Skipped where nothing had changed, Restored where its outputs came from the cache.

    python -m flows.pipeline            run it once, here
"""

import json
import re
import signal
import sys
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from prefect import flow, get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_SERVER_ANALYTICS_ENABLED,
    temporary_settings,
)
from prefect.states import Completed, Failed, State
from prefect.tasks import exponential_backoff

from cnnpipe.errors import RunFailed, UserError
from cnnpipe.params import Params, load
from cnnpipe.running import prefect_api
from flows import commands
from flows.artifacts import Outputs, show_metrics, show_picture, show_quarantine, show_run
from flows.reproduction import STAGES, Reproduction, has_gpu
from flows.settings import Settings, options

PARAMS = "params.yaml"


@task(task_run_name="{stage}", cache_policy=NO_CACHE)
def run_stage(stage: str, reproduction: Reproduction) -> State[Any]:
    """What DVC does about one stage, its output line by line in the task's log; how it ended."""
    logger = get_run_logger()
    try:
        if stage == STAGES[0]:  # so a retry of the download begins anew
            reproduction.start()
        for line in reproduction.stage(stage):
            logger.info(line)
    except BaseException:  # a cancelled run is no reason to leave a training running
        reproduction.stop()
        raise
    if reproduction.code or not reproduction.verdict:
        return Failed(message=reproduction.reason or "DVC did not come to this stage")
    verdict = reproduction.verdict
    return Completed(name=verdict, message=f"{stage}: {verdict.lower()}")


@task(task_run_name="judge", cache_policy=NO_CACHE)
def judge(run_id: str, promote: bool) -> State[Any]:
    """What `cnnpipe promote` says of the model beside the champion; with `promote` it may move."""
    done = commands.run("cnnpipe", "promote", run_id, "--json", *([] if promote else ["--dry-run"]))
    if done.code:
        return Failed(message=done.reason)
    decision = json.loads(done.output)
    kept = "would be promoted" if decision["decision"] == "promote" else "the champion stays"
    said = f"{'promoted' if decision['moved'] else kept}: {decision['reason']}"
    name = "Promoted" if decision["moved"] else "Completed"
    return Completed(name=name, message=said, data={**decision, "said": said})


@flow(name="pipeline")
def pipeline(
    settings: Settings = Settings(),  # noqa: B008 - what the form shows, and never changed
    promote: bool = False,
    in_checkout: bool = False,
) -> State[Any]:
    """From the images to an evaluated, tracked model: every stage that DVC finds out of date.

    It runs as a DVC experiment in a workspace of its own, which leaves the checkout as it is. Where
    no stage had to run, the flow ends as Skipped.

    Args:
        settings: What is to differ from params.yaml; leave empty what is to be as it says there.
        promote: Let the model take the champion's place if the evidence says so.
        in_checkout: Run `dvc repro` in the checkout instead; with its params.yaml as it is.
    """
    changes = settings.changes()
    try:
        if in_checkout and changes:
            raise UserError("in_checkout takes no settings: change params.yaml, or leave it out")
        params = load(PARAMS, changes)
    except UserError as error:
        return Failed(message=str(error))
    name = experiment_name()
    arguments = ["exp", "run", "--temp", "--name", name, *options(changes)]
    if in_checkout:
        arguments = ["repro"]
    states = []
    with Reproduction(arguments, uses_gpu(params)) as reproduction:
        for stage in STAGES:
            run = run_stage
            if stage == "download":
                run = run_stage.with_options(
                    retries=3,
                    retry_delay_seconds=exponential_backoff(5),
                    # Of what went wrong while it ran, and is not the user's to mend.
                    retry_condition_fn=lambda *_: reproduction.ran and not reproduction.refused,
                )
            states.append(run(stage, reproduction, return_state=True))
            if not states[-1].is_completed():
                return Failed(message=f"{stage}: {states[-1].message}")
    if not changes and not any(state.name == "Completed" for state in states):
        if not in_checkout:  # it is what another experiment, or the checkout, is already
            commands.run("dvc", "exp", "remove", "-q", name)
        return Completed(name="Skipped", message="nothing has changed")
    outputs = Outputs(None if in_checkout else name)
    tracked = outputs.json("reports/test/run.json")
    _note_flow_run(tracked["run_id"])
    show_run(**tracked)
    show_picture(outputs)
    show_quarantine(outputs)
    judged: State[Any] = judge(tracked["run_id"], promote, return_state=True)
    if not judged.is_completed():
        return Failed(message=f"judge: {judged.message}")
    show_metrics(judged.result())
    return Completed(message=judged.message)


def experiment_name() -> str:
    """The flow run's name, and enough of its id to be the only one; DVC takes few signs."""
    name = re.sub("[^a-z0-9]+", "-", str(runtime.flow_run.name).lower()).strip("-")
    return f"{name}-{str(runtime.flow_run.id)[-4:]}"


def _note_flow_run(run_id: str) -> None:
    """Tells MLflow's run, which DVC may have restored, that this flow run led to it, too."""
    from cnnpipe.registry import note_flow_run  # takes seconds, which a skipped run need not

    try:
        note_flow_run(run_id, str(runtime.flow_run.id))
    except RunFailed as error:
        get_run_logger().warning(f"`cnnpipe trace` will not know of this flow run: {error}")


def uses_gpu(params: Params) -> bool:
    """Whether its training takes the GPU."""
    return params.train.device == "cuda" or (params.train.device == "auto" and has_gpu())


def main() -> int:
    """Runs the flow in the checkout; the exit code."""
    url = PREFECT_API_URL.value() or prefect_api()
    try:
        with urlopen(f"{url}/health", timeout=10):
            pass
    except (URLError, OSError, ValueError):
        print(
            f"cnnpipe: no Prefect server answers at {url}: start one with `cnnpipe up`, "
            "or set PREFECT_API_URL to yours",
            file=sys.stderr,
        )
        return 1
    # A server is required: without one Prefect starts its own for each run and forgets task runs.
    with temporary_settings({PREFECT_API_URL: url, PREFECT_SERVER_ANALYTICS_ENABLED: False}):
        try:
            return 0 if pipeline(in_checkout=True, return_state=True).is_completed() else 1
        except KeyboardInterrupt:
            print("cnnpipe: interrupted", file=sys.stderr)
            return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
