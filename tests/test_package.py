"""The package as installed: the wheel holds every module and no test, importing it is cheap, its public names resolve."""

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import graft
import graft.quant

ROOT = Path(__file__).parents[1]
NOT_PACKAGED = {"tests", "bench", "build", "dist", "docs", "runs"}


def modules() -> list[Path]:
    """Every source of the package, relative to the root."""
    folders = [path for path in ROOT.iterdir() if path.name[0] != "." and path.name not in NOT_PACKAGED]
    return sorted(
        p.relative_to(ROOT)
        for path in folders
        for p in ([path] if path.is_file() else path.rglob("*"))
        if p.suffix == ".py"
    )


def settings() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_package_list_is_the_tree() -> None:
    """Law: every folder with a source is a package that pyproject.toml lists, and each has an __init__.py."""
    folders = {path.parent for path in modules()}
    assert sorted(settings()["tool"]["setuptools"]["packages"]) == sorted(
        ".".join(("graft", *folder.parts)) for folder in folders
    )
    assert not [folder for folder in folders if not (ROOT / folder / "__init__.py").exists()]


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_no_test(tmp_path: Path) -> None:
    """Law: a real wheel, built from a copy of the tree, has exactly the tree's sources."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip(f"setuptools {setuptools.__version__} is older than the 77 that pyproject.toml asks for")
    hidden = {".*", "__pycache__", "*.egg-info", "build", "dist", "runs"}
    shutil.copytree(ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns(*hidden))
    build = "from setuptools.build_meta import build_wheel; build_wheel('../wheel')"
    (tmp_path / "wheel").mkdir()
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path / "copy", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [wheel] = (tmp_path / "wheel").glob("graftlm-*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        entry_points = file.read(f"graftlm-{graft.__version__}.dist-info/entry_points.txt").decode()
    sources = {name for name in names if name.endswith(".py")}
    assert sources == {f"graft/{path.as_posix()}" for path in modules()}
    assert not [name for name in names if "test" in Path(name).name and name.startswith("graft/")]
    assert "graft = graft.cli:main" in entry_points


def test_importing_and_asking_for_help_is_cheap() -> None:
    """Law: `import graft` and `graft --help` import neither torch nor numpy, and --help answers at once."""
    code = """
import sys, json, contextlib, io
import graft, graft.cli
for arguments in (["--help"], ["sft", "--help"], ["tokenizer", "train", "--help"], ["vram", "estimate", "--help"]):
    sys.argv = ["graft", *arguments]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        graft.cli.main()
print(json.dumps([name for name in sys.modules if name in ("torch", "numpy", "numba", "safetensors", "triton")]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_public_names_resolve() -> None:
    """Law: each name of __all__ is there, dir() lists it, and an unknown one is an error that lists the known."""
    for name in graft.__all__:
        assert getattr(graft, name) is not None
        assert name in dir(graft)
    with pytest.raises(
        AttributeError, match=r"no attribute 'train'; it has AdapterBank, AdapterShelf, Callback, Engine"
    ):
        _ = graft.train
    for name in graft.quant.__all__:
        assert getattr(graft.quant, name) is not None
    with pytest.raises(AttributeError, match=r"no attribute 'int8'; it has AdamW8bit"):
        _ = graft.quant.int8


def test_the_version_is_said_once() -> None:
    assert settings()["project"]["version"] == graft.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", graft.__version__)


IMPORT_ALL = """
import importlib, pathlib, sys
for name in sys.argv[2].split(","):
    sys.modules[name] = None
import graft
root = pathlib.Path(sys.argv[1])
for line in sys.stdin.read().split():
    importlib.import_module("graft." + line if line else "graft")
print("all")
"""


@pytest.mark.slow
def test_every_module_imports_without_what_only_unix_has() -> None:
    """Law: with `resource`, `fcntl` and the optional packages out of reach, as on Windows, every module but the Triton
    kernels and the harness's model class, whose parent class is the harness's, imports."""
    names = [
        ".".join(path.with_suffix("").parts)
        for path in modules()
        if not path.name.startswith(("triton_", "lm_eval_", "__")) and len(path.parts) > 1 and "bench" not in path.name
    ]
    assert len(names) > 100
    blocked = "resource,fcntl,pwd,grp,termios,matplotlib,pyarrow,bitsandbytes,peft,transformers"
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, str(ROOT), blocked],
        input="\n".join(names), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout == "all\n", done.stderr


@pytest.mark.parametrize(
    ("package", "call", "message"),
    [
        ("matplotlib", "plots.new_figure()", "a picture needs matplotlib; run pip install 'graftlm[plot]'"),
        (
            "pyarrow",
            "list(text_rows.rows_of('.parquet', io.BytesIO(b''), pathlib.Path('a.parquet'), 'text', 'strict'))",
            "a.parquet: reading Parquet needs pyarrow; run pip install 'graftlm[parquet]'",
        ),
        (
            "pyarrow",
            "list(rows._parquet_rows(pathlib.Path('a.parquet')))",
            "a.parquet: reading Parquet needs pyarrow; run pip install 'graftlm[parquet]'",
        ),
        (
            "sacrebleu",
            "metrics.text_figures(['chrf'], ['a'], ['b'])",
            "a score by chrF or BLEU needs sacrebleu; run pip install 'graftlm[metrics]'",
        ),
        (
            "lm_eval",
            "importlib.import_module('graft.finetune.evaluation.lm_eval_model')",
            "the harness's model class needs lm_eval; run pip install 'graftlm[lm-eval]'",
        ),
    ],
)
def test_a_package_that_is_not_installed(package: str, call: str, message: str) -> None:
    """Law: the message names the extra, and the extra holds the package."""
    code = f"""
import importlib, io, pathlib, sys
sys.modules[{package!r}] = None
from graft.base import plots
from graft.base.text import rows as text_rows
from graft.finetune.data import rows
from graft.finetune.evaluation import metrics
try:
    {call}
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    extra = re.search(r"\[([\w-]+)\]", message)
    assert extra is not None
    assert done.stdout == f"{message}, or pip install -e '.[{extra[1]}]' in a clone\n", done.stderr
    extras = settings()["project"]["optional-dependencies"]
    assert extras[extra[1]][0].startswith(package)
    assert extras[extra[1]][0] in extras["test"]


def test_scripts_ask_for_names_that_exist() -> None:
    """Law: whatever a benchmark, a page's generator or a kernel's bench imports of graft is there: none of them is run here."""
    lost = []
    for script in sorted([*ROOT.glob("bench/*.py"), *ROOT.glob("docs/*.py"), *ROOT.glob("kernels/*/bench.py")]):
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("graft.")):
                continue
            if importlib.util.find_spec(str(node.module)) is None:
                lost.append(f"{script.name}:{node.lineno}: {node.module}")
                continue
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                if not hasattr(module, alias.name) and not importlib.util.find_spec(f"{node.module}.{alias.name}"):
                    lost.append(f"{script.name}:{node.lineno}: {node.module}.{alias.name}")
    assert not lost
