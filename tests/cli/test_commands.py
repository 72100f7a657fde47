"""Commands, run in this process as the console script runs them; `compare` in a subprocess."""

import json
import os
import pathlib
import re
import subprocess
import sys
from importlib import metadata

import keras
import pytest

import involution
import involution_cli
from involution.benchmarking import doctor
from involution.ops.cases import CASES
from involution.ops.native import library
from involution.utils import environment
from involution.utils.errors import escape_controls
from involution.utils.progress import RichProgress
from involution_cli import session
from tests.support.backends import IMPLEMENTATIONS
from tests.support.images import write_folder, write_image
from tests.support.paths import FILES

pytestmark = pytest.mark.any_backend

BACKEND = keras.config.backend()
COMMANDS = (
    "compare",
    "train",
    "predict",
    "explain",
    "bench",
    "convert",
    "export",
    "demo",
    "doctor",
)
HOSTED = FILES / "hosted"


@pytest.fixture
def call(monkeypatch, capfd, tmp_path):
    """Returns a function that runs a command line in an empty folder and returns (exit code, lines
    of standard output, and of an error). Its attribute ``messages`` has the messages of the last
    call; standard error contains only these, because frameworks write to the log."""
    monkeypatch.chdir(tmp_path)
    log = RichProgress.log

    def record(progress, text):
        run.messages.append(escape_controls(text))
        log(progress, text)

    monkeypatch.setattr(RichProgress, "log", record)

    def run(*arguments):
        run.messages = []
        monkeypatch.setattr(sys, "argv", ["involution", *map(str, arguments)])
        code = 0
        try:
            involution_cli.main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capfd.readouterr()
        errors = err.splitlines()
        error = [errors.pop()] if code > 1 else []
        first = [line for line in errors[:1] if line.startswith("involution: ")]
        assert errors == [*first, *run.messages], err
        return code, [*out.splitlines(), *error]

    return run


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("cli") / "pets")


@pytest.fixture(scope="module")
def trained(pets, tmp_path_factory):
    """The output folder of a short run of `compare`, and its completed process."""
    output = tmp_path_factory.mktemp("cli") / "the $run"
    command = ["compare", "--dataset", pets, "--epochs", "1", "--output", output]
    result = subprocess.run(
        [sys.executable, "-m", "involution_cli", *command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert result.returncode == 0, result.stdout
    return output, result


@pytest.mark.long
def test_compare_prints_a_table_and_the_next_commands(trained):
    output, result = trained
    messages = result.stderr.splitlines()
    assert messages[0].startswith("involution: Comparing cnn,inn on ")
    assert any(line.startswith("inn: epoch 1/1: train loss ") for line in messages)
    for stage in (f"Importing Keras with {BACKEND}", "inn: compiling the first step"):
        assert stage in messages
    assert messages[-2:] == [
        f"Next: involution predict '{output / 'inn.keras'}' IMAGE...",
        f"      involution explain '{output / 'inn.keras'}' IMAGE...",
    ]
    sentence, _, *table, _, report = result.stdout.splitlines()
    assert re.match(r"After 1 epoch, cnn is \d", sentence)
    assert table[0].split() == ["model", "cnn", "inn"]
    assert len({len(line) for line in table[:-1]}) == 1
    assert report == f"Report: {output / 'report.html'}"
    assert (output / "log.txt").is_file()
    command = json.loads((output / "config.json").read_text())["command"]
    assert command.startswith("involution compare --dataset")


@pytest.mark.long
def test_train_writes_a_model(call, pets, tmp_path):
    code, lines = call("train", "--model", "cnn", "--dataset", pets, "--epochs", "1")
    assert code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("pets-")
    assert (folder / "cnn.keras").is_file()
    assert "cnn reaches an accuracy of" in "".join(lines)
    assert call.messages[-1] == (
        f"Next: involution predict {folder.relative_to(tmp_path)}/cnn.keras IMAGE..."
    )


def test_predict_prints_the_most_probable_classes(call, trained, pets):
    image = pets / "test" / "cat" / "0.png"
    code, lines = call("predict", trained[0] / "cnn.keras", image, image, "--top", "2")
    assert code == 0
    assert len(lines) == 2
    found = re.fullmatch(rf"{image}: (\w+) (0\.\d+|1\.000), (\w+) (0\.\d+)", lines[0])
    assert {found[1], found[3]} < {"ant", "bee", "cat"}
    assert float(found[2]) >= float(found[4])
    assert lines[0] == lines[1]


def test_predict_of_folders_as_json_and_csv(call, tmp_path):
    root = tmp_path / "photos"
    for number, name in enumerate(("b.png", "a.png", "more/c.png")):
        write_image(root / name, seed=number)
    (root / "x.svg").touch()
    (root / ".hidden.png").touch()
    code, lines = call("predict", "inn-cifar10", root, "--json", "--top", "2")
    assert code == 0
    found = json.loads("\n".join(lines))
    names = [str(root / name) for name in ("a.png", "b.png", "more/c.png")]
    assert [entry["file"] for entry in found] == names
    for entry in found:
        first, second = (p["probability"] for p in entry["predictions"])
        assert 1 >= first >= second >= 0
    assert f"Skipped images: 1 in .svg format, such as {root}/x.svg." in call.messages
    # Valid in every encoding of standard output.
    write_image(tmp_path / "고양이.png")
    _, lines = call("predict", "inn-cifar10", tmp_path / "고양이.png", "--json")
    assert "\n".join(lines).isascii()
    assert json.loads("\n".join(lines))[0]["file"] == str(tmp_path / "고양이.png")
    code, lines = call("predict", "inn-cifar10", root, "--csv", "--top", "1")
    assert lines == [
        "file,rank,class,probability",
        *(
            f"{e['file']},1,{e['predictions'][0]['class']},{e['predictions'][0]['probability']}"
            for e in found
        ),
    ]


def test_predict_names_unreadable_images_and_classifies_the_others(call, tmp_path):
    write_image(tmp_path / "good.png")
    for name in ("bad.png", "worse.png"):
        (tmp_path / name).write_bytes(b"text")
    code, lines = call("predict", "inn-cifar10", tmp_path)
    assert code == 2
    assert lines[0].startswith(f"{tmp_path}/good.png: ")
    assert lines[1].startswith("involution: error: 2 of 3 images cannot be read. An image must be")
    assert lines[1].endswith(f"Received: {tmp_path}/bad.png")
    assert call.messages[-1].startswith("Not read: An image must be a valid PNG")
    assert call.messages[-1].endswith(f"Received: {tmp_path}/worse.png")


def test_predict_refuses_empty_folders_and_two_formats(call, tmp_path):
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([tmp_path / "empty"], f"must contain images. Received: {tmp_path}/empty, without any"),
        ([tmp_path / "empty", "--json", "--csv"], "At most one of --json and --csv"),
    ):
        code, lines = call("predict", "inn-cifar10", *words)
        assert (code, message in lines[-1]) == (2, True)


@pytest.mark.parametrize(
    ("error", "received"),
    [
        (MemoryError(), "MemoryError"),
        (MemoryError("Unable to allocate 5 GiB"), "Unable to allocate 5 GiB"),
        (
            RuntimeError(
                "Conv2D.call():\n[enforce] DefaultCPUAllocator: can't allocate memory: 9 B"
            ),
            "[enforce] DefaultCPUAllocator: can't allocate memory: 9 B",
        ),
        (
            ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."),
            "RESOURCE_EXHAUSTED: O",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 9 GiB"), "CUDA out of memory. Tried"),
    ],
)
def test_out_of_memory_has_its_own_exit_code(error, received, tmp_path):
    message, code = session.explain_error(error, tmp_path / "log.txt")
    assert code == 7
    assert message.startswith("Out of memory; ")
    assert f"Received: {received}" in message
    assert not (tmp_path / "log.txt").exists()


def test_out_of_memory_while_importing_keras_has_its_own_exit_code(tmp_path):
    """Handling the error must not require the package, which is only partly imported."""
    code = (
        "import sys, involution_cli\n"
        "class OutOfMemoryFinder:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'keras': raise MemoryError('Unable to allocate 5 GiB')\n"
        "sys.meta_path.insert(0, OutOfMemoryFinder())\n"
        "sys.argv = ['involution', 'doctor']\n"
        "involution_cli.main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 7, result.stderr
    assert result.stderr.endswith("Received: Unable to allocate 5 GiB\n")


def test_permission_errors_name_the_path(tmp_path):
    log = tmp_path / "log.txt"
    prefix = "Files and folders must be accessible to this user. Received: "
    for error, received in (
        (PermissionError(13, "Permission denied", "/x/y"), "/x/y: Permission denied"),
        (PermissionError("not here"), "not here"),
    ):
        assert session.explain_error(error, log) == (prefix + received, 2)
    assert not log.exists()


def test_missing_temporary_folder_is_a_write_error(call, monkeypatch):
    def fail(**_):
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("tempfile.mkdtemp", fail)
    code, lines = call("doctor")
    assert code == 5
    assert lines[-1].startswith(
        "involution: error: The temporary folder must be writable. Received: [Errno 2] No"
    )


@pytest.mark.long
def test_explain_prints_the_layers_and_writes_a_figure(call, trained, pets, tmp_path):
    image = pets / "test" / "ant" / "1.png"
    code, lines = call("explain", trained[0] / "inn.keras", image)
    assert code == 0
    assert re.search(r"inv_1 16x16 from .* inv_2 8x8 from .* inv_3 4x4 from ", lines[0])
    assert re.search(r"^Implementations in inference: \d x \w+(, \d x \w+)*; ", lines[1])
    assert lines[2] == "Figure: explain.png"
    assert (tmp_path / "explain.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
@pytest.mark.parametrize("figure", ["heatmap", "activations", "point", "groups"])
def test_figures_are_reproducible(call, trained, pets, tmp_path, figure):
    image = pets / "test" / "ant" / "1.png"
    arguments = ("explain", trained[0] / "inn.keras", image, "--figure", figure, "--point", "0,1")
    for file in ("a.svg", "b.svg"):
        code, lines = call(*arguments, "--output", file)
        assert code == 0
        assert lines[-1] == f"Figure: {file}"
    a, b = ((tmp_path / file).read_bytes() for file in ("a.svg", "b.svg"))
    assert a.startswith(b"<?xml")
    assert a == b


def test_use_of_the_kernels(call, trained, pets, tmp_path):
    images = [pets / "test" / "ant" / f"{i}.png" for i in range(2)]
    arguments = ("explain", trained[0] / "inn.keras", *images, "--figure", "use")
    code, lines = call(*arguments, "--output", "use.svg")
    assert code == 0
    assert lines[0] == "Fraction of the images whose class stays the same:"
    assert [line.split()[0] for line in lines[2:5]] == ["inv_1", "inv_2", "inv_3"]
    assert re.fullmatch(r"all layers( +[01]\.\d{3}){4}", lines[5])
    assert lines[-1] == "Figure: use.svg"
    code, lines = call(*arguments, "--output", "use.html")
    assert code == 0
    assert (tmp_path / "use.html").read_text().count("data:image/png;base64,") == 9


@pytest.mark.long
def test_html_page_is_self_contained(call, trained, pets, tmp_path):
    images = [pets / "test" / "ant" / f"{i}.png" for i in range(2)]
    code, lines = call("explain", trained[0] / "inn.keras", *images, "--output", "page.html")
    assert code == 0
    assert lines[-1] == "Page: page.html"
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 8
    assert page.count("<h2>") == 2
    assert all(str(image) in page for image in images)
    assert not re.search(r"https?://|<script", page)


@pytest.mark.long
def test_converted_model_can_be_exported(call, tmp_path):
    code, lines = call("convert", HOSTED, "folder")
    assert code == 0
    assert lines[0].startswith("inn from a TensorFlow checkpoint: 24 tensors, ")
    assert lines[-1] == "Model: folder"
    code, lines = call("export", "folder", "--image-size", "12x8")
    assert code == 0
    assert re.fullmatch(
        r"folder\.onnx: [\d,]+ bytes, input to output_0, output_1, output_2, any batch size, "
        r"in \d+ s",
        lines[0],
    )
    assert re.fullmatch(
        r"verified: for batches of 1 and 5 the outputs of onnxruntime \S+ match; "
        r"maximum relative error \d\.\de[-+]\d\d",
        lines[1],
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "folder.onnx"]


@pytest.mark.long
def test_pretrained_model_is_exported_by_name_with_its_class_names(call, tmp_path):
    code, lines = call("export", "cnn-cifar10", "--preprocess")
    assert code == 0
    assert lines[0].startswith("cnn-cifar10.onnx: ")
    import onnx

    entries = {e.key: e.value for e in onnx.load(tmp_path / "cnn-cifar10.onnx").metadata_props}
    assert json.loads(entries["class_names"])[-1] == "truck"
    assert entries["outputs"] == "logits"


@pytest.mark.slow
def test_trained_model_can_be_exported(call, trained, tmp_path):
    format = {"tensorflow": "saved_model", "jax": "onnx", "torch": "pt2"}[BACKEND]
    code, lines = call("export", trained[0] / "inn.keras", "--format", format)
    assert code == 0
    name = "inn_saved_model" if format == "saved_model" else f"inn.{format}"
    assert lines[0].startswith(f"{name}: ")
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_doctor_ends_with_a_verdict(call):
    code, lines = call("doctor")
    assert code == 0
    assert f"{BACKEND}:".ljust(13) + f" {version(BACKEND)} (in use)" in lines
    values = {name: value.strip() for name, _, value in (line.partition(": ") for line in lines)}
    assert values["GPU"]
    core = f"{library.targets()[-1]}, of " if library.targets() else "the package was installed"
    assert values["native core"].startswith(core)
    for package in ("onnx", "onnxruntime", "gradio", "optuna"):
        assert re.match(r"\d|not installed: pip install 'involution\[\w+\]' \(", values[package])
    checked = [m[1] for line in lines if (m := re.match(r"  red1  (\w+) +error \d\.", line))]
    fused = ["fused"] if "native" in IMPLEMENTATIONS else []
    assert checked == [*(n for n in IMPLEMENTATIONS if n != "triton"), *fused]
    assert lines[-1] == (
        "verdict:      OK: results agree (one case; --all: all cases)"
        if "native" in IMPLEMENTATIONS
        else "verdict:      OK, but slow without the native core (one case; --all: all cases)"
    )


def version(name):
    found = environment.versions()
    return found.get(name) or found[f"{name}-cpu"]


def test_doctor_names_the_command_for_a_missing_package(call, monkeypatch):
    installed = metadata.version

    def find(name):
        if name in ("gradio", "onnx"):
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(doctor.metadata, "version", find)
    monkeypatch.setattr(doctor, "_eager", lambda case: [])
    code, lines = call("doctor")
    assert code == 0
    assert "gradio:       not installed: pip install 'involution[demo]' (the web demo)" in lines
    assert "onnx:         not installed: pip install 'involution[export]' (ONNX files)" in lines


@pytest.mark.long
def test_doctor_prints_the_selected_implementations_of_all_cases(call):
    code, lines = call("doctor", "--all")
    assert code == 0
    selected = [
        m[1]
        for line in lines
        if (m := re.search(r"(\w+) +error \d\.\de[+-]\d\d \(selected\)", line))
    ]
    few_channels = "taps" if BACKEND == "jax" else IMPLEMENTATIONS[0]
    assert selected == [few_channels] + (len(CASES) - 1) * [IMPLEMENTATIONS[0]]
    fused = [line for line in lines if " fused " in line]
    assert len(fused) == len(CASES)
    has_native = "native" in IMPLEMENTATIONS
    assert all(("error" if has_native else "unavailable") in line for line in fused)
    assert any("(selected for generated kernels)" in line for line in fused) == has_native
    assert lines[-1].startswith("verdict:      OK")
    assert lines[-1].endswith(f" ({len(CASES)} cases, compiled)")


@pytest.mark.parametrize("options", [[], ["--all"]])
@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_doctor_fails_on_a_wrong_implementation(call, monkeypatch, options, factor):
    from involution.ops import api, dispatch, reference

    class Wrong:
        unsupported_reason = staticmethod(lambda problem: None)
        apply = staticmethod(lambda *a: reference.apply(*a) * factor)

    class Absent:
        unsupported_reason = staticmethod(lambda problem: "no such machine")

    implementations = {"absent": Absent, "taps": Wrong, "reference": reference}
    implementations = dispatch.IMPLEMENTATIONS | implementations
    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", implementations)
    monkeypatch.setattr(api, "IMPLEMENTATIONS", implementations)
    monkeypatch.setattr(dispatch, "PREFERENCE", ("absent", "taps", "reference"))
    monkeypatch.setattr(doctor, "CASES", CASES[:1])
    code, lines = call("doctor", *options)
    assert code == 1
    assert any("taps" in line and "WRONG: exceeds 1e-05 (selected)" in line for line in lines)
    reason = any("absent     unavailable: no such machine" in line for line in lines)
    assert reason == (options == ["--all"])
    assert lines[-1] == "verdict:      WRONG results: taps; please report"


def invalid_commands(root, trained):
    """(arguments, part of the error message) of invalid commands."""
    ok = ["--dataset", write_folder(root / "ok")]
    empty = root / "empty"
    empty.mkdir()
    broken = write_folder(root / "broken")
    write_image(broken / "train" / "ant" / "bad.jpg", size=(64, 64))
    image_bytes = (broken / "train" / "ant" / "bad.jpg").read_bytes()
    (broken / "train" / "ant" / "bad.jpg").write_bytes(image_bytes[: len(image_bytes) // 2])
    untested = root / "untested"
    write_image(untested / "train" / "ant" / "0.png")
    single = write_folder(root / "single", classes=("ant",))
    (root / "used").mkdir()
    (root / "used" / "x").write_text("")
    (root / "text.png").write_text("no image")
    image = root / "ok" / "test" / "ant" / "0.png"
    inn, cnn = trained[0] / "inn.keras", trained[0] / "cnn.keras"
    return [
        (["compare", "--dataset", "mnist"], "Received: mnist"),
        (["compare", *ok, "--models", "resnet"], "Received: resnet"),
        (["compare", "--dataset", empty], "without train/"),
        (["compare", "--dataset", untested], "without test/"),
        (["compare", "--dataset", broken], "bad.jpg (1 of 37 files cannot be read)"),
        (["compare", "--dataset", single], "at least two classes"),
        (["compare", *ok, "--output", root / "used"], "new or empty"),
        (["compare", *ok, "--output", root / "text.png" / "x"], "writable"),
        (["compare", *ok, "--epochs", "0"], "--epochs must be at least 1. Received: 0"),
        (["compare", *ok, "--epochs", "many"], "many"),
        (["compare", *ok, "--image-size", "0x5"], "--image-size must be a positive side"),
        (["compare", *ok, "--image-size", "5x5x5"], "--image-size must be a positive side"),
        (["compare", *ok, "--image-size", "2"], "at least 4"),
        (["compare", "--unknown"], "unknown"),
        (["compare", *ok, "--backend", "theano"], "theano"),
        (["paint"], "paint"),
        (["train", *ok, "--model", "x.py"], "must exist"),
        (["predict", root / "none.keras", image], "does not exist"),
        (["predict", root / "text.png"], "text.png"),
        (["predict", cnn, root / "none.png"], "file: No such file or directory. Received: "),
        (["predict", cnn, root / "text.png"], "text.png"),
        (["predict", cnn], "At least one image is required"),
        (["predict", cnn, image, "--top", "0"], "--top must be at least 1"),
        (["explain", cnn, image], "must have an involution with two spatial dimensions"),
        (
            ["explain", inn, image, "--output", root / "none" / "x.png"],
            "folder of the output file must exist",
        ),
        (["explain", inn, image, "--output", root / "x.gif"], "must be a .png, .svg or .html"),
        (["explain", inn, image, image, "--figure", "groups"], "requires a single image"),
        (["explain", inn, image, "--figure", "use"], "requires at least two images. Received: 1"),
        (["explain", inn, image, "--point", "0.5"], "Received: 0.5"),
        (["explain", inn, image, "--point", "0.5,nan"], "Received: 0.5, nan"),
        (["explain", inn, image, "--point", "a,b"], "--point must be ROW,COLUMN"),
        (["convert", root / "none.pth", root / "new"], "none.pth"),
        (["convert", root / "text.png", root / "new"], "must be a PyTorch .pth file"),
        (["convert", root / "ok", root / "new"], "a folder without variables"),
        (["convert", HOSTED, root / "used"], "new or empty"),
        (["convert", HOSTED, root / "text.png" / "x"], "writable"),
        (["export", root / "none.keras"], "which does not exist"),
        (["export", root / "text.png"], "must be a valid .keras file"),
        (["export", root / "used"], "must contain config.json and model.safetensors"),
        (["export", cnn, "--image-size", "9"], "Received: a model for images of (16, 16, 3)"),
        (["export", cnn, "--output", root / "none" / "x.onnx"], "none/x.onnx"),
        (["export", cnn, "--format", "coreml"], "coreml"),
    ]


@pytest.mark.long
def test_invalid_input_gives_a_one_line_error_and_writes_nothing(call, trained, tmp_path):
    cases = invalid_commands(tmp_path, trained)
    before = sorted(tmp_path.rglob("*"))
    for arguments, expected in cases:
        code, lines = call(*arguments)
        assert code == 2, arguments
        assert expected in lines[-1], arguments
        assert lines[-1].startswith("involution: error: ")
        assert len(lines) == 1, arguments
        assert sorted(tmp_path.rglob("*")) == before, arguments


@pytest.mark.long
def test_unknown_backend_fails_and_stale_keras_json_warns(tmp_path, trained):
    def run(code, **environment):
        env = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
        env |= {"KERAS_HOME": str(tmp_path), "TMPDIR": str(tmp_path), **environment}
        command = [sys.executable, "-c", code + "import involution_cli as c; c.main()", "predict"]
        return subprocess.run(
            [*command, str(trained[0] / "cnn.keras"), "x.png"],
            capture_output=True,
            text=True,
            check=False,
            env=env,
        )

    result = run("", KERAS_BACKEND="theano")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.endswith("Received: KERAS_BACKEND=theano\n")
    assert len(result.stderr.splitlines()) == 2
    (tmp_path / "keras.json").write_text('{"backend": "theano"}')
    result = run("")
    assert "Keras is configured for theano, which is not installed: using" in result.stderr
    assert [f.name for f in tmp_path.iterdir()] == ["keras.json"]


@pytest.mark.long
def test_names_that_the_terminal_cannot_encode_are_escaped(trained, pets):
    image = pets / "猫.png"
    image.write_bytes((pets / "test" / "ant" / "0.png").read_bytes())
    result = subprocess.run(
        [sys.executable, "-m", "involution_cli", "predict", trained[0] / "cnn.keras", image],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert result.returncode == 0, result.stderr
    assert "\\u732b.png: " in result.stdout


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux only")
def test_paths_that_are_not_utf8_are_escaped(call, pets, tmp_path):
    """Such paths appear in config.json, the report and the printed command."""
    data, output = (tmp_path / os.fsdecode(name) for name in (b"p\xe9ts", b"r\xfcn"))
    data.symlink_to(pets)
    arguments = ("train", "--model", "cnn", "--dataset", data, "--epochs", "1", "--output", output)
    code, lines = call(*arguments)
    assert code == 0
    assert (
        call.messages[-1] == f"Next: involution predict '{tmp_path}/r\\udcfcn/cnn.keras' IMAGE..."
    )
    assert json.loads((output / "config.json").read_text())["dataset"] == str(data)
    assert "r\\udcfcn" in (output / "report.html").read_text()
    assert call(*arguments, "--resume")[0] == 0
    image = tmp_path / os.fsdecode(b"\xe9.png")
    image.symlink_to(pets / "test" / "ant" / "0.png")
    code, lines = call("predict", output / "cnn.keras", image)
    assert code == 0
    assert lines[-1].startswith(f"{tmp_path}/\\udce9.png: ")
    # A class name is stored in the model, so it must be valid UTF-8.
    for part in ("train", "test"):
        write_image(tmp_path / "latin" / part / os.fsdecode(b"\xe9") / "0.png")
    code, lines = call("train", "--dataset", tmp_path / "latin", "--output", "new")
    assert (code, len(lines)) == (2, 1)
    assert lines[-1].endswith(f"Received: \\udce9 in {tmp_path}/latin/train")
    assert not (tmp_path / "new").exists()


def test_internal_error_gives_one_line_and_keeps_the_log(call, trained, pets, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("involution.saving.classifier.load", fail)
    code, lines = call("predict", trained[0] / "cnn.keras", pets / "test" / "ant" / "0.png")
    assert code == 3
    log = re.search(
        r"Internal error \(RuntimeError\); traceback in (\S+); please report it$", lines[-1]
    )[1]
    assert "RuntimeError: two" in pathlib.Path(log).read_text()


def test_keyboard_interrupt_gives_a_one_line_error(call, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("involution.data.datasets.load", fail)
    code, lines = call("compare")
    assert code == 130
    assert lines[-1] == "involution: error: interrupted."


@pytest.mark.long
def test_help_does_not_import_the_package():
    """Help is fast because it imports neither Keras nor `involution`."""
    code = (
        "import sys, involution_cli\n"
        "try: involution_cli.main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('keras', 'involution', 'numpy') if m in sys.modules])\n"
    )
    for arguments in ([], ["--help"], *([c, "--help"] for c in COMMANDS)):
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
        )
        assert result.stdout.strip().endswith("[]"), result.stdout
        assert "Usage: involution" in result.stdout


def test_version_is_printed(call):
    code, lines = call("--version")
    assert (code, lines) == (0, [involution.__version__])


def test_missing_backend_gives_a_one_line_error(tmp_path):
    code = (
        "import importlib.util, sys\n"
        "find_spec = importlib.util.find_spec\n"
        "names = ('tensorflow', 'jax', 'torch')\n"
        "importlib.util.find_spec = lambda n, *a: None if n in names else find_spec(n, *a)\n"
        "import involution_cli; sys.argv = ['involution', 'doctor']; involution_cli.main()\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(
        "involution: error: No Keras backend is installed: pip install "
    )
