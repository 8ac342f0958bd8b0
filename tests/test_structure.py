"""What holds the project together: the direction of imports, light --help, no traces of machines or registries."""

import ast
import importlib
import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = (
    "qat.train",
    "qat.calibrate",
    "qat.placement",
    "qat.sensitivity",
    "export.onnx",
    "deploy.build",
    "deploy.report",
    "deploy.triton",
    "deploy.audit",
)
COMMANDS += (
    "deploy.benchmark",
    "deploy.evaluate",
    "deploy.kernels",
    "deploy.tune",
    "deploy.migrate",
    "export.lint",
    "export.quantize",
)
HEAVY = (
    "torch",
    "torchvision",
    "onnx",
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx_bindings",
    "timm",
    "sklearn",
)


# What --help of a command may load: the command line's own packages and not much more (356 when this was written).
MODULES_OF_HELP = 450
PACKAGES = ("qat", "export", "deploy")
MOST_LINES, MOST_MODULES_ON_FIRST_LEVEL = 350, 14


def module_name(path: Path) -> str:
    """``qat/rules/__init__.py`` -> ``qat.rules``."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {module_name(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}


def imported(path: Path) -> set[str]:
    """Modules that a module imports, anywhere in it; of ours by their whole names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inside = {f"{node.module}.{name.name}" for name in node.names} & SOURCES.keys()
            found |= inside or {node.module}
    return found


def arrows() -> dict[str, set[str]]:
    """Module -> those of ours that it imports. A package's table of names (``__init__``) does not count."""
    return {name: imported(path) & SOURCES.keys() for name, path in SOURCES.items() if path.name != "__init__.py"}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A way through ``graph`` that ends where it began; [] where there is none."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name not in done:
            for other in sorted(graph.get(name, ())):
                if found := walk(other, [*way, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in graph if (found := walk(name, []))), [])


@pytest.mark.parametrize(
    ("package", "never"),
    [
        ("qat", {"export", "deploy"}),
        ("export", {"deploy"}),
        ("deploy", {"torch", "torchvision", "onnx", "onnxruntime"}),
    ],
)
def test_arrows_go_one_way(package: str, never: set[str]) -> None:
    paths = [path for name, path in SOURCES.items() if name.split(".")[0] == package]
    assert paths
    found = {path.name: {name for name in imported(path) if name.split(".")[0] in never} for path in paths}
    assert {name: names for name, names in found.items() if names} == {}


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle(arrows()) == []


def test_the_rooms_of_qat_stand_one_above_the_other() -> None:
    """A room is a folder of qat/; a module on the first level is a room of its own."""

    def room(name: str) -> str:
        return ".".join(name.split(".")[:2])

    rooms: dict[str, set[str]] = {}
    for name, others in arrows().items():
        if name.startswith("qat."):
            rooms.setdefault(room(name), set()).update({room(other) for other in others} - {room(name)})
    assert circle(rooms) == []


def test_no_module_is_too_long_and_the_first_level_not_too_wide() -> None:
    lines = {name: len(path.read_text().splitlines()) for name, path in SOURCES.items()}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}
    assert len(list((ROOT / "qat").glob("*.py"))) <= MOST_MODULES_ON_FIRST_LEVEL


def test_nothing_imports_from_a_commands_module() -> None:
    found = {name: others & set(COMMANDS) for name, others in arrows().items()}
    assert {name: others for name, others in found.items() if others} == {}


def test_every_command_has_a_console_script() -> None:
    scripts = {script.name: script for script in distribution("int8-qat-pipeline").entry_points}
    assert {script.value for script in scripts.values()} == {f"{command}:cli" for command in COMMANDS}
    for name, script in scripts.items():
        assert name == script.module.replace(".", "-")
        assert name in script.load().__doc__


@pytest.mark.parametrize("package", PACKAGES)
def test_the_library_loads_lazily_and_no_module_shadows_its_names(package: str) -> None:
    code = f"import sys, {package}; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert output_of(code) == "[]"
    library = importlib.import_module(package)
    modules = {name.split(".")[1] for name in SOURCES if name.startswith(f"{package}.")}
    assert set(library.__all__) & modules == set()
    for name in library.__all__:
        value = getattr(library, name)
        assert value.__doc__
        assert name in dir(library)


def output_of(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_deploy_loads_without_torch() -> None:
    modules = ", ".join(name for name in SOURCES if name.startswith("deploy."))
    assert output_of(f"import sys; import {modules}; print([n for n in {HEAVY!r} if n in sys.modules])") == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_without_heavy_imports(command: str) -> None:
    code = (
        f"import sys, runpy; sys.argv = ['{command}', '--help']\n"
        f"try: runpy.run_module('{command}', run_name='__main__', alter_sys=True)\n"
        f"except SystemExit as stop: assert not stop.code\n"
        f"print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules], len(sys.modules))"
    )
    printed = output_of(code)
    assert "--debug" in printed
    heavy, _, count = printed.splitlines()[-1].rpartition(" ")
    assert heavy == "HEAVY []"
    assert int(count) < MODULES_OF_HELP


def test_two_files_know_the_versions_of_tensorrt():
    """Numbers of versions, and asking what the API has: in deploy/trt.py, deploy/weak_typing.py and nowhere else."""
    version = r"\b(8\.[456]\.\d|TensorRT[- ](8|10|11)|10\.x|11\.x)\b"
    asking = r"hasattr\((self\.)?(toolkit|module|error|engine)"
    tells = re.compile(f"{version}|{asking}")
    found = [
        f"{path.name}:{number}: {line.strip()}"
        for path in (ROOT / "deploy").glob("*.py")
        if path.name not in ("trt.py", "weak_typing.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if tells.search(line)
    ]
    assert found == []


def tracked_files() -> list[Path]:
    """The text files of the repository."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [ROOT / name for name in listed if (ROOT / name).is_file() and not name.endswith(".png")]


def test_no_registry_host_and_no_path_of_a_machine_is_committed():
    forbidden = re.compile(r"https?://[^ ]*(pypi|pythonhosted|npmjs)|(?<![\w.])/(work/(main|shared)|root|home)/\w")
    own = Path(__file__)
    found = [
        f"{path.name}: {line}"
        for path in tracked_files()
        if path != own
        for line in path.read_text().splitlines()
        if forbidden.search(line)
    ]
    assert found == []
