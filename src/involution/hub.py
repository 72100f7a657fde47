"""Models on the Hugging Face Hub, as folders of JSON and safetensors with a model card.

Downloads are pinned to a commit and verified by hash, and contain no code.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import tempfile
from typing import Any

import keras

from involution.models import pretrained, specs, weights
from involution.models.convert import convert
from involution.saving.classifier import load as load_classifier
from involution.utils.atomic_files import write_text
from involution.utils.errors import InputError, convert_exceptions, escape_controls

try:
    import huggingface_hub
except ImportError as error:
    raise InputError(
        "The Hugging Face Hub needs its client: pip install 'involution[hub]'. "
        f"Received: no module {error.name}"
    ) from error

# Of the errors of the client.
RULE = "A repository must exist, be accessible and have the revision."
CARD_FILE = "README.md"
FILES = (weights.CONFIG, weights.WEIGHTS, CARD_FILE)
# The tensors of a TensorFlow SavedModel such as keras-io/involution, without its graph.
CHECKPOINT = ("variables/variables.index", "variables/variables.data-00000-of-00001")
CARD_TEMPLATE = """---
license: mit
library_name: keras
pipeline_tag: image-classification
tags:
- involution
---

# {name}

{model}, {parameters:,} trainable parameters, for images of {width}x{height} pixels in {count}
classes: {classes}.

| trained on | {dataset}: {train} images; evaluated on {test} {images} |
|---|---|
{results}
| recipe | {recipe} |
| command | `{command}` |
| versions | {versions} |

The input is float32 pixels in [0, 1], the output {outputs}. The model distinguishes the classes
above only, in images like its training data. Load the folder with the package `involution`, named
after [the operator](https://arxiv.org/abs/2103.06255).
"""


def save(
    run: str | os.PathLike[str],
    label: str,
    folder: str | os.PathLike[str],
    name: str | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Writes a model of a run as a folder for the Hub: configuration, weights and model card.

    Args:
        run: A folder written by ``involution compare`` or ``train``.
        label: The model's key in the run's metrics.json.
        folder: The folder to write; existing files are replaced.
        name: Title of the model card; default: the folder's name.
        extra: Dictionary of additional entries of the configuration.

    Raises:
        InputError: The run has no such model, or it was not tested, or it cannot be built from the
            folder: it is built by a user's Python file, or fine-tuned from a model that is not one
            of the package's pretrained ones.
    """
    run, folder = pathlib.Path(run), pathlib.Path(folder)
    try:
        config, metrics = (
            json.loads((run / f"{file}.json").read_text(encoding="utf-8"))
            for file in ("config", "metrics")
        )
        results = metrics["models"][label]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            "A run must be a folder with config.json and metrics.json that has the model. "
            f"Received: {run}, {label}"
        ) from error
    function, arguments = _builder(label)
    if None in (results["test_accuracy"], results["test_loss"]):
        raise InputError(
            "A model to publish must have a test accuracy and a finite test loss. "
            f"Received: {label} in {run}"
        )
    classifier = load_classifier(run / specs.file_name(label))
    height, width, _ = classifier.image_shape
    arguments |= {"input_shape": classifier.image_shape, "classes": len(classifier.class_names)}
    accuracy = results.get("final_test_accuracy")
    extra_metadata = {
        "test_accuracy": results["test_accuracy"] if accuracy is None else accuracy,
        **(extra or {}),
    }
    text = CARD_TEMPLATE.format(
        name=name or folder.name,
        model=label,
        parameters=results["trainable_params"],
        width=width,
        height=height,
        count=len(classifier.class_names),
        classes=", ".join(map(escape_controls, classifier.class_names)),
        dataset=metrics["dataset"],
        train=config["images"]["train"],
        test=config["images"]["test"],
        images="test images" if accuracy is None else "of its training images, held out",
        results="\n".join(f"| {title} | {value} |" for title, value in _results(results)),
        recipe=f"{config['recipe']}, {config['epochs']} epochs, "
        + ", ".join(f"{k} {v}" for k, v in config["training"].items()),
        command=config["command"],
        outputs=classifier.outputs,
        versions=", ".join(f"{k} {v}" for k, v in config["versions"].items()),
    )
    weights.save(
        folder, function, arguments, classifier.model, classifier.metadata | extra_metadata
    )
    write_text(folder / CARD_FILE, text)


def _builder(label) -> tuple[str, dict]:
    """The name and the arguments of the function of involution.models that builds the model."""
    if label in pretrained.available():
        config = weights.read_config(pretrained.path(label))
        return config["name"], config["arguments"]
    with contextlib.suppress(InputError):
        function, arguments = specs.split_spec(label)
        if ":" not in function:
            return function, arguments
    raise InputError(
        "A model to publish must be one of involution.models, with or without options, or "
        "fine-tuned from a pretrained model's name: the folder contains neither Python files nor "
        f"the configuration of another model. Received: {label}"
    )


def _results(metrics) -> list[tuple[str, str]]:
    """Rows of the model card."""
    best, accuracy = metrics.get("best_epoch"), metrics.get("final_test_accuracy")
    kind = "test" if accuracy is None else "held-out"
    when = "the last epoch" if best is None else f"epoch {best}, the best of {metrics['epochs']}"
    rows = [
        (f"{kind} accuracy after {when}", f"{metrics['test_accuracy']:.4f}"),
        (f"{kind} loss", f"{metrics['test_loss']:.4f}"),
    ]
    if accuracy is not None:
        rows.insert(0, ("accuracy on the test images", f"{accuracy:.4f}"))
    return rows


def push(
    folder: str | os.PathLike[str],
    repo: str,
    token: str | None = None,
    private: bool = False,
    message: str = "A model of involutions",
    endpoint: str | None = None,
) -> str:
    """Uploads a folder written by ``save`` to the Hub, in one commit.

    Args:
        folder: The folder. Only its configuration, weights and model card are uploaded.
        repo: "owner/name"; created if missing.
        token: Access token with write permission; None: the client's stored token.
        private: Whether a created repository is private.
        message: Commit message.
        endpoint: URL of the Hub; None: the client's.

    Returns:
        The commit hash, 40 hexadecimal digits, for ``revision`` of ``load``.

    Raises:
        InputError: The folder was not written by ``save``, or the Hub rejects the upload.
    """
    folder = pathlib.Path(folder)
    weights.read_config(folder)
    missing = [file for file in FILES if not (folder / file).is_file()]
    if missing:
        raise InputError(
            f"A folder to upload must contain {', '.join(FILES)}. "
            f"Received: {folder} without {', '.join(missing)}"
        )
    api = huggingface_hub.HfApi(endpoint=endpoint, token=token)
    operations = [
        huggingface_hub.CommitOperationAdd(path_in_repo=file, path_or_fileobj=folder / file)
        for file in FILES
    ]
    # The errors of the client's HTTP library have no common base.
    with convert_exceptions(InputError, RULE, repo):
        api.create_repo(repo, private=private, exist_ok=True)
        return api.create_commit(repo, operations, commit_message=message).oid


def load(
    repo, revision=None, allow_unpinned=False, offline=False, cache=None, token=None, endpoint=None
) -> keras.Model:
    """Loads a model from the Hub: a folder uploaded by ``push``, or a TensorFlow SavedModel that
    ``convert`` reads, such as "keras-io/involution".

    No downloaded code is executed. Every file must match the hash that the Hub reports or, for a
    cached file, reported at download.

    Args:
        repo: "owner/name".
        revision: Commit hash, 40 hexadecimal digits; its content cannot change.
        allow_unpinned: Whether ``revision`` may be a branch, a tag, or None for the main branch.
        offline: Whether to use the cache only, without network access.
        cache: Folder of downloads; None: the client's.
        token: Access token for private repositories; None: the client's stored token.
        endpoint: URL of the Hub; None: the client's.

    Returns:
        A ``keras.Model``, not compiled.

    Raises:
        InputError: ``revision`` is not a commit hash, the Hub rejects the download, the repository
            contains no such model, or a file does not match its hash.
    """
    if not allow_unpinned and not re.fullmatch(r"[0-9a-f]{40}", str(revision)):
        raise InputError(
            "`revision` must be a commit hash, 40 hexadecimal digits, unless allow_unpinned=True. "
            f"Received: {revision}"
        )
    with convert_exceptions(InputError, RULE, repo):
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            cache_dir=cache,
            local_files_only=offline,
            token=token,
            endpoint=endpoint,
            allow_patterns=[*FILES[:2], *CHECKPOINT],
        )
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
        f"A repository must contain {' and '.join(FILES[:2])}, or a SavedModel that `convert` "
        f"reads. Received: {repo} with {', '.join(found) or 'neither'}"
    )


def _check_hash(file):
    """Compares the hash of a file with its name in the client's cache: the hash that the Hub
    reported, a Git blob hash or SHA-256."""
    content = file.resolve()
    expected = content.name
    if not file.is_symlink() or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", expected):
        raise InputError(
            "A cached file must be a link to a blob named by its hash; on Windows the client makes "
            f"links in developer mode only. Received: {file}"
        )
    digest = hashlib.sha1(usedforsecurity=False) if len(expected) == 40 else hashlib.sha256()
    if len(expected) == 40:
        digest.update(b"blob %d\0" % content.stat().st_size)
    with open(content, "rb") as opened:
        while chunk := opened.read(2**20):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise InputError(
            f"A file must match the Hub's hash {expected}. "
            f"Received: {file} with {digest.hexdigest()}"
        )
