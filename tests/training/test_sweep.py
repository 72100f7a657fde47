"""Hyperparameter sweeps of tiny models: search spaces, trials, resuming, reports."""

import csv
import json
import os
import pathlib
import signal
import subprocess
import sys
from unittest import mock

import keras
import optuna
import pytest

import involution_cli
from involution.training import experiment, sweep
from involution.training.experiment import Config
from involution.training.search_space import Categorical, Interval, SweepConfig
from involution.utils.errors import InputError
from involution_cli import commands
from tests.support.images import write_folder
from tests.training.test_experiment import Recorder

pytestmark = pytest.mark.any_backend

NETWORK = """
import keras

def build(input_shape, classes, width=1, kind="relu"):
    inputs = keras.Input(input_shape)
    x = keras.layers.GlobalAveragePooling2D()(inputs)
    x = keras.layers.Dense(width, activation=kind)(x)
    return keras.Model(inputs, keras.layers.Dense(classes)(x))
"""
SEARCH = ("width=2..40", "learning_rate=0.001..0.1")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "pets")


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    file = tmp_path_factory.mktemp("code") / "network.py"
    file.write_text(NETWORK)
    return str(file)


@pytest.fixture
def make_config(images, network):
    def make(search=SEARCH, trials=3, max_parameters=None, **overrides):
        defaults = {"dataset": str(images), "models": network, "epochs": 2, "batch_size": 10}
        return SweepConfig(Config(**defaults | overrides), search, trials, max_parameters)

    return make


@pytest.fixture
def skip_figures(monkeypatch):
    """Four figures after each trial take longer than these trials."""
    monkeypatch.setattr(sweep, "_figures", lambda *_: {})


def rows(folder):
    return list(csv.DictReader((folder / "trials.csv").read_text().splitlines()))


def values(row):
    return {k: row[k] for k in ("width", "learning_rate") if k in row}


def test_search_space_is_parsed(make_config):
    config = make_config(search=("width=3,5-6, 7", "learning_rate=1e-3..0.1", "batch_size=4..8"))
    assert config.space == {
        "width": Categorical(("3", "5-6", "7")),
        "learning_rate": Interval(0.001, 0.1),
        "batch_size": Interval(4, 8),
    }


@pytest.mark.parametrize(
    "text",
    [
        "width",
        "width=",
        "=3",
        "a b=3",
        "width=3..",
        "width=3..3",
        "width=5..3",
        "learning_rate=0..1.5",
        "learning_rate=0.1..inf",
        "learning_rate=0.1..True",
    ],
)
def test_invalid_search_space_is_rejected(text, make_config):
    with pytest.raises(InputError, match=r"name=a,b,c or name=low\.\.high.* Received: "):
        make_config(search=(text,))


def test_invalid_sweep_settings_are_rejected(make_config, network):
    with pytest.raises(InputError, match="contain each name once"):
        make_config(search=("width=1,2", "width=3,4"))
    with pytest.raises(InputError, match="vary at least one value"):
        make_config(search=())
    with pytest.raises(InputError, match=r"An option of .* must be one of .* depth=0"):
        make_config(search=("depth=1,2",))
    with pytest.raises(InputError, match="A sweep must have one model"):
        make_config(models=f"inn,{network}")
    with pytest.raises(InputError, match=r"`trials` must be at least 1\. Received: 0"):
        make_config(trials=0)


@pytest.mark.parametrize(
    ("text", "received"),
    [
        ("learning_rate=0.001,0.003x", "`learning_rate` must be numbers. Received: 0.003x"),
        ("learning_rate=0.1,1-2", r"`learning_rate` must be numbers. Received: \(1, 2\)"),
        ("weight_decay=0.1,True", "`weight_decay` must be numbers. Received: True"),
        ("weight_decay=0.1,-1", "`weight_decay` must be at least 0 and finite. Received: -1"),
        ("batch_size=32.0,64", "`batch_size` must be integers. Received: 32.0"),
        ("batch_size=8..32.5", "`batch_size` must be integers. Received: 32.5"),
        ("batch_size=0..8", "`batch_size` must be at least 1. Received: 0"),
    ],
)
def test_invalid_hyperparameter_values_are_rejected(text, received, make_config):
    with pytest.raises(InputError, match=received):
        make_config(search=(text,))


@pytest.mark.long
def test_largest_seed_is_accepted(make_config, tmp_path, skip_figures):
    config = make_config(seed=2**32 - 1, trials=1, epochs=1)
    assert sweep.run(config, tmp_path).trials == 1


def test_folder_without_a_sweep_is_rejected(make_config, tmp_path):
    (tmp_path / "report.html").write_text("of a run")
    for url in (None, f"sqlite:///{tmp_path / 'study.db'}"):
        with pytest.raises(
            InputError, match=r"must be new, empty or the folder of a sweep\. Received: .*, wit"
        ):
            sweep.run(make_config(), tmp_path, url)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.long
def test_out_of_memory_fails_only_the_trial(make_config, tmp_path, monkeypatch, skip_figures):
    errors = {4: MemoryError("Unable to allocate 5 GiB"), 5: RuntimeError("of another kind")}
    trainer = sweep.Trainer

    def failing_trainer(model, *rest):
        error = errors.get(model.layers[-2].units)
        if error is not None:
            raise error
        return trainer(model, *rest)

    monkeypatch.setattr(sweep, "Trainer", failing_trainer)
    console = Recorder()

    def search(widths):
        config = make_config(search=(f"width={widths}",), trials=9, epochs=1)
        return sweep.run(config, tmp_path / "run", progress=console).trials

    with pytest.raises(RuntimeError, match="of another kind"):
        search("3,4,5,6")
    # Resuming does not repeat the trial.
    assert search("3,4,5,6") == 2
    assert {row["width"] for row in rows(tmp_path / "run")} == {"3", "6"}
    oom_lines = [line for line in console.lines if "out of memory: Unable to all" in line]
    assert len(oom_lines) == 1


@pytest.mark.long
def test_passwords_are_redacted(make_config, tmp_path, skip_figures):
    url = "nonsense://me:s3cret@host/name"
    with pytest.raises(InputError, match=r"Received: nonsense://me:\*\*\*@host/name") as error:
        sweep.run(make_config(), tmp_path, url)
    assert "s3cret" not in str(error.value)
    for text in (f"involution sweep --study {url}", "x://host/name", None):
        redacted = sweep._redact_password(text or "", url if text else None)
        assert redacted == (text or "").replace("s3cret", "***")


@pytest.mark.long
def test_sweep_writes_trials_and_report(make_config, images, network, tmp_path):
    console = Recorder()
    config = make_config(trials=4, recipe="one-cycle")
    result = sweep.run(
        config, tmp_path / "new" / "folder", progress=console, command="involution sweep"
    )
    folder = tmp_path / "new" / "folder"
    found = rows(folder)
    assert result.trials == len(found) == 4
    assert result.exit_code == 0
    accuracies = [float(r["accuracy"]) for r in found if r["state"] == "complete"]
    assert result.accuracy == pytest.approx(max(accuracies), abs=1e-4)
    assert accuracies == sorted(accuracies, reverse=True)
    assert values(found[0]) == {k: str(v) for k, v in result.best.items()}
    for row in found:
        width = int(row["width"])
        assert int(row["parameters"]) == 3 * width + width + 3 * width + 3
        assert 0.001 <= float(row["learning_rate"]) <= 0.1
    page = (folder / "report.html").read_text()
    # 2 of the 24 training images are held out.
    assert "on the 2 training" in page.replace("\n", " ")
    assert page.count("data:image/png;base64,") >= 2
    assert sum("accuracy" in line for line in console.lines) == 4
    command = config.command(result.best)
    assert command.replace("&#39;", "'") in page.replace("&#39;", "'")
    function, bound, _ = involution_cli.app.parse_args(
        command.split()[1:], exit_on_error=False, print_error=False
    )
    assert function is commands.train
    options = bound.arguments["training"]
    assert bound.arguments["model"] == f"{network}:width={result.best['width']}"
    assert options.learning_rate == result.best["learning_rate"]
    assert (options.dataset, options.recipe, options.batch_size) == (str(images), "one-cycle", 10)
    assert options.validation_images is None
    assert options.backend == keras.config.backend()


@pytest.mark.parametrize(
    ("accuracies", "widths", "figure_count"),
    [
        ((0.5,), (3,), 0),
        ((0.5, 0.5, 0.5), (3, 4, 5), 2),  # equal accuracies
        ((0.5, 0.6, 0.7), (3, 3, 3), 2),  # equal parameters
        ((0.5, 0.6, 0.7), (3, 4, 5), 4),
    ],
)
def test_study_figures(accuracies, widths, figure_count):
    study = optuna.create_study(direction="maximize")
    distributions = {
        "width": optuna.distributions.IntDistribution(2, 9),
        "kind": optuna.distributions.CategoricalDistribution(("relu", "silu")),
    }
    for accuracy, width in zip(accuracies, widths, strict=True):
        trial = optuna.trial.create_trial(
            params={"width": width, "kind": "silu"},
            distributions=distributions,
            value=accuracy,
            intermediate_values={1: 0.1, 2: accuracy},
        )
        study.add_trial(trial)
    figures = sweep._figures(study, study.trials)
    assert len(figures) == figure_count
    assert all(f.startswith("data:image/png;base64,") for f in figures.values())


@pytest.mark.long
def test_sweep_resumes_unless_settings_changed(make_config, tmp_path, skip_figures):
    sweep.run(make_config(trials=2), tmp_path)
    first = rows(tmp_path)
    console = Recorder()
    assert sweep.run(make_config(trials=2), tmp_path, progress=console).trials == 2
    assert not any(label.startswith("trial") for label, _ in console.totals)
    sweep.run(make_config(trials=5), tmp_path)
    later = {r["trial"]: r for r in rows(tmp_path)}
    assert len(later) == 5
    assert all(later[r["trial"]] == r for r in first)
    # `download` does not affect results, so the study does not record it.
    assert sweep.run(make_config(trials=5, download=True), tmp_path).trials == 5
    with pytest.raises(InputError, match="Received: `epochs` was 2 and is 3"):
        sweep.run(make_config(epochs=3), tmp_path)
    assert len(rows(tmp_path)) == 5


@pytest.mark.long
def test_trials_are_distinct_until_the_space_is_exhausted(make_config, tmp_path, skip_figures):
    console = Recorder()
    config = make_config(search=("width=2,3", "kind=relu,tanh"), trials=30, epochs=1)
    assert sweep.run(config, tmp_path, progress=console).trials == 4
    assert {(r["width"], r["kind"]) for r in rows(tmp_path)} == {
        (w, k) for w in "23" for k in ("relu", "tanh")
    }
    assert "exhausted" in console.lines[-1]


@pytest.mark.long
def test_oversized_and_invalid_models_are_skipped(make_config, tmp_path, monkeypatch, skip_figures):
    build = mock.Mock(wraps=experiment.build)
    monkeypatch.setattr(experiment, "build", build)
    # Models have 7 * width + 3 parameters; the activation `nothing` does not exist.
    config = make_config(
        search=("width=4,5,6", "kind=relu,nothing"), trials=9, max_parameters=38, epochs=1
    )
    sweep.run(config, tmp_path)
    # A model that is proposed again is not rebuilt.
    labels = [call.args[0] for call in build.call_args_list]
    assert len(labels) == len(set(labels))
    assert sorted((r["width"], r["kind"]) for r in rows(tmp_path)) == [("4", "relu"), ("5", "relu")]
    assert "proposals were not tried" in (tmp_path / "report.html").read_text()


@pytest.mark.long
def test_indivisible_batch_sizes_are_skipped(make_config, tmp_path, skip_figures):
    # 22 training images: 2 of the 24 are held out.
    config = make_config(
        search=("batch_size=4,6,8,24",),
        models="cnn",
        trials=4,
        epochs=1,
        gradient_accumulation_steps=4,
    )
    sweep.run(config, tmp_path)
    assert sorted(r["batch_size"] for r in rows(tmp_path)) == ["4", "8"]


@pytest.mark.long
def test_interrupted_trial_is_requeued(make_config, tmp_path, skip_figures):
    class Interrupting(Recorder):
        def advance(self):
            super().advance()
            if self.steps == 36 + 7 + 3:
                raise KeyboardInterrupt

    console = Interrupting()
    assert sweep.run(make_config(), tmp_path, progress=console).exit_code == 130
    started = [line for line in console.lines if "width" in line]
    again = Recorder()
    assert sweep.run(make_config(), tmp_path, progress=again).trials == 3
    repeated = [line for line in again.lines if "width" in line]
    # The trial is repeated with the same values.
    assert started[-1].split(": ")[1] == repeated[0].split(": ")[1]
    assert len({tuple(values(r).items()) for r in rows(tmp_path)}) == 3


PROCESS = """
import os, signal, sys
from involution.training import sweep
from involution.training.recipes import Config
from involution.utils.progress import NullProgress

class Console(NullProgress):
    steps = 0
    def advance(self):
        self.steps += 1
        if self.steps == {killed_at}:
            os.kill(os.getpid(), signal.SIGKILL)
    def log(self, text):
        print(text, flush=True)

config = Config({images!r}, {network!r}, epochs=2, batch_size=10)
sweep.run(sweep.SweepConfig(config, {search!r}, 6), {folder!r}, {url!r}, Console())
"""


def start_process(folder, images, network, killed_at=0, url=None):
    code = PROCESS.format(
        images=str(images),
        network=network,
        search=SEARCH,
        folder=str(folder),
        killed_at=killed_at,
        url=url,
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="dead processes are detected on POSIX only")
@pytest.mark.parametrize("storage", ["journal", pytest.param("database", marks=pytest.mark.slow)])
def test_processes_share_a_study_and_repeat_a_killed_trial(storage, images, network, tmp_path):
    url = None if storage == "journal" else f"sqlite:///{tmp_path / 'study.db'}"
    killed = start_process(tmp_path, images, network, killed_at=36 + 3, url=url)
    other = start_process(tmp_path, images, network, url=url)
    killed_output = killed.communicate()[0]
    assert killed.returncode == -signal.SIGKILL
    lost_values = killed_output.splitlines()[-1].split(": ")[1]
    restarted = start_process(tmp_path, images, network, url=url)
    output = other.communicate()[0] + restarted.communicate()[0]
    assert (other.returncode, restarted.returncode) == (0, 0)
    assert output.count("died: the trial will be repeated") == 1
    assert sum(lost_values in line for line in output.splitlines()) == 1
    found = rows(tmp_path)
    assert len(found) == 6
    assert len({tuple(values(r).items()) for r in found}) == 6


@pytest.mark.long
def test_unreadable_study_is_rejected(make_config, tmp_path):
    for url in ("nonsense", f"sqlite:///{tmp_path}/no/folder/study.db", "postgres://host/name"):
        with pytest.raises(InputError, match=r"A study must be a readable journal .* Received: "):
            sweep.run(make_config(), tmp_path / "run", url)
    (tmp_path / "run" / sweep.JOURNAL).write_text(json.dumps({"not": "a journal"}) + "\n")
    with pytest.raises(InputError, match="A study must be a readable journal"):
        sweep.run(make_config(), tmp_path / "run")


@pytest.mark.long
def test_sweep_command_writes_its_files(make_config, images, network, tmp_path, capfd):
    folder = pathlib.Path(tmp_path, "run")
    arguments = ["sweep", *SEARCH, "--model", network, "--trials", "2", "--epochs", "1"]
    arguments += ["--dataset", str(images), "--output", str(folder)]
    involution_cli.app(
        arguments, exit_on_error=False, print_error=False, result_action="return_value"
    )
    output = capfd.readouterr().out
    assert f"Report: {folder / 'report.html'}" in output
    assert "involution train" in output
    assert {f.name for f in folder.iterdir()} == {
        "log.txt",
        "report.html",
        "study.journal",
        "trials.csv",
    }
