"""The order of imports, banned names and calls, and statements of the documentation."""

import ast
import doctest
import importlib.util
import re
import sys
import tomllib

import pytest
import yaml

import involution
import involution_cli
from involution.ops.frameworks import FRAMEWORKS
from tests.support.backends import BACKEND
from tests.support.paths import ROOT

PACKAGE = ROOT / "src" / "involution"
COMMAND_LINE = sorted((ROOT / "src" / "involution_cli").glob("*.py"))

# Reading order: a module imports only modules above it.
ORDER = [
    "renamed",
    "benchmarking",
    "demo",
    "saving",
    "utils",
    "backend",
    "keras_import",
    "utils.errors",
    "utils.comparison",
    "utils.arguments",
    "utils.environment",
    "utils.progress",
    "utils.atomic_files",
    "utils.memory",
    "utils.layer_names",
    "utils.torch_hooks",
    "data.prefetch",
    "data.transforms",
    "data.image_formats",
    "data.image_folder",
    "data.decode",
    "data.lazy_images",
    "utils.abstract_build",
    "saving.keras_archive",
    "ops.validation",
    "ops.window",
    "ops.frameworks.jax",
    "ops.frameworks.tensorflow",
    "ops.frameworks.torch",
    "ops.frameworks",
    "ops.problem",
    "ops.tensor_utils",
    "ops.autodiff",
    "ops.native.library",
    "onnx",
    "ops.native.params",
    "ops.autodiff.fused",
    "ops.autodiff.jax",
    "ops.autodiff.tensorflow",
    "ops.autodiff.torch",
    "ops.taps.passes",
    "ops.taps.jax",
    "ops.taps.tensorflow",
    "ops.taps.torch",
    "ops.taps",
    "ops.native.jax",
    "ops.native.tensorflow",
    "ops.torch_custom_ops",
    "ops.native.torch",
    "ops.native",
    "ops.triton.kernels",
    "ops.triton.launch",
    "ops.triton",
    "ops.pallas.interpreter",
    "ops.pallas.kernels",
    "ops.pallas",
    "ops.fused",
    "ops.reference",
    "ops.rows",
    "ops.banded",
    "ops.onnxruntime.domain",
    "ops.onnxruntime.jax",
    "ops.onnxruntime.tensorflow",
    "ops.onnxruntime.torch",
    "ops.onnxruntime",
    "ops.dispatch",
    "ops.transposed",
    "ops.calls",
    "ops.rowwise",
    "ops.attention",
    "ops.centers",
    "ops.symbolic",
    "ops.api",
    "ops",
    "ops.cases",
    "compat.operands",
    "compat.grouped",
    "compat.upsampling",
    "compat.windows",
    "compat.outlook",
    "compat.causal",
    "compat",
    "rednet_variants",
    "lsnet_variants",
    "torch.functional",
    "torch.positionwise",
    "torch.softmax",
    "torch.generators",
    "torch.modules",
    "torch.lazy",
    "torch.rednet",
    "torch.lsnet",
    "torch.transposed",
    "torch.upsampling",
    "torch",
    "kernel_generators.pointwise",
    "kernel_generators.pooling",
    "kernel_generators.base",
    "kernel_generators.convolutional",
    "kernel_generators.large_context",
    "kernel_generators.attention",
    "kernel_generators.carafe",
    "kernel_generators.low_rank",
    "kernel_generators.static",
    "kernel_generators.attachment",
    "kernel_generators.registry",
    "kernel_generators",
    "layers.recording",
    "layers.torch_training",
    "layers.base",
    "layers.keras_io",
    "layers.generated",
    "layers.involution_nd",
    "layers.offset_attention",
    "layers.transposed",
    "layers.upsampling",
    "layers",
    "models.classifiers",
    "models.backbone",
    "models.rednet",
    "models.lsnet",
    "models.flops",
    "models.conv_counterpart",
    "models.folding",
    "models.outputs",
    "models.registry",
    "models.checkpoint_readers.errors",
    "models.checkpoint_readers.arrays",
    "models.checkpoint_readers.restricted_unpickler",
    "models.checkpoint_readers.pytorch",
    "models.checkpoint_readers.paddle",
    "models.checkpoint_readers.tensorflow",
    "models.checkpoint_readers",
    "models.weights",
    "models.pretrained",
    "models",
    "models.numpy_reference",
    "models.numpy_lsnet",
    "models.weight_map",
    "models.lsnet_checkpoint",
    "models.convert",
    "data.datasets",
    "data",
    "saving.classifier",
    "export.errors",
    "export.spec",
    "export.saved_model",
    "export.litert",
    "export.torch_export",
    "export.fusion",
    "export.preprocessing",
    "export.onnx",
    "export.verify",
    "export.api",
    "export",
    "models.specs",
    "training.checkpoint",
    "training.recipes",
    "training.fine_tuning",
    "training.distributed",
    "training.augmentation",
    "training.optimizers",
    "training.callbacks",
    "training.trainer",
    "training",
    "training.interrupts",
    "training.run_folder",
    "visualize.activations",
    "visualize.ablation",
    "visualize.colors",
    "visualize.figures",
    "visualize",
    "visualize.fonts",
    "visualize.html",
    "training.evaluation",
    "training.report",
    "training.experiment",
    "training.search_space",
    "training.sweep",
    "benchmarking.timed_program",
    "benchmarking.baselines",
    "benchmarking.exported",
    "benchmarking.paper_cuda",
    "benchmarking.devices.base",
    "benchmarking.devices.cpu",
    "benchmarking.devices.torch_cuda",
    "benchmarking.devices.jax_cuda",
    "benchmarking.devices",
    "benchmarking.runner",
    "visualize.explain",
    "hub",
    "demo.texts",
    "demo.examples",
    "demo.render",
    "demo.app",
    "benchmarking.doctor",
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


@pytest.mark.any_backend
def test_order_lists_every_module():
    assert sorted(ORDER) == sorted(name for name in modules if name)


@pytest.mark.any_backend
@pytest.mark.parametrize("name", ORDER)
def test_module_imports_only_modules_above_it(name):
    for other in imports(modules[name]):
        assert ORDER.index(other) < ORDER.index(name), (name, other)


specification = importlib.util.spec_from_file_location(
    "packages", ROOT / "docs/figures/packages.py"
)
assert specification is not None
assert specification.loader is not None
packages = importlib.util.module_from_spec(specification)
specification.loader.exec_module(packages)


@pytest.mark.any_backend
def test_package_figure_is_up_to_date():
    drawn = packages.draw(packages.imports())
    assert packages.FILE.read_text(encoding="utf-8") == drawn, "python docs/figures/packages.py"


@pytest.mark.any_backend
def test_packages_import_only_packages_in_lower_rows():
    graph = packages.imports()
    rows = packages.ranks(graph)
    assert set(graph) >= {"ops", "layers", "models", "training", "involution_cli"}
    assert all(rows[other] < rows[name] for name in graph for other in graph[name])


@pytest.mark.any_backend
def test_cyclic_imports_of_packages_raise():
    with pytest.raises(ValueError, match=r"no cycle\. Received: a -> b -> a$"):
        packages.ranks({"a": {"b"}, "b": {"a"}})


@pytest.mark.any_backend
def test_contributing_names_existing_files():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [line.split("|")[2] for line in text.splitlines() if line.startswith("| ")]
    files = [name for row in rows for name in re.findall(r"`([\w-]+[/.][\w./-]+)`", row)]
    assert len(files) > 50
    assert [f for f in files if not (ROOT / f).exists() and not (PACKAGE / f).exists()] == []


# Private modules of dependencies whose names do not begin with an underscore.
INTERNAL = ("keras.src", "tensorflow.python")


def is_private(name):
    return re.fullmatch("_[^_].*", name)


def is_third_party(path):
    """Whether a module belongs to a dependency."""
    first = path.split(".")[0]
    return first not in sys.stdlib_module_names and not first.startswith("involution")


def private_uses(code):
    """Yields private names of dependencies in Python code. Allowed are names that the code defines,
    and imports in a ``try`` with ``except ImportError``."""
    nodes = list(ast.walk(ast.parse(code)))
    tries = [node for node in nodes if isinstance(node, ast.Try)]
    optional = {
        node
        for attempt in tries
        if any("ImportError" in ast.unparse(h.type) for h in attempt.handlers if h.type)
        for statement in attempt.body
        for node in ast.walk(statement)
    }
    paths, own = {}, set()
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom) and node not in optional:
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            paths |= {a.asname or a.name.split(".")[0]: prefix + a.name for a in node.names}
        elif isinstance(node, ast.FunctionDef):
            own.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            own.add(node.attr)
    for path in filter(is_third_party, paths.values()):
        if path.startswith(INTERNAL) or any(map(is_private, path.split("."))):
            yield path
    for node in nodes:
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            name = ast.unparse(node)
            if is_third_party(paths.get(name.split(".")[0], "dependency")):
                yield name


@pytest.mark.long
@pytest.mark.any_backend
def test_f15_no_private_names_of_dependencies_are_used():
    for file in (*modules.values(), *COMMAND_LINE):
        assert list(private_uses(file.read_text(encoding="utf-8"))) == [], file


@pytest.mark.any_backend
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
def test_f15_private_names_are_found(code):
    assert len(list(private_uses(code))) == 1


@pytest.mark.any_backend
def test_f15_optional_imports_and_own_private_names_are_allowed():
    optional = "try:\n  from jax import _src\nexcept (ImportError, AttributeError):\n  pass"
    own = "class Own:\n  def _f(self):\n    self._x = 1\n    return self._x, self._f"
    ours = "import involution as i\nimport os\ni._f(), os._exit(0), i.__name__"
    assert list(private_uses("\n".join((optional, own, ours)))) == []


# Functions that may execute data. Subclasses of pickle.Unpickler must be reviewed.
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
    """Yields calls and options that may execute data; names are resolved by the code's imports."""
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


# This subclass resolves only the names in pickles of NumPy arrays.
REVIEWED = {"data.datasets": ["pickle.Unpickler"]}


@pytest.mark.long
@pytest.mark.any_backend
def test_no_data_is_executed():
    for name, file in modules.items():
        assert list(unsafe(file.read_text(encoding="utf-8"))) == REVIEWED.get(name, []), file
    for file in COMMAND_LINE:
        assert list(unsafe(file.read_text(encoding="utf-8"))) == [], file


@pytest.mark.any_backend
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
def test_unsafe_calls_and_options_are_found(code):
    assert len(list(unsafe(code))) == 1


@pytest.mark.any_backend
def test_safe_calls_and_options_are_allowed():
    assert list(unsafe("np.load(p, allow_pickle=False)\nyaml.safe_load(t)\nre.compile('x')")) == []


# Packages with a module for each framework.
BY_FRAMEWORK = {
    "ops.autodiff": {"fused"},
    "ops.frameworks": set(),
    "ops.native": {"library", "params"},
    "ops.taps": {"passes"},
}


@pytest.mark.any_backend
@pytest.mark.parametrize("package", BY_FRAMEWORK)
def test_every_framework_has_a_module(package):
    names = {n.rpartition(".")[2] for n in modules if n.rpartition(".")[0] == package}
    assert names == BY_FRAMEWORK[package] | set(FRAMEWORKS)


# Modules that import another framework, which need not be installed.
OTHER_BACKENDS = [f"{p}.{name}" for p in BY_FRAMEWORK for name in FRAMEWORKS if name != BACKEND]
if BACKEND != "torch":
    OTHER_BACKENDS += ["ops.torch_custom_ops", "benchmarking.paper_cuda", "utils.torch_hooks"]
    OTHER_BACKENDS += [name for name in ORDER if name.split(".")[0] == "torch"]
if BACKEND != "torch" or importlib.util.find_spec("triton") is None:
    OTHER_BACKENDS += ["ops.triton.kernels", "ops.triton.launch"]


# Examples of the operator and of its bindings run on every backend.
EXAMPLES = [
    pytest.param(
        name,
        marks=() if name.startswith("ops") else pytest.mark.any_backend,
    )
    for name in ["", *(name for name in ORDER if name not in OTHER_BACKENDS)]
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(f"involution.{name}".rstrip("."))
    assert doctest.testmod(module).failed == 0


@pytest.mark.any_backend
def test_public_docstrings_have_examples():
    public = [getattr(involution, name) for name in involution.__all__]
    public += [getattr(involution.ops, name) for name in involution.ops.__all__]
    models = involution.models
    public += [models.cnn, models.inn, models.RedNet26, models.LSNetT, models.rednet_tiny]
    public += [models.count_multiply_adds, *involution.kernel_generators.GENERATORS.values()]
    for member in public:
        if isinstance(member, type(sys)):
            continue
        assert ">>> " in member.__doc__, member


def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.long
@pytest.mark.any_backend
def test_readme_is_short_and_its_python_runs():
    pytest.importorskip("torch")
    text = readme()
    assert text.count("\n") < 180
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert text[: text.index("print(layer(images).shape)")].count("\n") < 40
    scope: dict = {}
    for block in blocks:
        # The comment after a `print` call is the expected output.
        printed = []
        scope["print"] = lambda *values, printed=printed: printed.append(
            " ".join(map(plain, values))
        )
        exec(compile(block, "README.md", "exec"), scope)  # noqa: S102 - our own README
        assert printed == re.findall(r"print\(.*\)  # (.*)\n", block)


def plain(value):
    return str(tuple(value)) if hasattr(value, "__len__") else str(value)


@pytest.mark.any_backend
def test_every_command_is_documented():
    commands = [name for name in involution_cli.app if not name.startswith("-")]
    assert set(commands) >= {"compare", "train", "predict", "explain", "doctor"}
    for name in commands:
        assert f"| `involution {name}" in readme(), name


@pytest.mark.any_backend
def test_readme_commands_parse():
    lines = re.findall(r"^involution (.*?)(?:  +#.*)?$", readme(), flags=re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        involution_cli.app.parse_args(line.split(), exit_on_error=False, print_error=False)


@pytest.mark.any_backend
def test_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert "Inverting the Inherence" in citation["references"][0]["title"]


@pytest.mark.any_backend
def test_files_agree_on_the_version():
    version = involution.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == version
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## (\d.*) \((.*)\)$", changelog, re.MULTILINE)
    assert released[0] == (version, str(citation["date-released"]))
    assert citation["version"] == version
