"""The architecture, and what documents promise."""

import ast
import doctest
import importlib.util
import pathlib
import re
import sys

import pytest
import yaml
from frameworks import BACKEND

import involution
import involution_cli
from involution.ops import native

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "involution"

# Reading order: a module imports only what stands above it.
ORDER = [
    "backend",
    "errors",
    "files",
    "memory",
    "ahead",
    "crops",
    "image_files",
    "outline",
    "keras_files",
    "stored_images",
    "ops.geometry",
    "ops.problem",
    "ops.views",
    "ops.gradients",
    "ops.taps",
    "ops.native_library",
    "ops.native_call",
    "ops.fused_gradients",
    "ops.native_jax",
    "ops.native_tensorflow",
    "ops.torch_operations",
    "ops.native_torch",
    "ops.native",
    "ops.triton_kernels",
    "ops.triton_torch",
    "ops.triton",
    "ops.fused",
    "ops.reference",
    "ops.rows",
    "ops.api",
    "ops",
    "ops.cases",
    "pointwise",
    "kernel_generators",
    "layers",
    "models.classifiers",
    "models.rednet",
    "models.flops",
    "models.twins",
    "models.table",
    "models.checkpoints.errors",
    "models.checkpoints.arrays",
    "models.checkpoints.pickles",
    "models.checkpoints.pytorch",
    "models.checkpoints.paddle",
    "models.checkpoints.tensorflow",
    "models.checkpoints",
    "models.weights",
    "models.shipped",
    "models",
    "models.formulas",
    "models.convert",
    "export",
    "data",
    "saved_model",
    "model_labels",
    "checkpoint",
    "cluster",
    "training",
    "looking",
    "visualize",
    "pages",
    "report",
    "experiment",
    "sweep",
    "programs",
    "yardsticks",
    "per_number",
    "devices",
    "benchmark",
    "explaining",
    "hub",
    "answers",
    "app",
    "diagnosis",
    "console",
]


def name_of(file):
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


modules = {name_of(file): file for file in PACKAGE.rglob("*.py")}


def imports(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "involution":
            for alias in node.names:
                full = f"{node.module}.{alias.name}".removeprefix("involution.")
                yield full if full in modules else node.module.removeprefix("involution.")


def test_every_module_has_its_place():
    assert sorted(ORDER) == sorted(name for name in modules if name)


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_towards_the_operator(name):
    for other in imports(modules[name]):
        assert ORDER.index(other) < ORDER.index(name), (name, other)


# Where dependencies keep what they do not publish, besides names that begin with an underscore.
INTERNAL = ("keras.src", "tensorflow.python")


def private(name):
    return re.fullmatch("_[^_].*", name)


def foreign(path):
    """Whether a module comes with a dependency."""
    first = path.split(".")[0]
    return first not in sys.stdlib_module_names and not first.startswith("involution")


def private_uses(code):
    """What code takes of its dependencies though they do not publish it, and what it takes of
    itself by no name of its own; but for what it can do without."""
    nodes = list(ast.walk(ast.parse(code)))
    tries = [node for node in nodes if isinstance(node, ast.Try)]
    spared = {
        node
        for attempt in tries
        if any("ImportError" in ast.unparse(h.type) for h in attempt.handlers if h.type)
        for statement in attempt.body
        for node in ast.walk(statement)
    }
    paths, own = {}, set()
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom) and node not in spared:
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            paths |= {a.asname or a.name.split(".")[0]: prefix + a.name for a in node.names}
        elif isinstance(node, ast.FunctionDef):
            own.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            own.add(node.attr)
    for path in filter(foreign, paths.values()):
        if path.startswith(INTERNAL) or any(map(private, path.split("."))):
            yield path
    for node in nodes:
        if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own:
            name = ast.unparse(node)
            if foreign(paths.get(name.split(".")[0], "dependency")):
                yield name


def test_f15_dependencies_are_used_as_they_are_published():
    for file in (*modules.values(), pathlib.Path(involution_cli.__file__)):
        assert list(private_uses(file.read_text(encoding="utf-8"))) == [], file


@pytest.mark.parametrize(
    "code",
    [
        "import jax._src.core",
        "from keras.src import backend",
        "from tensorflow.python.framework import ops",
        "from torch import _C",
        "import torch as t\nt._C.thing()",
        "import keras\nkeras.layers.Layer._private",
        "class Own(Layer):\n  def call(self, x):\n    return self._theirs(x)",
        "def f(tensor):\n  return tensor._version",
        "try:\n  import jax._src\nexcept KeyError:\n  pass",
    ],
)
def test_f15_what_is_private_is_found(code):
    assert len(list(private_uses(code))) == 1


def test_f15_what_code_can_do_without_and_what_is_its_own_may_be_private():
    spared = "try:\n  from jax import _src\nexcept (ImportError, AttributeError):\n  pass"
    own = "class Own:\n  def _f(self):\n    self._x = 1\n    return self._x, self._f"
    ours = "import involution as i\nimport os\ni._f(), os._exit(0), i.__name__"
    assert list(private_uses("\n".join((spared, own, ours)))) == []


# What makes code of data, or may be told to. Subclasses of pickle.Unpickler refuse what they read.
UNSAFE_CALLS = (
    "eval",
    "exec",
    "compile",
    "__import__",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "marshal.load",
    "marshal.loads",
    "joblib.load",
    "dill.load",
    "dill.loads",
    "yaml.load",
    "yaml.unsafe_load",
    "os.system",
    "keras.config.enable_unsafe_deserialization",
)
UNSAFE_OPTIONS = {"weights_only": False, "allow_pickle": True, "safe_mode": False, "shell": True}


def unsafe(code):
    """What in a text makes code of data, by the names that its imports give."""
    nodes = list(ast.walk(ast.parse(code)))
    names = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in nodes:
        if isinstance(node, ast.Name | ast.Attribute):
            first, dot, rest = ast.unparse(node).partition(".")
            if (path := names.get(first, first) + dot + rest) in UNSAFE_CALLS:
                yield path
        elif isinstance(node, ast.keyword) and node.arg in UNSAFE_OPTIONS:
            safe = not UNSAFE_OPTIONS[node.arg]
            if not (isinstance(node.value, ast.Constant) and node.value.value is safe):
                yield f"{node.arg}={ast.unparse(node.value)}"


# Where its subclass takes the names of NumPy's arrays and no others.
REVIEWED = {"data": ["pickle.Unpickler"]}


def test_no_code_is_made_of_data():
    for name, file in modules.items():
        assert list(unsafe(file.read_text(encoding="utf-8"))) == REVIEWED.get(name, []), file
    command = pathlib.Path(involution_cli.__file__).read_text(encoding="utf-8")
    assert list(unsafe(command)) == []


@pytest.mark.parametrize(
    "code",
    [
        "eval('1')",
        "exec(text)",
        "compile(text, '', 'exec')",
        "import pickle\npickle.load(file)",
        "import pickle as p\np.loads(b'')",
        "from pickle import loads\nloads(b'')",
        "from pickle import load as read\nread(file)",
        "import pickle\nclass Reader(pickle.Unpickler):\n  pass",
        "import marshal\nmarshal.loads(b'')",
        "import yaml\nyaml.load(text, yaml.SafeLoader)",
        "import yaml\nread = yaml.unsafe_load",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=trusted)",
        "np.load(path, allow_pickle=True)",
        "keras.saving.load_model(path, safe_mode=False)",
        "keras.config.enable_unsafe_deserialization()",
        "subprocess.run(text, shell=True)",
        "import os\nos.system(text)",
    ],
)
def test_what_makes_code_of_data_is_found(code):
    assert len(list(unsafe(code))) == 1


def test_what_makes_no_code_of_data_is_not_found():
    assert list(unsafe("np.load(p, allow_pickle=False)\nyaml.safe_load(t)\nre.compile('x')")) == []


def test_every_binding_is_a_module():
    bindings = {name for name in modules if re.fullmatch(r"ops\.native_\w+", name)}
    assert bindings == {"ops.native_library", "ops.native_call", *map(binding, native.BINDINGS)}


def binding(backend):
    return f"ops.native_{backend}"


# A binding imports its framework, which need not be installed.
OTHERS = [binding(backend) for backend in native.BINDINGS if backend != BACKEND]
if BACKEND != "torch":
    OTHERS += ["ops.torch_operations", "per_number"]
if BACKEND != "torch" or importlib.util.find_spec("triton") is None:
    OTHERS += ["ops.triton_kernels", "ops.triton_torch"]


# Examples of the operator, its bindings, the layers and the generators run on every backend.
EVERYWHERE = ("ops", "layers", "kernel_generators")
EXAMPLES = [
    pytest.param(name, marks=() if name.startswith(EVERYWHERE) else pytest.mark.any_backend)
    for name in ["", *(name for name in ORDER if name not in OTHERS)]
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(f"involution.{name}".rstrip("."))
    assert doctest.testmod(module).failed == 0


def test_public_docstrings_have_examples():
    public = [getattr(involution, name) for name in involution.__all__]
    public += [getattr(involution.ops, name) for name in involution.ops.__all__]
    models = involution.models
    public += [models.cnn, models.inn, models.RedNet26, models.rednet_tiny]
    public += [models.count_multiply_adds, *involution.kernel_generators.GENERATORS.values()]
    for thing in public:
        if isinstance(thing, type(sys)):
            continue
        assert ">>> " in thing.__doc__, thing


def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_is_short_and_its_python_runs():
    text = readme()
    assert text.count("\n") < 180
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert text[: text.index("print(layer(images).shape)")].count("\n") < 40
    scope: dict = {}
    for block in blocks:
        # What a line prints stands behind it.
        printed = []
        scope["print"] = lambda *values, printed=printed: printed.append(
            " ".join(map(plain, values))
        )
        exec(compile(block, "README.md", "exec"), scope)  # noqa: S102 - our own text
        assert printed == re.findall(r"print\(.*\)  # (.*)\n", block)


def plain(value):
    return str(tuple(value)) if hasattr(value, "__len__") else str(value)


def test_every_command_is_documented():
    commands = [name for name in involution_cli.app if not name.startswith("-")]
    assert set(commands) >= {"compare", "train", "predict", "explain", "doctor"}
    for name in commands:
        assert f"| `involution {name}" in readme(), name


def test_readme_commands_parse():
    lines = re.findall(r"^involution (.*?)(?:  +#.*)?$", readme(), flags=re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        involution_cli.app.parse_args(line.split(), exit_on_error=False, print_error=False)


def test_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert "Inverting the Inherence" in citation["references"][0]["title"]


def test_version_is_one(pytestconfig):
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{involution.__version__}"' in text
