"""The folder for the Kernel Hub: its layout, its syntax, and its ops, loaded by path beside the package."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import meft_kernels
from kernel_hub import python39, tree
from kernel_hub.__main__ import main

REPO = "someone/meft-kernels"


@pytest.fixture(scope="module")
def kernel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "meft-kernels"
    tree.write(out, REPO)
    return out


def by_path(variant: Path):
    """A build as an import system without ``kernels`` takes it, by its metadata's id, once."""
    name = json.loads((variant / "metadata.json").read_text())["id"]
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def has_gradients_of_the_reference(module, network: str) -> None:
    """Compares a network of a loaded kernel, its kernels chosen by the caller, with its float64 reference."""
    torch.manual_seed(0)
    fused = getattr(module, network)(32, 2, 4)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    exact = getattr(module.reference, network)(32, 2, 4, dtype=torch.float64)
    exact.load_state_dict(fused.state_dict())
    states = [0.5 + torch.randn(2, 13, 32) for _ in range(3)]
    results = []
    for side, given in ((fused, states), (exact, [state.double() for state in states])):
        out = side(given) if network == "SHERL" else side.pooled(given)
        upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        results.append((out, *torch.autograd.grad(out, list(side.parameters()), upstream)))
    names = ["out", *(name for name, _ in fused.named_parameters())]
    for name, got, truth in zip(names, *results, strict=True):
        if name != "gate.bias":  # zero in exact arithmetic
            torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-5, msg=name)


def test_loads_with_kernels(kernel, monkeypatch):
    # tests/kernels can be imported by the same name, and holds no such module.
    pytest.importorskip("kernels.load", reason="needs the kernels library")
    import kernels

    loaded = kernels.get_local_kernel(kernel)
    variant = Path(loaded.__file__).parent
    about = kernels.Metadata.read_from_file(variant / "metadata.json")
    assert loaded.__name__ == about.id != "meft_kernels"
    # What the hub's own run of the tests does, with the kernel found by its name.
    monkeypatch.setenv("LOCAL_KERNELS", f"{REPO}={kernel}")
    spec = importlib.util.spec_from_file_location("own_tests", kernel / "tests" / "test_meft_kernels.py")
    own = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own)
    assert own.kernel is loaded
    own.test_network_equals_its_reference("LST")


def test_settings_and_digests_are_those_that_kernels_reads(kernel):
    rust = pytest.importorskip("kernels._rust", reason="needs the kernels library")
    general = rust.Build.open(kernel).general
    assert len(general.backends) == 3
    for backend in general.backends:
        variant = kernel / "build" / f"torch-{str(backend).lower()}"
        about = rust.Metadata.read_from_file(variant / "metadata.json")
        assert (str(about.name), about.version, about.backend.backend_type) == ("meft-kernels", 0, backend)
        about.digest.validate(rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, variant))


@pytest.mark.skipif(torch.cuda.is_available(), reason="interprets kernels on the CPU")
@pytest.mark.parametrize(("network", "op"), [("LST", "ladder"), ("UniPT", "adapter"), ("SHERL", "gated_up")])
def test_triton_kernels_run_beside_the_package_and_another_build(kernel, network, op):
    pytest.importorskip("triton")
    builds = [by_path(kernel / "build" / f"torch-{backend}") for backend in ("cuda", "rocm")]
    namespaces = [each.ops.backends.NAMESPACES["auto"] for each in (meft_kernels, *builds)]
    assert namespaces == ["meft", *(each.__name__ for each in builds)]
    x = torch.randn(3, 8)
    for namespace in namespaces:
        mean, _ = getattr(torch.ops, namespace).row_statistics(x)
        torch.testing.assert_close(mean, x.mean(1))
    with builds[0].use_backend("triton"):
        assert meft_kernels.ops.backends.current() == builds[1].ops.backends.current() == "auto"
        has_gradients_of_the_reference(builds[0], network)
    # Imported when they first run.
    assert f"{builds[0].__name__}.triton_kernels.{op}" in sys.modules
    assert f"{builds[1].__name__}.triton_kernels.{op}" not in sys.modules


def test_card_is_a_template_of_kernel_builders(kernel):
    jinja2 = pytest.importorskip("jinja2", reason="comes with torch")
    yaml = pytest.importorskip("yaml", reason="comes with huggingface_hub")
    template = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined)
    text = (kernel / "CARD.md").read_text()
    # The names that kernel-builder finds in the kernel's __all__, and what it tells beside them.
    told = {"repo_id": REPO, "version": 0, "license": "apache-2.0", "functions": meft_kernels.__all__}
    _, header, body = template.from_string(text).render(told).split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == "kernels" and f'get_kernel("{REPO}"' in body
    assert all(f"- `{name}`\n" in body for name in meft_kernels.__all__)


def test_two_versions_stand_side_by_side(kernel, tmp_path):
    shutil.copytree(tree.PACKAGE, tmp_path / "changed", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    with (tmp_path / "changed" / "reference" / "common.py").open("a") as file:
        file.write("\n\nNEW = True\n")
    tree.write(tmp_path / "next", REPO, package=tmp_path / "changed")
    one, other = (by_path(each / "build" / "torch-cuda") for each in (kernel, tmp_path / "next"))
    assert other.reference.common.NEW and not hasattr(one.reference.common, "NEW")
    x = torch.randn(3, 8)
    for version in (one, other):
        assert version.ops.backends.NAMESPACES["auto"] == version.__name__
        torch.testing.assert_close(version.ops.row_statistics(x)[0], x.mean(1))
    assert one.__name__ != other.__name__
    # kernel-builder writes it into the sources itself.
    assert not (kernel / "torch-ext" / "meft_kernels" / tree.NAMESPACE).exists()


def test_sources_import_nothing_but_torch_and_themselves(kernel):
    roots = set()
    package = kernel / "torch-ext" / "meft_kernels"
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(), feature_version=(3, 9))):
            if isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                roots.add(node.module.split(".")[0])
    assert roots <= {"torch", "triton"} | set(sys.stdlib_module_names)


def test_syntax_and_library_are_those_of_python_3_9(kernel):
    pytest.importorskip("vermin", reason="needs vermin, which knows what each Python brought")
    asked = ["-t=3.9-", "--eval-annotations", "--features", "union-types", "--no-tips", "--violations"]
    found = subprocess.run(
        [sys.executable, "-c", "import vermin; vermin.main()", *asked, str(kernel / "torch-ext")],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout


def test_strict_zip_is_zip():
    # The other branch of the file, which this Python does not take.
    from kernel_hub._python39 import _zip

    assert list(_zip("ab", [1, 2], strict=True)) == [("a", 1), ("b", 2)]
    for unequal in (("ab", [1]), ("a", [1, 2])):
        with pytest.raises(ValueError, match="different lengths"):
            list(_zip(*unequal, strict=True))


def test_lowering_leaves_everything_else_alone():
    source = '''"""What it is."""

import x

A = int | str
FLAGS = 1 << 3 | 1


class C:
    b: dict[str, int | None] = {}

    def f(self, é: "int", *g: "Literal['a']" | None) -> int | None:
        self.h: int | None = 1 | 2
        return [*zip(self.b, é, strict=True), *zip(g)], {} | {}
'''
    expected = (
        source.replace("A = int | str", 'A = "int | str"')
        .replace("b: dict[str, int | None]", 'b: "dict[str, int | None]"')
        .replace("\"Literal['a']\" | None", repr("\"Literal['a']\" | None"))
        .replace("-> int | None", '-> "int | None"')
        .replace("self.h: int | None", 'self.h: "int | None"')
        .replace("*zip(self", "*strict_zip(self")
        .replace('is."""\n', 'is."""\n\nfrom .._python39 import strict_zip\n')
    )
    assert python39.lowered(source, depth=1) == expected
    with pytest.raises(ValueError, match="'re.A . X' is a union of types or a number"):
        python39.lowered("import re\n\nBOTH = re.A | X\n", depth=0)
    with pytest.raises(ValueError, match=r"^line 1: .*'masks\[0\] . 4' is a union of types or a number"):
        python39.lowered("BOTH = masks[0] | 4\n", depth=0)


def test_nothing_is_left_to_lower(kernel):
    package = kernel / "torch-ext" / "meft_kernels"
    for path in package.rglob("*.py"):
        assert python39.lowered(path.read_text(), depth=0) == path.read_text(), path


@pytest.mark.parametrize(
    "statement",
    [
        "isinstance(x, int | str)",
        "isinstance(x, (A, LSTM | GRU))",
        "issubclass(x, a | b)",
        "H = Callable[[Tensor | None], int]",
        "def f(x):\n    T = Tensor | None",
        "cast(Tensor | None, x)",
        "if x:\n    A = int | str",
        "A: TypeAlias = int | str",
        "def f(x):\n    T = torch.Tensor | Size",
        "def f(x):\n    T = x | dict[str, int]",
        "def f(x):\n    T = x | Optional[int]",
        "from .modules import LST, SHERL\ndef f(x):\n    T = LST | SHERL",
        "class LST: pass\nclass SHERL: pass\ndef f(x=LST | SHERL): pass",
        "def f(T):\n    T |= None",
        "A = int | str\nisinstance(x, A)",
    ],
)
def test_refuses_a_union_that_is_not_lowered(statement):
    with pytest.raises(ValueError, match=rf"^line {2 + statement.count(chr(10))}: .*union") as refusal:
        python39.lowered(f"import x\n{statement}\n", depth=0)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("call", ["partial(zip, strict=True)", "builtins.zip(x, strict=True)", "zip(x, **y)"])
def test_refuses_a_strict_that_is_not_lowered(call):
    with pytest.raises(ValueError, match="^line 2: .*'strict'"):
        python39.lowered(f"import x\n{call}\n", depth=0)


@pytest.mark.parametrize(
    "statement",
    [
        "y = re.compile(x, re.A | re.B)",
        "def f(x):\n    return code | SIGN_BIT | x.T | MASKS[0] | ~valid[:, None] | (1 << D)",
        "from .codes import SIGN\ndef f(code):\n    code |= SIGN\n    return code | SIGN",
        "def f(x):\n    x |= {Key: None}\n    return x | dict.fromkeys('ab') | {1: None}",
        "side.load_state_dict(x, strict=False)",
        "f(x, **y)",
        "x: 'int | None' = 1",
    ],
)
def test_takes_bits_and_sets_for_no_types(statement):
    assert python39.lowered(f"import x\n{statement}\n", depth=0) == f"import x\n{statement}\n"


def test_lowers_what_a_coroutine_returns_and_no_comment():
    source = "async def f(\n    x: (\n        int  # or\n        | None\n    ),\n) -> int | None: ...\n"
    lowered = python39.lowered(source, depth=0)
    function = ast.parse(lowered).body[0]
    assert [function.args.args[0].annotation.value, function.returns.value] == ["int | None"] * 2


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_counts_lines_as_python_does(end):
    source = end.join(["a = '\u2028\x85'", "\x0c", "# \x1c", "def f(x: int | None): ...", ""])
    expected = source.replace("int | None", '"int | None"')
    assert python39.lowered(source, depth=0) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = ZIP", "IMPORT\nx = ZIP"),
        ('"""doc"""; x = ZIP\n', '"""doc"""; IMPORT; x = ZIP\n'),
        ('"""doc"""; \\\nx = ZIP\n', '"""doc"""; \\\nIMPORT; x = ZIP\n'),
        (
            '"""doc""";  # such\n@x(ZIP)\ndef f(): ...\n',
            '"""doc""";  # such\n\nIMPORT\n@x(ZIP)\ndef f(): ...\n',
        ),
        (
            '"""doc"""\n\nfrom __future__ import annotations\nx = ZIP\n',
            '"""doc"""\n\nfrom __future__ import annotations\n\nIMPORT\nx = ZIP\n',
        ),
        (
            "from __future__ import division\nfrom __future__ import annotations; x = ZIP\n",
            "from __future__ import division\nfrom __future__ import annotations; IMPORT; x = ZIP\n",
        ),
        ('"""doc"""\r\nx = ZIP\r\n', '"""doc"""\r\n\r\nIMPORT\r\nx = ZIP\r\n'),
    ],
)
def test_imports_behind_what_must_come_first(source, expected):
    lowered = python39.lowered(source.replace("ZIP", "zip(a, strict=True)"), depth=0)
    line = "from ._python39 import strict_zip"
    assert lowered == expected.replace("IMPORT", line).replace("ZIP", "strict_zip(a, strict=True)")
    compile(lowered, "lowered", "exec")


@pytest.mark.parametrize(("line", "why"), [("isinstance(1, int | str)", "union"), ("1 +", "syntax")])
def test_refuses_sources_by_file_and_line(tmp_path, line, why):
    (tmp_path / "ops").mkdir()
    (tmp_path / "__init__.py").write_text("from .ops import functions\n")
    (tmp_path / "ops" / "functions.py").write_text(f"import x\n\n{line}\n")
    with pytest.raises(ValueError, match=f"^ops/functions.py, line 3: .*{why}"):
        tree.write(tmp_path / "missing" / "out", REPO, package=tmp_path)
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("repo", ["meft-kernels", "a/b/c", "../x", "a/", "-a/b", "a b/c"])
def test_refuses_another_name(tmp_path, repo, capsys):
    assert main([str(tmp_path / "out"), f"--repo_id={repo}"]) == 2
    assert capsys.readouterr().err == f"kernel_hub: repo_id must be OWNER/NAME, got {repo!r}\n"
    assert not (tmp_path / "out").exists()


LONG = "n" * 96
NAMES = ["a/b--c", "a--b/c", "a/b..c", "a/b-", "a/b.", "a-/b", "a/b.git", f"a/{LONG}n", f"{LONG}n/a"]


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("repo", NAMES)
def test_refuses_what_the_hub_does(tmp_path, repo, installed, capsys, monkeypatch):
    if not installed:
        monkeypatch.setitem(sys.modules, "huggingface_hub.utils", None)
    assert main([str(tmp_path / "out"), "--repo_id", repo]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kernel_hub: OWNER and NAME of repo_id must have at most 96 characters each")
    assert error.endswith(f", got {repo!r}\n") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("repo", [f"{LONG}/{LONG}", "a/b", "_a/b_", "A.b-c_d/e.git.f"])
def test_takes_what_the_hub_does(repo):
    pytest.importorskip("huggingface_hub.utils").validate_repo_id(repo)
    tree._check_repo_id(repo)


def test_asks_the_hubs_own_function(monkeypatch):
    hub = pytest.importorskip("huggingface_hub.utils")

    def refuse(repo_id):
        raise ValueError("A rule of tomorrow. In two sentences.")

    monkeypatch.setattr(hub, "validate_repo_id", refuse)
    with pytest.raises(ValueError, match=r"^OWNER and NAME of repo_id .*, got 'a/b'$"):
        tree._check_repo_id("a/b")


def test_refuses_the_current_folder(tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", "../here", str(tmp_path / "link"), "missing/.."):
        assert main([out, "--repo_id", REPO]) == 2
        told = f"kernel_hub: the output folder must not be the current one, got {Path(out)}\n"
        assert capsys.readouterr().err == told
    assert sorted(each.name for each in tmp_path.iterdir()) == ["here", "link"] and not os.listdir(".")


def test_writes_to_where_a_link_points(tmp_path):
    (tmp_path / "empty").mkdir()
    for target in ("empty", "missing/below"):
        link = tmp_path / "link"
        link.symlink_to(target)
        assert tree.write(link, REPO)[0].is_dir() and link.is_symlink()
        assert (tmp_path / target / "build.toml").is_file()
        link.unlink()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["empty", "missing"]


def test_names_the_output_folder_and_not_a_temporary_one(tmp_path, capsys, monkeypatch):
    def refuse(source, target):
        raise OSError(16, "Device or resource busy", source, None, target)

    monkeypatch.setattr(os, "replace", refuse)
    assert main([str(tmp_path / "out"), "--repo_id", REPO]) == 2
    told = f"kernel_hub: cannot write the output folder {tmp_path / 'out'}: Device or resource busy\n"
    assert capsys.readouterr().err == told
    assert not list(tmp_path.iterdir())


def test_refuses_a_folder_that_holds_something(kernel, tmp_path, capsys):
    before = sorted(kernel.rglob("*"))
    assert main([str(kernel), "--repo_id", REPO]) == 2
    assert capsys.readouterr().err == f"kernel_hub: the output folder must be new or empty, got {kernel}\n"
    assert sorted(kernel.rglob("*")) == before
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "file" / "out"), "--repo_id", REPO]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty"), "--repo_id", REPO]) == 0
    assert "get_local_kernel" in capsys.readouterr().out
    assert sorted(each.name for each in tmp_path.iterdir()) == ["empty", "file"]
