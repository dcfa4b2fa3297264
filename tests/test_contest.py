"""A candidate against the champion: real models of a few digits, in a real MLflow store."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pytest
from ruamel.yaml import YAML

from cnnpipe import cli, contest, mlflow_store, records, registry, tracking
from cnnpipe.errors import UserError
from cnnpipe.evaluation import promotion
from cnnpipe.network.classifier import Classifier
from cnnpipe.params import Params, load
from cnnpipe.registry import Version
from cnnpipe.stages import download, evaluate, resize, split, train

SETTINGS: dict[str, dict[str, Any]] = {
    "download": {"source": "digits", "limit_per_class": 40},
    "resize": {"size": 8, "color": "grey", "workers": 1},
    "split": {"val": 0.2, "test": 0.4},
    "model": {"filters": 4, "kernel_size": 3},
    "train": {"epochs": 1, "batch_size": 32, "learning_rate": 0.0001, "device": "cpu"},
}
GOOD = {"train": {"epochs": 12, "learning_rate": 0.02}}


def settings(**changes: dict[str, Any]) -> Params:
    content = {name: dict(section) for name, section in SETTINGS.items()}
    for name, section in changes.items():
        content.setdefault(name, {}).update(section)
    YAML(typ="safe").dump(content, Path("params.yaml"))
    return load("params.yaml")


def made(folder: Path, stages: list[Any], **changes: dict[str, Any]) -> Version:
    os.chdir(folder)
    params = settings(**changes)
    for stage in stages:
        stage.run(params)
    return registry.versions()[0]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Version]]:
    """Versions of the model, and in the current folder the data of the last.

    bad, good: on the same test images. other: likewise good, on other test images. larger: on the
    same as other, which are larger.
    """
    folder = tmp_path_factory.mktemp("models")
    before = Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DVC_ROOT", "DVC_EXP_NAME", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        fit = [train, evaluate]
        yield {
            "bad": made(folder, [download, resize, split, *fit]),
            "good": made(folder, fit, **GOOD),
            "larger": made(folder, [resize, split, *fit], base={"seed": 1}, resize={"size": 10},
                           **GOOD),
            "other": made(folder, [resize, split, *fit], base={"seed": 1}, **GOOD),
        }  # fmt: skip
    os.chdir(before)


@pytest.fixture(autouse=True)
def _no_champion(models: dict[str, Version], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DVC_ROOT", "DVC_EXP_NAME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    mlflow_store.connect()
    client().delete_registered_model_alias(registry.MODEL_NAME, registry.CHAMPION)
    client().set_registered_model_tag(registry.MODEL_NAME, registry._HISTORY, "")


def client() -> mlflow.MlflowClient:
    return mlflow.MlflowClient(mlflow_store.address(), mlflow_store.address())


def champion() -> int | None:
    there = registry.champion()
    return there and there.number


def promote(
    version: Version | str | None, dry_run: bool = False, force: bool = False, **rules: Any
) -> contest.Outcome:
    name = str(version.number) if isinstance(version, Version) else version
    return contest.promote(name, settings(promote=rules), dry_run, force)


def tags_of(version: Version) -> dict[str, str]:
    found = registry.find_version(version.uri)
    assert found is not None
    return dict(found.tags)


@contextmanager
def other_classes(version: Version, names: list[str]) -> Iterator[None]:
    before = version.tags["class_names"]
    registry.record(version, {"class_names": json.dumps(names)})
    try:
        yield
    finally:
        registry.record(version, {"class_names": before})


def test_a_version_says_what_its_run_measured_and_where_it_came_from(
    models: dict[str, Version],
) -> None:
    version = models["good"]
    run = client().get_run(version.run_id)
    for key in ("test/accuracy", "test/f1", "test/log_loss", "model/parameters"):
        assert float(version.tags[key]) == pytest.approx(run.data.metrics[key], abs=1e-6)
    for key in ("test_hash", "data_hash", "model_sha256"):
        assert version.tags[key] == run.data.tags[key]
    assert json.loads(version.tags["class_names"]) == [str(i) for i in range(10)]
    file = registry.find_model_file(version.uri)
    assert registry.sha256(file) == version.tags["model_sha256"]
    description = client().get_model_version(registry.MODEL_NAME, str(version.number)).description
    accuracy = f"test accuracy {run.data.metrics['test/accuracy']:.3f} ("
    assert description.startswith(accuracy) and "parameters" in description


def test_a_version_whose_tags_were_cut_off_is_completed_and_not_made_again(
    models: dict[str, Version],
) -> None:
    version = models["good"]
    for key in ("test/accuracy", "class_names", "data_hash"):
        client().delete_model_version_tag(registry.MODEL_NAME, str(version.number), key)
    client().update_model_version(registry.MODEL_NAME, str(version.number), "")
    number = len(registry.versions())
    file = registry.find_model_file(version.uri)
    with tracking.reopen_run(version.run_id, "x") as run:
        run.log_model(file, Classifier.load(file).class_names)
    assert len(registry.versions()) == number
    again = registry.find_version(str(version.number))
    assert again is not None and again.tags == version.tags
    found = client().get_model_version(registry.MODEL_NAME, str(version.number))
    assert found.description.startswith("test accuracy")


def test_the_first_candidate_becomes_the_champion(models: dict[str, Version]) -> None:
    dry = promote(models["bad"], dry_run=True)
    assert (dry.decision.promote, dry.moved, champion()) == (True, False, None)
    outcome = promote(models["bad"])
    assert (outcome.decision.promote, outcome.moved, outcome.champion) == (True, True, None)
    assert outcome.decision.reason == "there was no champion to compare it with"
    assert champion() == models["bad"].number
    again = promote(models["bad"])
    assert (again.decision.promote, again.moved) == (False, False)
    assert "is the champion already" in again.decision.reason


def test_what_is_better_beyond_luck_is_promoted_and_the_decision_is_recorded(
    models: dict[str, Version],
) -> None:
    promote(models["bad"])
    outcome = promote(models["good"])
    assert outcome.moved and outcome.same_test_set and outcome.evidence
    assert champion() == models["good"].number
    table = records.read_predictions(models["good"].run_id)
    assert table is not None
    assert outcome.evidence.counts.num_images == table["sha256"].nunique() > 100
    tags = registry.versions()[-2].tags
    assert tags["promotion"].startswith(
        "promoted: it is better than the champion, by more than luck explains"
    )
    assert tags["promotion_at"] <= tags["promoted_at"]


def test_what_is_not_better_is_kept_and_says_why(models: dict[str, Version]) -> None:
    promote(models["good"])
    outcome = promote(models["bad"])
    assert not outcome.decision.promote and not outcome.moved
    assert "it is worse than the champion, by more than luck explains" in outcome.decision.reason
    assert champion() == models["good"].number
    tags = registry.versions()[-1].tags
    assert tags["promotion"].startswith("kept the champion: it is worse")


def test_a_dry_run_decides_and_changes_nothing(models: dict[str, Version]) -> None:
    promote(models["bad"])
    before = [version.tags for version in registry.versions()]
    for version in (models["good"], models["other"]):
        outcome = promote(version, dry_run=True)
        assert outcome.decision.promote and not outcome.moved
    assert champion() == models["bad"].number
    assert [version.tags for version in registry.versions()] == before
    assert client().list_artifacts(models["other"].run_id, "promotion") == []


def test_rolling_back_goes_one_champion_back_each_time(models: dict[str, Version]) -> None:
    with pytest.raises(UserError, match="there is no champion yet"):
        contest.roll_back(dry_run=False)
    numbers = [models[name].number for name in ("bad", "good", "other")]
    for version in ("bad", "good", "other", "bad"):
        registry.crown(models[version])
    assert [v.number for v in contest.roll_back(dry_run=True)] == [numbers[2], numbers[0]]
    assert champion() == numbers[0]
    for expected in (numbers[2], numbers[1], numbers[0]):
        assert contest.roll_back(dry_run=False)[0].number == expected
        assert champion() == expected
    with pytest.raises(UserError, match=f"version {numbers[0]} is the first champion"):
        contest.roll_back(dry_run=False)
    registry.crown(models["good"])  # and on from there
    assert contest.roll_back(dry_run=False)[0].number == numbers[0]


def test_rolling_back_knows_of_an_alias_that_was_moved_by_hand(models: dict[str, Version]) -> None:
    registry.crown(models["bad"])
    by_hand = str(models["good"].number)
    client().set_registered_model_alias(registry.MODEL_NAME, registry.CHAMPION, by_hand)
    registry.crown(models["other"])
    assert contest.roll_back(dry_run=False)[0].number == models["good"].number
    assert contest.roll_back(dry_run=False)[0].number == models["bad"].number


@pytest.mark.parametrize("broken", ["crown", "roll_back"])
def test_who_is_killed_half_way_leaves_what_can_be_rolled_back(
    models: dict[str, Version], broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bad", "good"):
        registry.crown(models[name])
    done: list[str] = []

    def once(write: Any) -> Any:
        def written(*arguments: object) -> None:
            if done:
                raise SystemExit
            write(*arguments)
            done.append(write.__name__)

        return written

    with monkeypatch.context() as patch:  # after the first of two writes, whichever that is
        for room, name in [(registry, "_remember"),
                           (mlflow.MlflowClient, "set_registered_model_alias")]:  # fmt: skip
            patch.setattr(room, name, once(getattr(room, name)))
        with pytest.raises(SystemExit):
            registry.crown(models["other"]) if broken == "crown" else registry.roll_back(False)
    assert len(done) == 1
    if broken == "crown":
        assert champion() == models["other"].number
        assert contest.roll_back(dry_run=False)[0].number == models["good"].number
    assert contest.roll_back(dry_run=False)[0].number == models["bad"].number


def test_a_champion_of_other_test_images_is_tested_again_on_the_candidates(
    models: dict[str, Version],
) -> None:
    promote(models["bad"])
    outcome = promote(models["other"])
    assert outcome.moved and not outcome.same_test_set
    assert outcome.champion and outcome.evidence
    ours = records.read_predictions(models["other"].run_id)
    learned = records.read_images(models["bad"].run_id)
    assert ours is not None and learned is not None
    seen = set(learned.loc[learned["split"] != "test", "sha256"]) & set(ours["sha256"])
    assert 0 < len(seen) < len(ours)
    assert outcome.evidence.counts.num_images == len(set(ours["sha256"]) - seen)
    assert any(f"it has learned from {len(seen):,} of them" in note for note in outcome.notes)
    # What it says now of an image is what it said of it when it was evaluated.
    told = records.read_predictions(models["bad"].run_id)
    now = outcome.champion.run.predictions
    assert told is not None and now is not None
    both = told.merge(now, on="sha256")
    assert len(both) > 20 and (both["prediction_x"] == both["prediction_y"]).all()
    assert outcome.champion.run.metrics["test/num_images"] == len(now)
    name = f"promotion/champion-{models['bad'].number}.csv"
    assert [f.path for f in client().list_artifacts(models["other"].run_id, "promotion")] == [name]


def test_a_champion_of_another_size_is_tested_on_the_raw_images(
    models: dict[str, Version],
) -> None:
    promote(models["larger"])
    outcome = promote(models["other"], dry_run=True)
    # The same images and seed: nothing but the size is another, so it is not tested again.
    assert outcome.same_test_set and not outcome.notes
    client().set_tag(models["larger"].run_id, "test_hash", "another")
    try:
        again = promote(models["other"], dry_run=True)
    finally:
        client().set_tag(models["larger"].run_id, "test_hash", models["larger"].tags["test_hash"])
    assert not again.same_test_set
    assert again.evidence == outcome.evidence  # to the image


def test_test_images_that_are_not_here_are_said_to_be_elsewhere(
    models: dict[str, Version],
) -> None:
    promote(models["other"])
    registry.record(models["good"], {"dvc_experiment": "dusty-dory"})
    for folder in ("data/raw", "data/resized"):
        shutil.move(folder, f"{folder}.away")
    try:
        hint = f"brings them back; `cnnpipe promote {models['good'].number} --force` promotes it"
        with pytest.raises(UserError, match=f"`dvc exp apply dusty-dory` {hint}"):
            promote(models["good"])
        assert champion() == models["other"].number
        assert promote(models["good"], force=True).moved
    finally:
        for folder in ("data/raw", "data/resized"):
            shutil.move(f"{folder}.away", folder)
    assert champion() == models["good"].number
    reason = tags_of(models["good"])["promotion"]
    assert reason.startswith("promoted: the decision is forced, although they cannot be compared: ")
    assert "its test images are neither in this folder nor in DVC's cache" in reason
    assert "--force" not in reason


def test_test_images_of_another_commit_come_from_dvcs_cache(models: dict[str, Version]) -> None:
    promote(models["other"])
    expected = promote(models["good"], dry_run=True)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test"]
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"], ["dvc", "add", "-q", "data/raw"],
                    [*git, "add", "data", ".dvc"], [*git, "commit", "-qm", "data"]):  # fmt: skip
        subprocess.run(command, check=True)
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip()
    registry.record(models["good"], {"git_commit": commit, "dvc_experiment": "no-such-experiment"})
    for folder in ("data/raw", "data/resized"):
        shutil.move(folder, f"{folder}.away")
    try:
        outcome = promote(models["good"], dry_run=True)
    finally:
        for folder in ("data/raw", "data/resized"):
            shutil.move(f"{folder}.away", folder)
    assert expected.notes and outcome.notes == expected.notes
    assert outcome.evidence == expected.evidence


def test_models_of_other_classes_are_not_compared(models: dict[str, Version]) -> None:
    promote(models["bad"])
    ours = [str(i) for i in range(10)]
    hint = f"; `cnnpipe promote {models['good'].number} --force` promotes it without a comparison"
    for names, only in [
        ([*ours[:9], "nine"], "only the candidate has nine, only the champion has 9"),
        ([*ours, "ten"], "only the candidate has ten"),
        (ours[:3], "only the champion has 3, 4, 5, 6, 7 and 2 more"),
    ]:
        with other_classes(models["good"], names):
            outcome = promote(models["good"])
        assert not outcome.decision.promote and not outcome.moved
        reason = f"they cannot be compared: their classes are not the same: {only}{hint}"
        assert outcome.decision.reason == reason
    assert champion() == models["bad"].number


def test_force_promotes_what_cannot_be_compared_and_rolling_back_undoes_it(
    models: dict[str, Version], capsys: pytest.CaptureFixture[str]
) -> None:
    bad, good = models["bad"].number, models["good"].number
    promote(models["bad"])
    before = tags_of(models["good"])
    with other_classes(models["good"], ["cat", "dog"]):
        assert cli._command(["promote", str(good), "--force", "--dry-run"]) == 0
        line = f"promoted: version {good} would be the champion (dry run): the decision is forced, "
        assert f"\n{line}although they cannot be compared: " in capsys.readouterr().out
        assert champion() == bad
        assert cli._command(["promote", str(good), "--force", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["decision"], content["moved"]) == ("promote", True)
    assert "forced, although they cannot be compared: their classes are not" in content["reason"]
    assert "--force" not in content["reason"]
    assert champion() == good
    after = tags_of(models["good"])
    assert after["promotion"] == f"promoted: {content['reason']}" != before.get("promotion")
    assert contest.roll_back(dry_run=False)[0].number == bad
    with pytest.raises(UserError, match="--rollback takes no --force"):
        cli._command(["promote", "--rollback", "--force"])


def test_force_promotes_against_the_rules_and_says_nothing_where_they_agree(
    models: dict[str, Version],
) -> None:
    promote(models["bad"])
    assert "forced" not in promote(models["good"], force=True).decision.reason
    outcome = promote(models["bad"], force=True)
    assert outcome.moved and champion() == models["bad"].number
    forced = (
        "the decision is forced, although it is worse than the champion, by more than luck explains"
    )
    assert outcome.decision.reason.startswith(forced) and outcome.evidence is not None
    again = promote(models["bad"], force=True)
    assert not again.moved and "is the champion already" in again.decision.reason


def test_force_replaces_a_champion_whose_run_was_deleted(models: dict[str, Version]) -> None:
    promote(models["bad"])
    client().delete_run(models["bad"].run_id)
    try:
        with pytest.raises(UserError, match=r"the run was deleted: .* --force` promotes it"):
            promote(models["good"])
        assert champion() == models["bad"].number
        outcome = promote(models["good"], force=True)
    finally:
        client().restore_run(models["bad"].run_id)
    assert outcome.moved and champion() == models["good"].number
    assert "forced, although they cannot be compared: version" in outcome.decision.reason
    # What was its test is known all the same.
    assert outcome.champion is not None
    accuracy = client().get_run(models["bad"].run_id).data.metrics["test/accuracy"]
    assert outcome.champion.run.accuracy == pytest.approx(accuracy, abs=1e-6)
    assert f"{accuracy:.3f}" in promotion.as_text(outcome)
    assert contest.roll_back(dry_run=False)[0].number == models["bad"].number


def test_the_candidate_is_the_run_of_this_folder_or_what_is_named(
    models: dict[str, Version],
) -> None:
    other, good = models["other"], models["good"]
    client().update_run(good.run_id, name="by its name")
    for name, expected in [
        (None, other), (str(good.number), good), (good.uri, good), ("by its name", good),
        (good.run_id, good), (good.run_id[:8], good), ("models:/cnnpipe/latest", other),
    ]:  # fmt: skip
        assert promote(name, dry_run=True).candidate.version == expected.number
    promote(good)
    assert promote("models:/cnnpipe@champion", dry_run=True).candidate.version == good.number
    for name, message in [
        ("99", "99: no such version or run: the last version is 4"),
        ("models:/cnnpipe/99", "no such version: the last is 4"),
        ("models:/cnnpipe@nobody", "no such version"), ("models:/else/1", "no version of cnnpipe"),
        ("nobody", "nobody: no such run"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            promote(name)
    client().update_run(good.run_id, name="99")  # a name is a name
    assert promote("99", dry_run=True).candidate.version == good.number


def test_an_address_of_no_version_says_so_in_one_clean_sentence(models: dict[str, Version]) -> None:
    for name, end in [("models:/cnnpipe@champion", "; `cnnpipe promote` sets it"),
                      ("models:/cnnpipe@nobody", "")]:  # fmt: skip
        with pytest.raises(UserError) as error:
            registry.find_model_version(name)
        assert str(error.value).endswith(f"alias {name.split('@')[1]} not found{end}")


def test_the_rules_are_those_of_params_yaml(models: dict[str, Version]) -> None:
    promote(models["bad"])
    outcome = promote(models["good"], alpha=None)
    assert not outcome.moved and "promote.alpha being null" in outcome.decision.reason


def test_the_command_prints_a_few_lines_or_one_object_and_ends_with_0(
    models: dict[str, Version], capsys: pytest.CaptureFixture[str]
) -> None:
    settings()
    bad, good = (str(models[name].number) for name in ("bad", "good"))
    assert cli._command(["promote", bad, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["champion"] is None
    assert cli._command(["promote", good, "--json", "--dry-run"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["decision"], content["moved"]) == ("promote", False)
    assert content["same_test_set"] and content["mcnemar_p"] < 0.05 < content["difference"]
    assert content["champion"]["version"] == int(bad)
    assert cli._command(["promote", good]) == 0
    text = capsys.readouterr().out
    assert f"promoted: version {good} is the champion now: it is better" in text
    assert len(text.splitlines()) < 15
    assert cli._command(["promote", bad]) == 0
    assert f"kept: version {good} stays the champion: it is worse" in capsys.readouterr().out
    assert cli._command(["promote", "--rollback"]) == 0
    line = f"version {bad} is the champion again, instead of version {good}"
    assert capsys.readouterr().out.strip() == line
    with pytest.raises(UserError, match="--rollback takes no run"):
        cli._command(["promote", "1", "--rollback"])


@pytest.mark.parametrize("known", [True, False])
def test_a_champion_that_may_have_learned_from_all_the_images_is_no_fair_one(
    models: dict[str, Version], monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    promote(models["bad"])
    table = records.read_predictions(models["other"].run_id)
    assert table is not None
    images = table.assign(split="train") if known else None
    monkeypatch.setattr(records, "read_images", lambda run_id: images)
    outcome = promote(models["other"], dry_run=True)
    text, content = promotion.as_text(outcome), promotion.as_dict(outcome)
    if known:
        assert not outcome.decision.promote and content["num_images"] == 0
        assert "has learned from all of the candidate's test images" in text
        assert "--force` promotes it without a comparison" in text
        assert content["champion"]["metrics"]["test/accuracy"] is None
    else:
        assert outcome.decision.promote and content["num_images"] == table["sha256"].nunique()
        assert "note: whether it has learned from some of them is not known" in text
