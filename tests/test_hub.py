"""``involution.hub`` against a local server that simulates the Hugging Face Hub."""

import json
import shutil

import huggingface_hub
import numpy as np
import pytest

from involution import hub, models
from involution.models import weights
from involution.saving import classifier
from involution.training import experiment
from involution.utils.errors import InputError
from tests.support import hub_server
from tests.support.backends import numpy
from tests.support.images import write_folder
from tests.support.paths import FILES

pytestmark = pytest.mark.any_backend

HOSTED = FILES / "hosted"
LABEL = "inn:head=convolutional"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    pets = write_folder(folder / "pets")
    own = folder / "own.py"
    own.write_text("from involution.models import cnn as net\n")
    config = experiment.Config(str(pets), f"{LABEL},{own}:net", 1)
    experiment.compare(config, folder / "run", command="involution compare --epochs 1")
    return folder / "run"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with hub_server.serve() as pair:
        yield pair


@pytest.fixture
def pushed(run, server, tmp_path):
    """(server state, options of ``hub.load``, commit hash) of an uploaded model."""
    folder = tmp_path / "folder"
    hub.save(run, LABEL, folder, name="small inn")
    (folder / "secret.txt").write_text("mine")
    server_state, url = server
    revision = hub.push(folder, "me/small", token="right", endpoint=url)
    return server_state, {"endpoint": url, "cache": tmp_path / "cache"}, revision


@pytest.mark.long
def test_push_and_load(pushed, run):
    server_state, options, revision = pushed
    files = server_state.repositories["me/small"][revision]
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    model = hub.load("me/small", revision, **options)
    original = classifier.load(run / "inn-head=convolutional.keras").model
    x = np.random.default_rng(0).random((2, 16, 16, 3), "float32")
    np.testing.assert_array_equal(numpy(model(x)), numpy(original(x)))
    card = files["README.md"].decode()
    accuracy = json.loads((run / "metrics.json").read_text())["models"][LABEL]["test_accuracy"]
    assert card.startswith("---\nlicense: mit\n")
    for part in ("# small inn\n", "`involution compare --epochs 1`", f"{accuracy:.4f}", "ant, bee"):
        assert part in card


@pytest.mark.long
def test_fine_tuned_model(run, tmp_path):
    """The card has the results of the saved weights, on the test images."""
    config = experiment.Config(
        str(run.parent / "pets"),
        "cnn-cifar10",
        2,
        image_size=(32, 32),
        validation_images=4,
        early_stopping=1,
    )
    experiment.compare(config, tmp_path / "run")
    hub.save(tmp_path / "run", "cnn-cifar10", tmp_path / "folder")
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())["models"]["cnn-cifar10"]
    accuracy = metrics["final_test_accuracy"]
    assert weights.read_config(tmp_path / "folder")["extra"]["test_accuracy"] == accuracy
    card = (tmp_path / "folder" / "README.md").read_text()
    for part in (
        "evaluated on 4 of its training images, held out",
        f"| accuracy on the test images | {accuracy:.4f} |",
        f"| held-out accuracy after epoch {metrics['best_epoch']}, the best of "
        f"{metrics['epochs']} | {metrics['test_accuracy']:.4f} |",
    ):
        assert part in card
    model = weights.load(tmp_path / "folder")
    original = classifier.load(tmp_path / "run" / "cnn-cifar10.keras").model
    x = np.random.default_rng(0).random((2, 32, 32, 3), "float32")
    np.testing.assert_array_equal(numpy(model(x)), numpy(original(x)))


@pytest.mark.long
def test_revision_must_be_a_commit(pushed):
    _, options, revision = pushed
    for invalid in (None, "main", revision[:7], revision.upper() + "x", "v1"):
        with pytest.raises(InputError, match="must be a commit hash, 40 hexadecimal digits"):
            hub.load("me/small", invalid, **options)
    for unpinned in (None, "main", revision):
        model = hub.load("me/small", unpinned, allow_unpinned=True, **options)
        assert model.output_shape == (None, 3)


@pytest.mark.long
def test_offline_uses_the_cache_only(pushed):
    server_state, options, revision = pushed
    with pytest.raises(InputError, match="Received: me/small: LocalEntryNotFoundError"):
        hub.load("me/small", revision, offline=True, **options)
    hub.load("me/small", revision, **options)
    before = len(server_state.requests)
    assert hub.load("me/small", revision, offline=True, **options).output_shape == (None, 3)
    assert len(server_state.requests) == before


@pytest.mark.long
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_changed_download_is_rejected(pushed, file):
    server_state, options, revision = pushed
    content = bytearray(server_state.repositories["me/small"][revision][file])
    content[-3] ^= 1
    server_state.replaced_content[file] = bytes(content)
    with pytest.raises(InputError, match=rf"must match the Hub's hash .*{file} with"):
        hub.load("me/small", revision, **options)
    # The cache is verified too.
    with pytest.raises(InputError, match="must match the Hub's hash"):
        hub.load("me/small", revision, offline=True, **options)


@pytest.mark.long
def test_changed_cache_is_rejected(pushed):
    _, options, revision = pushed
    hub.load("me/small", revision, **options)
    (file,) = options["cache"].rglob("snapshots/*/model.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.resolve().write_bytes(content)
    with pytest.raises(InputError, match=r"must match the Hub's hash .*safetensors with"):
        hub.load("me/small", revision, offline=True, **options)


@pytest.mark.long
def test_missing_repositories_revisions_and_models_raise(pushed, tmp_path, monkeypatch):
    server_state, options, _ = pushed
    none = "0" * 40
    for repo, reason in (
        ("me/none", "RepositoryNotFoundError"),
        ("me/small", "RevisionNotFoundError"),
        ("not a name", "HFValidationError"),
    ):
        with pytest.raises(InputError, match=f"Received: {repo}: {reason}") as caught:
            hub.load(repo, none, **options)
        assert "\n" not in str(caught.value)
    other = server_state.commit("me/other", {"pickle.bin": b"\x80\x04.", "README.md": b"hello"})
    with pytest.raises(InputError, match="Received: me/other with neither"):
        hub.load("me/other", other, **options)
    assert not list((options["cache"]).rglob("pickle.bin"))
    # The Hub's client waits 23 s for a server that does not answer.
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
    with pytest.raises(InputError, match=r"Received: me/small: \w+Error"):
        hub.load("me/small", none, endpoint="http://127.0.0.1:9", cache=tmp_path / "empty")


@pytest.mark.long
def test_hosted_model_is_converted(server, tmp_path):
    """keras-io/involution is a SavedModel; only its variables are read."""
    server_state, url = server
    files = {
        f"variables/{file.name}": file.read_bytes() for file in (HOSTED / "variables").iterdir()
    }
    graph = {"saved_model.pb": b"must not be read"}
    revision = server_state.commit("keras-io/involution", {**files, **graph})
    model = hub.load("keras-io/involution", revision, endpoint=url, cache=tmp_path / "cache")
    models.convert.convert(HOSTED, tmp_path / "converted")
    expected = weights.load(tmp_path / "converted")
    x = np.random.default_rng(0).random((2, 32, 32, 3), "float32")
    for kernel, other in zip(model(x), expected(x), strict=True):
        np.testing.assert_allclose(numpy(kernel), numpy(other), rtol=0, atol=1e-6)
    assert not list((tmp_path / "cache").rglob("*.pb"))


@pytest.mark.long
def test_push_requires_a_token_and_a_complete_folder(run, server, tmp_path):
    server_state, url = server
    folder = tmp_path / "folder"
    hub.save(run, LABEL, folder)
    with pytest.raises(InputError, match=r"Received: me/small: HfHubHTTPError: .*401"):
        hub.push(folder, "me/small", token="wrong", endpoint=url)
    # Errors of the client's HTTP library too.
    with pytest.raises(InputError, match=r"Received: me/small: \w*Connect\w*: "):
        hub.push(folder, "me/small", token="right", endpoint="http://127.0.0.1:9")
    (folder / "README.md").unlink()
    with pytest.raises(InputError, match=r"without README\.md"):
        hub.push(folder, "me/small", token="right", endpoint=url)
    assert server_state.repositories == {}


def test_untested_model_is_rejected(run, tmp_path):
    untested = tmp_path / "run"
    shutil.copytree(run, untested)
    metrics = json.loads((untested / "metrics.json").read_text())
    metrics["models"][LABEL]["test_accuracy"] = None
    (untested / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(InputError, match=rf"must have a test accuracy.* Received: {LABEL} in "):
        hub.save(untested, LABEL, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_unsupported_models_are_not_saved(run, tmp_path):
    label = next(name for name in json.loads((run / "metrics.json").read_text())["models"])
    assert label == LABEL
    own = f"{run.parent / 'own.py'}:net"
    for source, label, reason in (
        (run, own, "neither Python files nor"),
        (run, "none", "that has the model"),
        (tmp_path, LABEL, "must be a folder with config.json and metrics.json"),
    ):
        with pytest.raises(InputError, match=reason):
            hub.save(source, label, tmp_path / "new")
    assert not (tmp_path / "new").exists()
