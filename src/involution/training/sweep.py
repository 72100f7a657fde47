"""Hyper-parameter search by Optuna: processes that share one study, in a folder that can be left
and taken up again.

A process takes one trial after another until the study has as many as were asked for. One that is
killed loses the trial it was at: the next one that looks finds its process gone, and repeats it.
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

import keras

from involution.models import specs
from involution.training import experiment
from involution.training import trainer as training
from involution.utils.atomic_files import TMP_PREFIX, csv_text, write_text
from involution.utils.errors import InputError, out_of_memory_reason
from involution.visualize import html

try:
    import optuna
    from matplotlib import pyplot
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
    from optuna.trial import TrialState
    from optuna.visualization import matplotlib as drawings
except ImportError as error:
    raise InputError(
        f"A sweep needs Optuna: pip install 'involution[sweep]'. Received: no module {error.name}"
    ) from error

TEMPLATE = pathlib.Path(__file__).with_name("sweep.html.j2")

JOURNAL, TRIALS = "study.journal", "trials.csv"
NAME = "involution"
# Names in a search that are training's and not the model's.
TRAINING = ("learning_rate", "weight_decay", "batch_size")
# What counts towards the number of trials.
SETTLED = (TrialState.COMPLETE, TrialState.PRUNED)
# Proposals in a row that could not be tried, after which a search is over.
PATIENCE = 50
REFUSED, FAILED = "refused", "failed"
WORKER = "worker"


@dataclasses.dataclass(frozen=True)
class Choices:
    """One of several values, as texts: storages take no tuples."""

    values: tuple[str, ...]

    @property
    def ends(self):
        return self.values

    def suggest(self, trial, name):
        return trial.suggest_categorical(name, self.values)


@dataclasses.dataclass(frozen=True)
class Range:
    """Any value between two: whole numbers evenly, others evenly by their logarithm."""

    low: float
    high: float

    @property
    def ends(self):
        return self.low, self.high

    def suggest(self, trial, name):
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(name, self.low, self.high)
        return trial.suggest_float(name, self.low, self.high, log=True)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is searched.

    Attributes:
        config: The model, without what is searched, and how it is trained; ``config.validation``
            training images judge, a tenth of all where it is None.
        search: Texts "name=a,b,c" or "name=low..high", where a name is an option of the model or
            one of ``TRAINING``.
        trials: How many trials the study shall have.
        max_parameters: Models with more trainable parameters are not tried; None: all are.
    """

    config: experiment.Config
    search: tuple[str, ...]
    trials: int = 40
    max_parameters: int | None = None

    def __post_init__(self):
        for name in ("trials", "max_parameters"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1. Received: {name}={value}")
        if not self.search:
            raise InputError("A search must name at least one value to vary. Received: none")
        if len(specs.parse(self.config.models)) != 1:
            raise InputError(f"One model is searched at a time. Received: {self.config.models}")
        # Whether the model has the options, without a trial.
        specs.parse(self.label(dict.fromkeys(self.space, "0")))
        for name, way in self.space.items():
            for value in way.ends if name in TRAINING else ():
                self._check(name, _number(value))

    def _check(self, name, value):
        whole = name == "batch_size"
        if not isinstance(value, int if whole else (int, float)) or isinstance(value, bool):
            kind = "whole numbers" if whole else "numbers"
            raise InputError(f"Values of {name} must be {kind}. Received: {value}")
        self.configured({name: value})

    @property
    def space(self) -> dict[str, Choices | Range]:
        space = dict(map(_dimension, self.search))
        if len(space) < len(self.search):
            raise InputError(
                f"Every name must be searched once. Received: {', '.join(self.search)}"
            )
        return space

    def label(self, values) -> str:
        """The model with these values, as commands name it."""
        options = (f"{k}={v}" for k, v in values.items() if k not in TRAINING)
        return ":".join((self.config.models, *options))

    def configured(self, values) -> experiment.Config:
        """The configuration of one trial."""
        own = {k: _number(v) for k, v in values.items() if k in TRAINING}
        return dataclasses.replace(self.config, models=self.label(values), **own)

    def command(self, values) -> str:
        """What trains this model on all training images."""
        words = ["involution", "train"]
        given = dataclasses.asdict(self.configured(values)) | {"model": self.label(values)}
        del given["models"], given["validation"]
        own = training.RECIPES[self.config.recipe]
        defaults = dataclasses.asdict(experiment.Config()) | {
            "epochs": own.epochs,
            "image_size": own.image_size,
        }
        for name, value in given.items():
            if value != defaults.get(name):
                option = "--" + name.replace("_", "-")
                text = "x".join(map(str, value)) if name == "image_size" else str(value)
                words += [option] if value is True else [option, text]
        return specs.command_line(*words, "--backend", keras.config.backend())


def _dimension(text) -> tuple[str, Choices | Range]:
    name, equals, values = (part.strip() for part in text.partition("="))
    rule = (
        "A search must be name=a,b,c or name=low..high, with 0 < low < high unless both are whole. "
        f"Received: {text}"
    )
    if not equals or not name.isidentifier() or not values:
        raise InputError(rule)
    if ".." in values:
        low, high = (specs.parse_value(end) for end in values.split("..", 1))
        whole = isinstance(low, int) and isinstance(high, int)
        numbers = all(
            isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n)
            for n in (low, high)
        )
        if not numbers or not low < high or (low <= 0 and not whole):
            raise InputError(rule)
        return name, Range(low, high)
    return name, Choices(tuple(part.strip() for part in values.split(",")))


def _number(value):
    return specs.parse_value(value) if isinstance(value, str) else value


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a search."""

    best: dict | None
    """The values of the best complete trial."""
    accuracy: float | None
    """Its accuracy on the images held out."""
    trials: int
    """Complete ones and those given up early."""
    exit_code: int  # 0, or 128 and the number of the signal that ended it


def run(plan, folder, study_url=None, console=None, command="") -> Outcome:
    """Takes trials until the study has enough, and writes a report after each.

    The folder gets study.journal, unless the study is in a database, trials.csv and report.html.
    Any number of processes may share a folder, or a database. An interruption (Ctrl-C) gives the
    trial back.

    Args:
        plan: What is searched. A study that exists goes on only with the plan it began with, but
            for the number of trials.
        folder: The folder, new or of the same search.
        study_url: Database URL, as Optuna and SQLAlchemy take it; None: a journal in the folder.
        console: Where progress goes; see ``experiment.Silent``.
        command: What was typed, for the report.

    Returns:
        The best complete trial so far, and how the search ended.

    Raises:
        InputError: Something given cannot be used.
    """
    console = console or experiment.Silent()
    folder = pathlib.Path(folder)
    dataset = experiment.load(plan.config, console)
    if plan.config.validation is None:
        dataset = dataset.validation_split(max(len(dataset.x_train) // 10, 1))
    _check_folder(folder, study_url)
    experiment.make_folder(folder)
    study = _open(plan, folder, study_url)
    command = _hidden(command, study_url)
    unfit: dict[tuple, str] = {}
    refusals, code = 0, 0
    with experiment.interruptions(console) as step:
        try:
            while refusals < PATIENCE and _wanted(study, plan, console):
                trial, model = study.ask(), None
                refusals += 1
                with _settled_or_given_back(study, trial, console):
                    model = _proposed(study, plan, trial, dataset, unfit)
                    if model is not None:
                        refusals = 0
                        _try(study, plan, trial, model, dataset, console, step)
                if model is not None:
                    write_report(study, plan, dataset, folder, command)
            if refusals == PATIENCE:
                console.say(
                    f"{PATIENCE} proposals in a row were known, or could not be tried: the search "
                    "is exhausted."
                )
        except KeyboardInterrupt as stop:
            code = experiment.exit_code(stop)
            console.stop()
            console.say("Interrupted: the trial at work will be repeated.")
    write_report(study, plan, dataset, folder, command)
    trials = _settled(study)
    best = trials[0] if trials and trials[0].state == TrialState.COMPLETE else None
    return Outcome(best and best.params, best and best.value, len(trials), code)


# --- Trials --------------------------------------------------------------------------------------


def _hidden(text, url) -> str:
    """The text without the password of a database's URL, if there is one."""
    password = urllib.parse.urlsplit(url or "").password
    return text.replace(f":{password}@", ":***@") if password else text


def _check_folder(folder, url):
    """What is there is this search's, not a run's."""
    mark = JOURNAL if url is None else TRIALS
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    if not all(n.startswith(TMP_PREFIX) for n in names) and not any(
        n.startswith(mark) for n in names
    ):
        raise InputError(
            "The output folder must be new, empty or a search's. "
            f"Received: {folder}, without {mark}"
        )


def _open(plan, folder, url) -> optuna.Study:
    """The study, made where it does not exist, if it is of this plan."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file = folder / JOURNAL
    try:
        study = _created(file, url)
        # Processes of one seed would propose the same.
        seed = plan.config.seed + len(study.trials) + os.getpid()
    except Exception as error:  # of the database's driver, too
        received = f"{url or file}: {' '.join(str(error).split())}"
        raise InputError(
            "A study must be a journal that can be read, or the URL of a database. "
            f"Received: {_hidden(received, url)}"
        ) from error
    study.sampler = optuna.samplers.TPESampler(seed=seed % 2**32, constant_liar=True)
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2)
    begun = _plan_text(plan)
    known = study.user_attrs.get("plan")
    if known is None:
        study.set_user_attr("plan", begun)
    elif known != begun:
        changed = sorted(k for k in begun if begun[k] != known.get(k))
        raise InputError(
            "A study goes on with what it began with, or a new folder is given. Received: another "
            + ", ".join(f"{k} ({begun[k]}, not {known.get(k)})" for k in changed)
        )
    return study


def _created(file, url, attempts=3) -> optuna.Study:
    storage: str | optuna.storages.BaseStorage = url
    if url is None:
        lock = JournalFileOpenLock(str(file))
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(file), lock_obj=lock))
    try:
        return optuna.create_study(
            storage=storage, study_name=NAME, direction="maximize", load_if_exists=True
        )
    except Exception:  # of any driver
        # Of processes that make the tables of a new database at once, one succeeds.
        if url is None or attempts == 1:
            raise
        time.sleep(1)
        return _created(file, url, attempts - 1)


def _plan_text(plan) -> dict[str, str]:
    """What must not change in a study, as a storage takes it."""
    given = dataclasses.asdict(plan.config)
    del given["download"]
    given |= {"search": " ".join(sorted(plan.search)), "max_parameters": plan.max_parameters}
    return {name: str(value) for name, value in given.items()}


def _wanted(study, plan, console) -> bool:
    """Whether another trial is needed, after those of dead processes are given back."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if _is_dead(trial.user_attrs.get(WORKER), trial.datetime_start):
            console.say(f"Trial {trial.number} was cut short: it will be repeated.")
            _give_back(study, trial.number, trial.params)
    settled = [t for t in study.get_trials(deepcopy=False) if _counts(t)]
    return len(settled) < plan.trials


def _counts(trial) -> bool:
    if REFUSED in trial.user_attrs:
        return False
    return trial.state in (*SETTLED, TrialState.RUNNING)


def _proposed(study, plan, trial, dataset, unfit):
    """The model of a trial, or None for one that will not be tried; ``unfit`` gets the reason of
    one that never can be."""
    trial.set_user_attr(WORKER, _worker())
    values = {name: way.suggest(trial, name) for name, way in plan.space.items()}
    # Of two processes at once the later trial gives way.
    trials = study.get_trials(deepcopy=False)
    before = [t for t in trials if t.number < trial.number and _counts(t)]
    reason = model = None
    if len(before) >= plan.trials:
        reason = "there are enough trials"
    elif any(t.params == values for t in before):
        reason = "known"
    elif any(FAILED in t.user_attrs and t.params == values for t in trials):
        reason = "failed before"
    elif (chosen := tuple(values.items())) in unfit:
        reason = unfit[chosen]
    else:
        try:
            recipe = plan.configured(values).recipe_for(dataset)
            training.images_of_an_epoch(dataset, recipe)
            (builder,) = specs.parse(plan.label(values)).values()
            model = experiment.build(plan.label(values), builder, dataset, plan.config)
            count = experiment.count(model.trainable_variables)
            trial.set_user_attr("parameters", count)
            if plan.max_parameters is not None and count > plan.max_parameters:
                reason = f"{count} parameters, more than {plan.max_parameters}"
        except InputError as error:
            reason = str(error)
        if reason is not None:
            unfit[chosen] = reason
    if reason is None:
        return model
    trial.set_user_attr(REFUSED, reason)
    study.tell(trial, state=TrialState.FAIL)
    return None


def _try(study, plan, trial, model, dataset, console, step):
    config = plan.configured(trial.params)
    label = f"trial {trial.number}"
    console.say(f"{label}: {_described(trial.params)}")
    recipe = config.recipe_for(dataset)
    trainer = training.Trainer(model, dataset, recipe, config.epochs, config.seed)
    console.start(label, trainer.steps)
    given_up = ""
    accuracy = math.nan
    try:
        for row in trainer.epochs(step):
            accuracy, epoch = row["test_accuracy"], row["epoch"]
            trial.report(accuracy, epoch)
            if epoch < config.epochs and trial.should_prune():
                given_up = f", given up after epoch {epoch}"
                break
    except training.DivergenceError as failure:
        given_up = f": {failure}"
    console.stop()
    if given_up:
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, accuracy)
    console.say(f"{label}: accuracy {accuracy:.4f} on the images held out{given_up}")


@contextlib.contextmanager
def _settled_or_given_back(study, trial, console):
    """A trial for which memory does not suffice is over; an interrupted one is repeated; another
    error ends the search, which goes on without that trial."""
    try:
        yield
    except Exception as error:
        console.stop()
        lack = out_of_memory_reason(error)
        reason = lack or f"{type(error).__name__}: {error}"
        # It may be the storage that fails, and the trial may be over.
        with contextlib.suppress(Exception):
            trial.set_user_attr(FAILED, True)
            trial.set_user_attr(REFUSED, " ".join(reason.split())[:200])
            study.tell(trial, state=TrialState.FAIL)
        if lack is None:
            raise
        console.say(f"trial {trial.number}: memory does not suffice: {lack}")
    except BaseException:
        _give_back(study, trial.number, trial.params)
        raise


def _give_back(study, number, params):
    """Has a trial repeated."""
    with contextlib.suppress(ValueError):  # another process was quicker
        study.tell(number, state=TrialState.FAIL)
        study.enqueue_trial(params)


# --- Processes -----------------------------------------------------------------------------------


def _worker() -> dict:
    """This process, as a storage takes it."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())}


def _born(pid) -> str | None:
    """When a process was started, on Linux: numbers of processes are used again."""
    try:
        status = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return status.rsplit(")", 1)[-1].split()[19]


def _is_dead(worker, begun) -> bool:
    """Whether a process of this machine is gone; of others nothing is known."""
    if worker is None:  # killed before it said who it is, or about to say
        return begun is not None and datetime.datetime.now() - begun > datetime.timedelta(minutes=1)
    if worker["host"] != socket.gethostname() or os.name != "posix":
        return False
    try:
        os.kill(worker["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return worker["born"] != _born(worker["pid"])


# --- Report --------------------------------------------------------------------------------------


def _described(params) -> str:
    return ", ".join(f"{name} {value}" for name, value in params.items())


def write_report(study, plan, dataset, folder, command):
    """trials.csv and report.html, as far as the study came."""
    trials = _settled(study)
    rows = [
        {
            "trial": t.number,
            "state": "complete" if t.state == TrialState.COMPLETE else "given up",
            "accuracy": f"{_last(t):.4f}",
            "epochs": max(t.intermediate_values, default=0),
            "parameters": t.user_attrs.get("parameters"),
            **{name: t.params.get(name) for name in plan.space},
        }
        for t in trials
    ]
    columns = ["trial", "state", "accuracy", "epochs", "parameters", *plan.space]
    write_text(folder / TRIALS, csv_text(columns, rows))
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    html.write(
        folder / "report.html",
        TEMPLATE,
        plan=plan,
        dataset=dataset,
        rows=rows,
        columns=columns,
        best=complete[0] if complete else None,
        best_command=plan.command(complete[0].params) if complete else None,
        refused=[t for t in study.get_trials(deepcopy=False) if REFUSED in t.user_attrs],
        figures=_figures(study, complete),
        command=command,
    )


def _settled(study) -> list:
    """Trials that count: the complete ones, best first, then those given up early."""
    trials = [t for t in study.get_trials(deepcopy=False) if t.state in SETTLED]
    return sorted(trials, key=lambda t: (t.state != TrialState.COMPLETE, -_last(t), t.number))


def _last(trial) -> float:
    """The accuracy after the last epoch that a trial came to."""
    values = trial.intermediate_values
    return values[max(values)] if values else math.nan


def _figures(study, complete) -> dict[str, str]:
    """Optuna's own drawings, as data URLs."""
    if len(complete) < 2:
        return {}
    wanted = {
        "How far accuracy came": drawings.plot_optimization_history,
        "Accuracy by epoch": drawings.plot_intermediate_values,
    }
    # What took one value only has no axis.
    varied = [
        name
        for name in complete[0].params
        if len({t.params[name] for t in complete if name in t.params}) > 1
    ]
    if varied and len({t.value for t in complete}) > 1:
        for title, draw in (
            ("What mattered", drawings.plot_param_importances),
            ("Each trial, a line", drawings.plot_parallel_coordinate),
        ):
            wanted[title] = functools.partial(draw, params=varied)
    return {title: _drawn(draw, study) for title, draw in wanted.items()}


def _drawn(draw, study) -> str:
    with warnings.catch_warnings():
        # Optuna calls its drawings by Matplotlib experimental; those by Plotly need a network.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        axes = draw(study)
    figure = axes.figure
    legend = axes.get_legend()
    if legend is not None and len(legend.get_texts()) > 10:
        legend.remove()  # it would not fit
    try:
        figure.set_size_inches(9, 5)
        figure.tight_layout()
        return html.data_url(html.png(figure))
    finally:
        pyplot.close(figure)
