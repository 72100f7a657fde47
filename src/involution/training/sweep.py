"""Hyperparameter search with Optuna: processes that share one study, in a resumable folder.

Each process runs one trial after another until the study has the requested number. Before each
trial a process detects the trials of killed processes, which are repeated.
"""

import contextlib
import dataclasses
import datetime
import functools
import math
import os
import pathlib
import socket
import time
import urllib.parse
import warnings

from involution.models import specs
from involution.training import experiment
from involution.training.interrupts import exit_code, graceful_shutdown
from involution.training.recipes import current_name, stored
from involution.training.run_folder import make_folder
from involution.training.search_space import SweepConfig
from involution.training.trainer import DivergenceError, Trainer, images_per_epoch
from involution.utils.atomic_files import TMP_PREFIX, csv_text, write_text
from involution.utils.errors import InputError, one_line, out_of_memory_reason
from involution.utils.progress import NullProgress
from involution.visualize import html

try:
    import optuna
    from matplotlib import pyplot
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
    from optuna.trial import TrialState
    from optuna.visualization import matplotlib as plots
except ImportError as error:
    raise InputError(
        "A sweep requires Optuna: pip install 'involution[sweep]'. "
        f"Received: no module {error.name}"
    ) from error

__all__ = ["SweepConfig", "SweepResult", "run", "write_report"]

TEMPLATE = pathlib.Path(__file__).with_name("sweep.html.j2")

JOURNAL, TRIALS = "study.journal", "trials.csv"
STUDY_NAME = "involution"
# Trials that count towards the requested number.
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
# Consecutive rejected proposals after which the search space counts as exhausted.
MAX_REJECTIONS = 50
# Keys of user attributes, which studies store.
REJECTED, FAILED, WORKER, CONFIG = "refused", "failed", "worker", "plan"


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """The state of a study at the end of a process.

    Attributes:
        best: Values of the best complete trial; None: there is none.
        accuracy: Its accuracy on the held-out images.
        trials: Number of complete and pruned trials.
        exit_code: 0, or 128 plus the number of the signal that interrupted the sweep.
    """

    best: dict | None
    accuracy: float | None
    trials: int
    exit_code: int


def run(sweep, folder, study_url=None, progress=None, command="") -> SweepResult:
    """Runs trials until the study has the requested number, with a report after each.

    The folder gets study.journal, unless the study is in a database, trials.csv and report.html.
    Any number of processes may share a folder or a database. An interruption (Ctrl-C) requeues the
    current trial.

    Args:
        sweep: The search. For an existing study all but the number of trials must be unchanged.
        folder: The folder, new or of the same search.
        study_url: Database URL in the format of SQLAlchemy; None: a journal in the folder.
        progress: Receives progress; None: none is reported.
        command: The command line, for the report.

    Returns:
        The best complete trial so far, and how the sweep ended.

    Raises:
        InputError: An argument is invalid.
    """
    progress = progress or NullProgress()
    folder = pathlib.Path(folder)
    dataset = experiment.load(sweep.config, progress)
    if sweep.config.validation_images is None:
        dataset = dataset.validation_split(max(len(dataset.x_train) // 10, 1))
    _check_folder(folder, study_url)
    make_folder(folder)
    study = _open(sweep, folder, study_url)
    command = _redact_password(command, study_url)
    rejected: dict[tuple, str] = {}
    rejections, code = 0, 0
    with graceful_shutdown(progress) as on_step:
        try:
            while rejections < MAX_REJECTIONS and _needs_trial(study, sweep, progress):
                trial, model = study.ask(), None
                rejections += 1
                with _finish_or_requeue(study, trial, progress):
                    model = _build_trial(study, sweep, trial, dataset, rejected)
                    if model is not None:
                        rejections = 0
                        _run_trial(study, sweep, trial, model, dataset, progress, on_step)
                if model is not None:
                    write_report(study, sweep, dataset, folder, command)
            if rejections == MAX_REJECTIONS:
                progress.log(
                    f"{MAX_REJECTIONS} consecutive proposals were duplicates or invalid: the "
                    "search space seems to be exhausted."
                )
        except KeyboardInterrupt as interrupt:
            code = exit_code(interrupt)
            progress.end()
            progress.log("Interrupted: the current trial will be repeated.")
    write_report(study, sweep, dataset, folder, command)
    trials = _finished(study)
    best = trials[0] if trials and trials[0].state == TrialState.COMPLETE else None
    return SweepResult(best and best.params, best and best.value, len(trials), code)


# --- Trials --------------------------------------------------------------------------------------


def _redact_password(text, url) -> str:
    """The text without the password of a database URL, if there is one."""
    password = urllib.parse.urlsplit(url or "").password
    return text.replace(f":{password}@", ":***@") if password else text


def _check_folder(folder, url):
    """Raises InputError if the folder contains anything but a sweep, such as a run."""
    marker = JOURNAL if url is None else TRIALS
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    if not all(n.startswith(TMP_PREFIX) for n in names) and not any(
        n.startswith(marker) for n in names
    ):
        raise InputError(
            "The output folder must be new, empty or the folder of a sweep. "
            f"Received: {folder}, without {marker}"
        )


def _open(sweep, folder, url) -> optuna.Study:
    """Opens or creates the study; raises InputError if it belongs to another search."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file = folder / JOURNAL
    try:
        study = _create_or_load(file, url)
        # With equal seeds all processes would propose the same values.
        seed = sweep.config.seed + len(study.trials) + os.getpid()
    except Exception as error:  # database drivers raise their own exception types
        received = f"{url or file}: {one_line(error)}"
        raise InputError(
            "A study must be a readable journal or the URL of a database. "
            f"Received: {_redact_password(received, url)}"
        ) from error
    study.sampler = optuna.samplers.TPESampler(seed=seed % 2**32, constant_liar=True)
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2)
    now = _fingerprint(sweep)
    before = study.user_attrs.get(CONFIG)
    if before is None:
        study.set_user_attr(CONFIG, now)
    elif before != now:
        changed = sorted(k for k in now | before if now.get(k) != before.get(k))
        raise InputError(
            "A study must resume with unchanged settings; otherwise use a new folder. Received: "
            + "; ".join(
                f"`{current_name(k)}` was {before.get(k)} and is {now.get(k)}" for k in changed
            )
        )
    return study


def _create_or_load(file, url, attempts=3) -> optuna.Study:
    storage: str | optuna.storages.BaseStorage = url
    if url is None:
        lock = JournalFileOpenLock(str(file))
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(file), lock_obj=lock))
    try:
        return optuna.create_study(
            storage=storage, study_name=STUDY_NAME, direction="maximize", load_if_exists=True
        )
    except Exception:  # database drivers raise their own exception types
        # When several processes create the tables of a new database, only one succeeds.
        if url is None or attempts == 1:
            raise
        time.sleep(1)
        return _create_or_load(file, url, attempts - 1)


def _fingerprint(sweep) -> dict[str, str]:
    """The settings that must not change in a study, by the keys in its storage."""
    settings = stored(sweep.config)
    del settings["download"]
    settings |= {"search": " ".join(sorted(sweep.search)), "max_parameters": sweep.max_parameters}
    return {name: str(value) for name, value in settings.items()}


def _needs_trial(study, sweep, progress) -> bool:
    """Requeues the trials of dead processes; returns whether the study needs another trial."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if _is_orphaned(trial.user_attrs.get(WORKER), trial.datetime_start):
            progress.log(f"The process of trial {trial.number} died: the trial will be repeated.")
            _requeue(study, trial.number, trial.params)
    counted = [t for t in study.get_trials(deepcopy=False) if _counts(t)]
    return len(counted) < sweep.trials


def _counts(trial) -> bool:
    if REJECTED in trial.user_attrs:
        return False
    return trial.state in (*FINISHED, TrialState.RUNNING)


def _build_trial(study, sweep, trial, dataset, rejected):
    """The model of a trial, or None for a rejected one; ``rejected`` collects reasons by values."""
    trial.set_user_attr(WORKER, _worker())
    values = {name: domain.suggest(trial, name) for name, domain in sweep.space.items()}
    # Of two concurrent trials the later one is rejected.
    trials = study.get_trials(deepcopy=False)
    before = [t for t in trials if t.number < trial.number and _counts(t)]
    reason = model = None
    if len(before) >= sweep.trials:
        reason = "there are enough trials"
    elif any(t.params == values for t in before):
        reason = "a duplicate"
    elif any(FAILED in t.user_attrs and t.params == values for t in trials):
        reason = "failed before"
    elif (chosen := tuple(values.items())) in rejected:
        reason = rejected[chosen]
    else:
        try:
            recipe = sweep.configured(values).recipe_for(dataset)
            images_per_epoch(dataset, recipe)
            (builder,) = specs.parse(sweep.spec(values)).values()
            model = experiment.build(sweep.spec(values), builder, dataset, sweep.config)
            count = experiment.num_parameters(model.trainable_variables)
            trial.set_user_attr("parameters", count)
            if sweep.max_parameters is not None and count > sweep.max_parameters:
                reason = f"{count} parameters, more than {sweep.max_parameters}"
        except InputError as error:
            reason = str(error)
        if reason is not None:
            rejected[chosen] = reason
    if reason is None:
        return model
    trial.set_user_attr(REJECTED, reason)
    study.tell(trial, state=TrialState.FAIL)
    return None


def _run_trial(study, sweep, trial, model, dataset, progress, on_step):
    config = sweep.configured(trial.params)
    label = f"trial {trial.number}"
    progress.log(f"{label}: {_described(trial.params)}")
    trainer = Trainer(model, dataset, config.recipe_for(dataset), config.epochs, config.seed)
    progress.begin(label, trainer.steps, first="compiling the first step")
    pruned = ""
    accuracy = math.nan
    try:
        for row in trainer.epochs(on_step):
            accuracy, epoch = row["test_accuracy"], row["epoch"]
            trial.report(accuracy, epoch)
            if epoch < config.epochs and trial.should_prune():
                pruned = f", pruned after epoch {epoch}"
                break
    except DivergenceError as failure:
        pruned = f": {failure}"
    progress.end()
    if pruned:
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, accuracy)
    progress.log(f"{label}: accuracy {accuracy:.4f} on the held-out images{pruned}")


@contextlib.contextmanager
def _finish_or_requeue(study, trial, progress):
    """On an exception in the block: out of memory fails the trial, an interruption requeues it, and
    any other error fails it and ends the sweep, which can resume without that trial."""
    try:
        yield
    except Exception as error:  # a trial may raise anything
        progress.end()
        memory_reason = out_of_memory_reason(error)
        reason = memory_reason or f"{type(error).__name__}: {error}"
        # The storage itself may fail, and the trial may be finished.
        with contextlib.suppress(Exception):
            trial.set_user_attr(FAILED, True)
            trial.set_user_attr(REJECTED, one_line(reason, 200))
            study.tell(trial, state=TrialState.FAIL)
        if memory_reason is None:
            raise
        progress.log(f"trial {trial.number}: out of memory: {memory_reason}")
    except BaseException:
        _requeue(study, trial.number, trial.params)
        raise


def _requeue(study, number, params):
    with contextlib.suppress(ValueError):  # another process has requeued it
        study.tell(number, state=TrialState.FAIL)
        study.enqueue_trial(params)


# --- Processes -----------------------------------------------------------------------------------


def _worker() -> dict:
    """This process, as a study stores it."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "born": _start_time(os.getpid())}


def _start_time(pid) -> str | None:
    """Start time of a process on Linux, because process ids are reused."""
    try:
        status = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return status.rsplit(")", 1)[-1].split()[19]


def _is_orphaned(worker, started) -> bool:
    """Whether the process of a trial is dead; those of other machines are assumed to be alive."""
    if worker is None:  # killed before it stored its id, or about to store it
        now = datetime.datetime.now()
        return started is not None and now - started > datetime.timedelta(minutes=1)
    if worker["host"] != socket.gethostname() or os.name != "posix":
        return False
    try:
        os.kill(worker["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return worker["born"] != _start_time(worker["pid"])


# --- Report --------------------------------------------------------------------------------------


def _described(params) -> str:
    return ", ".join(f"{name} {value}" for name, value in params.items())


def write_report(study, sweep, dataset, folder, command):
    """Writes trials.csv and report.html for the finished trials."""
    trials = _finished(study)
    rows = [
        {
            "trial": t.number,
            "state": "complete" if t.state == TrialState.COMPLETE else "pruned",
            "accuracy": f"{_last_accuracy(t):.4f}",
            "epochs": max(t.intermediate_values, default=0),
            "parameters": t.user_attrs.get("parameters"),
            **{name: t.params.get(name) for name in sweep.space},
        }
        for t in trials
    ]
    columns = ["trial", "state", "accuracy", "epochs", "parameters", *sweep.space]
    write_text(folder / TRIALS, csv_text(columns, rows))
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    html.write(
        folder / "report.html",
        TEMPLATE,
        sweep=sweep,
        dataset=dataset,
        rows=rows,
        columns=columns,
        best=complete[0] if complete else None,
        best_command=sweep.command(complete[0].params) if complete else None,
        rejected=[t for t in study.get_trials(deepcopy=False) if REJECTED in t.user_attrs],
        figures=_figures(study, complete),
        command=command,
    )


def _finished(study) -> list:
    """Complete trials, best first, and then the pruned ones."""
    trials = [t for t in study.get_trials(deepcopy=False) if t.state in FINISHED]
    return sorted(
        trials, key=lambda t: (t.state != TrialState.COMPLETE, -_last_accuracy(t), t.number)
    )


def _last_accuracy(trial) -> float:
    """The accuracy after the last epoch of a trial."""
    values = trial.intermediate_values
    return values[max(values)] if values else math.nan


def _figures(study, complete) -> dict[str, str]:
    """Optuna's plots as data URLs, by title."""
    if len(complete) < 2:
        return {}
    figures = {
        "Optimization history": plots.plot_optimization_history,
        "Accuracy by epoch": plots.plot_intermediate_values,
    }
    # Optuna cannot plot a parameter with a single value.
    varied = [
        name
        for name in complete[0].params
        if len({t.params[name] for t in complete if name in t.params}) > 1
    ]
    if varied and len({t.value for t in complete}) > 1:
        for title, plot in (
            ("Hyperparameter importance", plots.plot_param_importances),
            ("Parallel coordinates", plots.plot_parallel_coordinate),
        ):
            figures[title] = functools.partial(plot, params=varied)
    return {title: _data_url(plot, study) for title, plot in figures.items()}


def _data_url(plot, study) -> str:
    with warnings.catch_warnings():
        # Optuna's Matplotlib plots are experimental; its Plotly plots load scripts from a network.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        axes = plot(study)
    figure = axes.figure
    legend = axes.get_legend()
    if legend is not None and len(legend.get_texts()) > 10:
        legend.remove()  # does not fit
    try:
        figure.set_size_inches(9, 5)
        figure.tight_layout()
        return html.data_url(html.png(figure))
    finally:
        pyplot.close(figure)
