"""Command-line options: declarations, deprecated names, and the commands of version 0.1."""

import ast
import dataclasses
import re
import shlex
import shutil
import subprocess
import sys

import cyclopts
import pytest
from rich.console import Console

import involution_cli
from involution.training import recipes
from involution_cli import commands, options, session
from involution_cli.commands import app, option_names
from involution_cli.options import DEPRECATED_OPTIONS, DEPRECATED_VALUES, replace_deprecated

pytestmark = pytest.mark.any_backend


def parse(words):
    return app.parse_args(words, exit_on_error=False, print_error=False)


@pytest.fixture
def help_of():
    """Returns a function that returns the help text of a command."""

    # Wide enough that no name of an option wraps.
    def help_text(command, width=300):
        console = Console(width=width)
        with console.capture() as capture:
            app.help_print([command], console=console)
        return capture.get()

    return help_text


COMMANDS = [name for name in app if not name.startswith("-")]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns_and_breaks_no_name(command, help_of):
    text = help_of(command, width=80)
    assert max(map(len, text.splitlines())) <= 80
    words = text.split()
    for name in option_names(command):
        # Positional arguments have names too, which the help does not show.
        if name in help_of(command).split():
            assert name in words


@pytest.mark.parametrize("command", COMMANDS)
def test_options_are_in_named_groups(command, help_of):
    titles = re.findall("╭─ (.*?) ─", help_of(command))
    assert len(titles) == len(set(titles))
    assert "Parameters" not in titles
    if command in ("compare", "train"):
        groups = ["Data", "Model", "Training", "Output", "Resume", "Backend", "Distributed"]
        assert titles == groups


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_two_examples_that_parse(command):
    lines = re.findall(r"^    involution (.*)$", app[command].help, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        assert len(f"    involution {line}") <= 80
        function, _, _ = parse(shlex.split(line))
        assert function.__name__ == command


@pytest.mark.parametrize("command", COMMANDS)
def test_paragraphs_of_the_help_have_no_line_breaks(command, help_of):
    """A line of a paragraph ends where the terminal does, not where the source does."""
    text, _, parameters = app[command].help.partition("\n\nParameters\n")
    for paragraph in text.split("\n\n"):
        if not paragraph.startswith("    "):
            assert "\n" not in paragraph
    entries = [line for line in parameters.split("\n") if line.startswith(" ")]
    names = [line for line in parameters.split("\n")[1:] if not line.startswith(" ")]
    assert len(entries) == len(names)


BASH = shutil.which("bash")


@pytest.mark.skipif(BASH is None, reason="requires bash")
def test_completion_of_commands_options_and_choices(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "involution.bash"
    words = ["involution", "--install-completion", "--shell", "bash", "--output", str(file)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        involution_cli.main()
    assert end.value.code == 0
    assert str(file) in (tmp_path / ".bashrc").read_text()
    for words, expected in (
        (["involution", "doc"], {"doctor"}),
        (["involution", "train", "--checkpoint"], {"--checkpoint-every"}),
        (["involution", "doctor", "--backend", "j"], {"jax"}),
    ):
        script = (
            f". {file}; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; "
            "_involution; echo ${COMPREPLY[@]}"
        )
        result = subprocess.run([BASH, "-c", script], capture_output=True, text=True, check=True)
        assert set(result.stdout.split()) == expected


def test_completion_that_cannot_be_written_is_a_one_line_error(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    words = ["--install-completion", "--shell", "bash", "--output", str(tmp_path / "file" / "x")]
    monkeypatch.setattr(sys, "argv", ["involution", *words])
    with pytest.raises(SystemExit) as end:
        involution_cli.main()
    assert end.value.code == 5
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("involution: error: Files must be writable. Received: ")


def test_recipes_import_only_the_standard_library():
    with open(recipes.__file__, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    for node in tree.body:
        if isinstance(node, ast.Import):
            assert all(alias.name in sys.stdlib_module_names for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] in sys.stdlib_module_names


def test_every_config_field_is_an_option_with_its_help():
    fields = {field.name: field for field in dataclasses.fields(recipes.Config)}
    declared = {field.name: field for field in dataclasses.fields(options.TrainingOptions)}
    assert declared.keys() == fields.keys() - {"models"} | {"output", "config", "backend"}
    for name in declared.keys() & fields.keys() - {"epochs", "image_size"}:
        (parameter,) = declared[name].type.__metadata__
        assert parameter.help == f"{fields[name].metadata['help']}."
        assert declared[name].default == fields[name].default


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("recipe", "magic", "example.*one-cycle.*imagenet"),
        ("precision", "float16", "float32.*bfloat16"),
    ],
)
def test_error_lists_the_choices(field, value, text):
    with pytest.raises(cyclopts.CycloptsError, match=text):
        parse(["train", f"--{field}", value])


RENAMED_OPTIONS = [
    (command, old, new)
    for command, names in DEPRECATED_OPTIONS.items()
    for old, new in names.items()
]


@pytest.mark.long
@pytest.mark.parametrize(("command", "old", "new"), RENAMED_OPTIONS, ids=str)
def test_every_deprecated_option_works_and_is_hidden(command, old, new, capsys, help_of):
    is_flag = "allow" in old
    value = {"--show": "groups", "--coordinator": "host:1", "--place": "0,1"}.get(old, "1")
    values = [] if is_flag else [value]
    for words in ([old, *values], [old.replace("-", "_").replace("__", "--", 1), *values]):
        replaced = replace_deprecated([command, *words])
        assert capsys.readouterr() == ("", f"involution: warning: {old} is deprecated, use {new}\n")
        assert replaced == [command, new, *values]
        assert parse(replaced) == parse([command, new, *values])
    if not is_flag:
        assert replace_deprecated([command, f"{old}={value}"]) == [command, f"{new}={value}"]
    names = option_names(command)
    assert new in names
    assert old not in names
    words = help_of(command).split()
    assert old not in words
    assert new in words


@pytest.mark.parametrize(
    ("command", "option", "old", "new"),
    [(*key, old, new) for key, names in DEPRECATED_VALUES.items() for old, new in names.items()],
)
def test_every_deprecated_value_works_and_is_hidden(command, option, old, new, capsys, help_of):
    for words, want in (
        ([option, old], [option, new]),
        ([f"{option}={old}"], [f"{option}={new}"]),
    ):
        assert replace_deprecated([command, *words]) == [command, *want]
        line = f"involution: warning: {old} is deprecated, use {new}\n"
        assert capsys.readouterr().err == line
        parse([command, *want])
    text = help_of(command).split(f"│ {option} ")[1]
    # Only the list of choices is searched: the rest of the help may contain the old value.
    text = text.split("choices:")[1].split("]")[0] if command == "explain" else text
    words = re.findall(r"[\w-]+", text)
    assert new in words
    assert old not in words


def test_current_names_and_positional_arguments_are_unchanged():
    words = ["train", "--model", "inn", "--ema-momentum", "0.9", "--resume"]
    assert replace_deprecated(words) == words
    # Unchanged: values of other options, file names, and everything after `--`.
    words = ["explain", "maps", "--output", "maps", "--", "--show", "maps"]
    assert replace_deprecated(words) == words
    assert replace_deprecated([]) == []
    assert replace_deprecated(["bench", "--candidates", "native,patches,two-steps"]) == [
        "bench",
        "--candidates",
        "native,im2col,unfused",
    ]


def test_error_names_the_current_option(monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["involution", "train", "--accumulate", "0"])
    with pytest.raises(SystemExit) as exit_info:
        involution_cli.main()
    assert exit_info.value.code == 2
    warning, *_, error = capfd.readouterr().err.splitlines()
    assert warning == (
        "involution: warning: --accumulate is deprecated, use --gradient-accumulation-steps"
    )
    assert error == (
        "involution: error: --gradient-accumulation-steps must be at least 1. Received: 0"
    )


def test_messages_rename_only_options_of_the_command():
    message = "`batch_size` must suit `filters` and `resume`"
    assert session.with_options(message, option_names("train")) == (
        "--batch-size must suit `filters` and --resume"
    )
    assert session.with_options(message, option_names("predict")) == message


# The command lines in the documentation of version 0.1.
DOCUMENTED = r"""
compare --dataset digits
compare --dataset digits --backend torch
compare --dataset cifar10 --download
compare --models inn:kernel_size=5,my_models.py:my_function
compare --dataset my_images --image-size 64
compare --models rednet_tiny,cnn --dataset cifar10 --recipe one-cycle
compare --models rednet_tiny:kernel_generator=linear --dataset cifar10-jpeg --recipe \
    one-cycle --epochs 8
compare --dataset cifar10 --precision bfloat16 --seed 42
compare --dataset cifar10 --output runs/pair --resume --checkpoint-every 100
compare --dataset cifar10 --output runs/pair --resume --allow-change
train --model rednet50 --dataset imagenet --recipe imagenet --accumulate 8 --precision \
    bfloat16 --ema 0.9999
train --model rednet_tiny --dataset cifar10 --backend jax --devices 4
train --model rednet_tiny --dataset cifar10 --backend jax --output /shared/run \
    --coordinator first-host:12345 --num-hosts 2 --host-id 0
train --model rednet_tiny --dataset my_images --image-size 64x48 --recipe one-cycle \
    --weight-decay 0.1 --learning-rate 0.01 --clip-norm 1 --batch-size 8
sweep kernel_size=3,5,7 learning_rate=0.001..0.03 --dataset cifar10 --trials 40
sweep widths=24-40,32-48 kernel_size=3,5 --model rednet_tiny --dataset half --recipe \
    one-cycle --epochs 3 --validation 5000 --trials 40 --max-parameters 31917
sweep kernel_size=3,5 --study postgresql://host/name
predict runs/digits/inn.keras image.png --top 2
predict cnn-cifar10 image.png
explain runs/my_images/rednet_tiny.keras photo.jpg --output photo.html
explain photo.jpg --show maps
explain photo.jpg --show outputs
explain photo.jpg --show place --place 0.2,0.8
explain photo.jpg --show groups
convert rednet50.pth rednet50
export rednet50 --image-size 224
export model.keras --format pt2 --output model.pt2
export model.keras --format saved_model
export rednet_tiny-cifar10 --preprocess
export model.keras --format tflite
demo
demo runs/my_images/rednet_tiny.keras --host 0.0.0.0 --port 0
doctor --backend jax
bench
bench --candidates fused,two-steps --memory
bench --cases tut,red1 --candidates native,taps,patches,conv3,depthwise --calls 2 \
    --backend tensorflow --output operator.csv
bench --device cuda --batch 64 --seconds 0.2 --dtypes float32,bfloat16 --candidates \
    triton,per-number,patches,compiled-taps
"""


@pytest.mark.parametrize("line", DOCUMENTED.replace("\\\n", "").strip().split("\n"))
def test_documented_commands_still_parse(line):
    words = shlex.split(line)
    function, _, _ = parse(replace_deprecated(words))
    assert function.__name__ == words[0]


def run_main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["involution", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        involution_cli.main()
    return ended.value.code


def test_options_of_a_file_are_overridden_by_the_command_line(tmp_path, monkeypatch):
    received = []
    monkeypatch.setattr(commands, "_run", lambda *arguments: received.append(arguments))
    content = {
        "a.yaml": "models: cnn\nepochs: 3\nbatch-size: 7\ntensorboard: true\nimage-size: 8x9\n",
        "a.toml": "models = 'cnn'\nepochs = 3\nbatch_size = 7\ntensorboard = true\n"
        "image_size = '8x9'\n",
    }
    for name, text in content.items():
        (tmp_path / name).write_text(text)
        for words in (["--config", tmp_path / name], [f"--config={tmp_path / name}"]):
            run_main(monkeypatch, "compare", *words, "--epochs", "4")
            _, _, models, training, *_ = received.pop()
            assert models == "cnn"
            assert (training.epochs, training.batch_size, training.seed) == (4, 7, 42)
            assert (training.tensorboard, training.image_size) == (True, "8x9")
    # Not kept for the next command.
    run_main(monkeypatch, "compare")
    assert received.pop()[3].epochs is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "epochz: 3", 'Unknown option: "[epochz]"'),
        ("a.toml", "epochs = 'many'", "Invalid value"),
        ("a.yaml", "[", "parsing"),
        ("a.toml", "epochs = ", "must be a valid YAML or TOML file in UTF-8. Received: "),
        ("a.yaml", b"dataset: h\xe9", "in UTF-8. Received: "),
        ("a.toml", b"\xef\xbb\xbfepochz = 3", 'Unknown option: "[epochz]"'),
        ("a.json", "{}", "--config must be an existing .yaml or .toml file. Received: "),
        (None, "", "--config must be an existing .yaml or .toml file. Received: none"),
    ],
)
def test_invalid_files_of_options_are_one_line_errors(
    name, text, message, tmp_path, monkeypatch, capfd
):
    words = ["--config"]
    if name is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        words.append(tmp_path / name)
    assert run_main(monkeypatch, "compare", *words) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line


def test_train_takes_a_model_or_a_trained_one(monkeypatch, capfd):
    received = []
    monkeypatch.setattr(commands, "_run", lambda *arguments: received.append(arguments[2]))
    for words, expected in (
        ([], "inn"),
        (["--model", "cnn"], "cnn"),
        (["--init-from", "inn-cifar10"], "inn-cifar10"),
    ):
        run_main(monkeypatch, "train", *words)
        assert received.pop() == expected
    assert run_main(monkeypatch, "train", "--model", "cnn", "--init-from", "inn-cifar10") == 2
    assert "At most one of --model and --init-from" in capfd.readouterr().err
