"""Models on the Hugging Face hub: as folders of JSON and safetensors, with a card of the run's own
figures. What is loaded is pinned to a commit and held against its hashes; no code comes with it.
"""

import hashlib
import json
import pathlib
import re
import tempfile

import keras

from involution.models import specs, weights
from involution.models.convert import convert
from involution.saving import classifier as saved_model
from involution.utils.atomic_files import write_text
from involution.utils.errors import InputError, shown

try:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
except ImportError as error:
    raise InputError(
        f"The hub needs its client: pip install 'involution[hub]'. Received: no module {error.name}"
    ) from error

CARD = "README.md"
FILES = (weights.CONFIG, weights.WEIGHTS, CARD)
# Of a TensorFlow SavedModel, as keras-io/involution: its tensors, not its graph.
CHECKPOINT = ("variables/variables.index", "variables/variables.data-00000-of-00001")
TEXT = """---
license: mit
library_name: keras
pipeline_tag: image-classification
tags:
- involution
---

# {name}

{model}, {parameters:,} trainable parameters, for images of {width}x{height} pixels in {count}
classes: {classes}.

| trained on | {dataset}: {train} images; measured on its {test} test images |
|---|---|
| test accuracy after the last epoch | {accuracy:.4f} |
| test loss | {loss:.4f} |
| recipe | {recipe} |
| command | `{command}` |
| versions | {versions} |

Pixels go in as float32 from 0 to 1, logits come out. It knows the classes above and no others, in
pictures like those it was trained on. The package `involution`, named after
[the operator](https://arxiv.org/abs/2103.06255), reads this folder.
"""


def save(run, label, folder, name=None, extra=None):
    """Writes a model of a run as a folder for the hub: its configuration, its weights, its card.

    Args:
        run: A folder that ``involution compare`` or ``train`` wrote.
        label: The model in it, as metrics.json names it.
        folder: The folder to write; files of the same names are replaced.
        name: What the card calls the model; the folder's name unless given.
        extra: Dictionary of what else the configuration shall hold.

    Raises:
        InputError: There is no such model, or it is of a Python file of one's own, without which
            nobody could build it.
    """
    run, folder = pathlib.Path(run), pathlib.Path(folder)
    try:
        config, metrics = (
            json.loads((run / f"{file}.json").read_text(encoding="utf-8"))
            for file in ("config", "metrics")
        )
        figures = metrics["models"][label]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            "A run must be a folder with config.json and metrics.json, and the model one of it. "
            f"Received: {run}, {label}"
        ) from error
    function, arguments = specs.function_and_options(label)
    if ":" in function:
        raise InputError(
            "A model for others must be one of involution.models; a Python file's cannot be built "
            f"without the file. Received: {label}"
        )
    if None in (figures["test_accuracy"], figures["test_loss"]):
        raise InputError(
            "A model for others must be one that was tested, with a loss that is finite. "
            f"Received: {label} in {run}"
        )
    classifier = saved_model.load(run / specs.file_name(label))
    height, width, _ = classifier.image_shape
    arguments |= {"input_shape": classifier.image_shape, "classes": len(classifier.class_names)}
    about = {"test_accuracy": figures["test_accuracy"], **(extra or {})}
    text = TEXT.format(
        name=name or folder.name,
        model=label,
        parameters=figures["trainable_params"],
        width=width,
        height=height,
        count=len(classifier.class_names),
        classes=", ".join(map(shown, classifier.class_names)),
        dataset=metrics["dataset"],
        train=config["images"]["train"],
        test=config["images"]["test"],
        accuracy=figures["test_accuracy"],
        loss=figures["test_loss"],
        recipe=f"{config['recipe']}, {config['epochs']} epochs, "
        + ", ".join(f"{k} {v}" for k, v in config["training"].items()),
        command=config["command"],
        versions=", ".join(f"{k} {v}" for k, v in config["versions"].items()),
    )
    weights.save(folder, function, arguments, classifier.model, classifier.about | about)
    write_text(folder / CARD, text)


def push(folder, repo, token=None, private=False, message="A model of involutions", endpoint=None):
    """Puts a folder that ``save`` wrote on the hub, in one commit.

    Args:
        folder: The folder. Its configuration, weights and card go; nothing else does.
        repo: "owner/name"; made where it is missing.
        token: With the right to write; None: the one that the client is logged in with.
        private: Whether a repository that is made is private.
        message: Of the commit.
        endpoint: Another hub's URL.

    Returns:
        The commit, 40 digits: the ``revision`` that ``load`` takes.

    Raises:
        InputError: It is no such folder, or the hub refuses.
    """
    folder = pathlib.Path(folder)
    weights.read_config(folder)
    missing = [file for file in FILES if not (folder / file).is_file()]
    if missing:
        raise InputError(
            f"A folder for the hub must hold {', '.join(FILES)}. "
            f"Received: {folder} without {', '.join(missing)}"
        )
    api = huggingface_hub.HfApi(endpoint=endpoint, token=token)
    operations = [
        huggingface_hub.CommitOperationAdd(path_in_repo=file, path_or_fileobj=folder / file)
        for file in FILES
    ]
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        return api.create_commit(repo, operations, commit_message=message).oid
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise _refused(repo, error) from error


def load(
    repo, revision=None, allow_unpinned=False, offline=False, cache=None, token=None, endpoint=None
) -> keras.Model:
    """A model from the hub: of a folder that ``push`` put there, or of a TensorFlow SavedModel that
    ``convert`` reads, as "keras-io/involution".

    Nothing of it is executed. Every file is held against the hash that the hub gives for it, or
    gave when it was fetched.

    Args:
        repo: "owner/name".
        revision: The commit, 40 hexadecimal digits: what it holds cannot change.
        allow_unpinned: Whether a branch, a tag or None, the main branch, will do as well.
        offline: Whether to take what was fetched before, and ask nobody.
        cache: Folder for what is fetched; None: the client's.
        token: For private repositories; None: the one that the client is logged in with.
        endpoint: Another hub's URL.

    Returns:
        A ``keras.Model``, not compiled.

    Raises:
        InputError: ``revision`` is no commit; the hub refuses; there is no such model; a file is
            not what the hub says.
    """
    if not allow_unpinned and not re.fullmatch(r"[0-9a-f]{40}", str(revision)):
        raise InputError(
            "revision must be a commit, 40 hexadecimal digits, unless allow_unpinned=True. "
            f"Received: {revision}"
        )
    try:
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            cache_dir=cache,
            local_files_only=offline,
            token=token,
            endpoint=endpoint,
            allow_patterns=[*FILES[:2], *CHECKPOINT],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise _refused(repo, error) from error
    return _read(pathlib.Path(folder), repo)


def _read(folder, repo):
    found = [file for file in (*FILES[:2], *CHECKPOINT) if (folder / file).is_file()]
    for file in found:
        _check_hash(folder / file)
    if set(FILES[:2]) <= set(found):
        return weights.load(folder)
    if set(CHECKPOINT) <= set(found):
        with tempfile.TemporaryDirectory() as converted:
            convert(folder, converted)
            return weights.load(converted)
    raise InputError(
        f"A model on the hub must be {' and '.join(FILES[:2])}, or a SavedModel that convert "
        f"reads. Received: {repo} with {', '.join(found) or 'neither'}"
    )


def _check_hash(file):
    """The client's cache names what it fetched by the hash that the hub gave: git's of the blob,
    or SHA-256."""
    content = file.resolve()
    expected = content.name
    if not file.is_symlink() or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", expected):
        raise InputError(
            f"The hub must give a hash for every file, and the cache keep links. Received: {file}"
        )
    digest = hashlib.sha1(usedforsecurity=False) if len(expected) == 40 else hashlib.sha256()
    if len(expected) == 40:
        digest.update(b"blob %d\0" % content.stat().st_size)
    with open(content, "rb") as opened:
        while part := opened.read(2**20):
            digest.update(part)
    if digest.hexdigest() != expected:
        raise InputError(
            f"A file must be what the hub says: its hash {expected}. "
            f"Received: {file} with {digest.hexdigest()}"
        )


def _refused(repo, error) -> InputError:
    reason = " ".join(str(error).split())[:300]
    return InputError(
        f"The hub must have, and give, what is asked for. Received: {repo}: "
        f"{type(error).__name__}: {reason}"
    )
