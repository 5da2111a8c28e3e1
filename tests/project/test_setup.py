"""The programs that make the environments. Nothing here asks an index or installs anything."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from requirements import environment, index_settings, lock, strangers

ROOT = Path(__file__).parents[2]
UV = Path(sys.prefix) / "bin" / "uv"
LISTING = """\
:env:.cert='/etc/ssl/ours.pem'
:env:.default-timeout='60'
global.cert='/etc/ssl/other.pem'
global.index-url='https://user:secret@mirror.test/simple'
global.extra-index-url='https://a.test/simple\\nhttps://b.test/simple'
install.find_links='/wheels /more wheels'
download.no-index='true'
global.trusted-host='mirror.test:8443'
"""


def test_pips_settings_are_read_as_pip_reads_them() -> None:
    pip = index_settings.parse_pip_config(LISTING)
    assert pip["cert"] == "/etc/ssl/ours.pem", "a variable comes before a file"
    assert pip["find-links"] == "/wheels /more wheels"
    assert "no-index" not in pip, "a section of another command"
    with pytest.raises(ValueError, match=r"SECTION.NAME='VALUE'"):
        index_settings.parse_pip_config("no equals sign")


def test_uv_is_told_what_pip_was_told() -> None:
    pip = {
        **index_settings.parse_pip_config(LISTING),
        "find-links": "/wheels ~/w",
        "no-index": "1",
        "proxy": "http://proxy.test:3128",
        "timeout": "60",
        "retries": "7",
        "client-cert": "/c.pem",
        "keyring-provider": "subprocess",
        "no-cache-dir": "true",
        "constraint": "/c.txt",
    }
    told = index_settings.uv_settings(pip, {}, system_store=True)
    assert told.environment == {
        "UV_DEFAULT_INDEX": "https://user:secret@mirror.test/simple",
        "UV_INDEX": "https://a.test/simple https://b.test/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": f"/wheels,{Path.home()}/w",
        "UV_INSECURE_HOST": "mirror.test:8443",
        "SSL_CERT_FILE": "/etc/ssl/ours.pem",
        "SSL_CLIENT_CERT": "/c.pem",
        "UV_HTTP_TIMEOUT": "60",
        "UV_HTTP_RETRIES": "7",
        "HTTP_PROXY": "http://proxy.test:3128",
        "HTTPS_PROXY": "http://proxy.test:3128",
        "UV_KEYRING_PROVIDER": "subprocess",
        "UV_NO_CACHE": "1",
    }
    assert told.arguments == ["--no-index"]
    assert index_settings.uv_settings({}, {}, system_store=True).environment == {
        "UV_SYSTEM_CERTS": "1"
    }
    assert index_settings.uv_settings({}, {}).environment == {}


@pytest.mark.parametrize(
    ("key", "own"),
    [
        ("index-url", "UV_DEFAULT_INDEX"),
        ("index-url", "UV_INDEX_URL"),
        ("extra-index-url", "UV_INDEX"),
        ("extra-index-url", "UV_EXTRA_INDEX_URL"),
        ("find-links", "UV_FIND_LINKS"),
        ("trusted-host", "UV_INSECURE_HOST"),
        ("cert", "SSL_CERT_FILE"),
        ("timeout", "UV_HTTP_TIMEOUT"),
        ("proxy", "ALL_PROXY"),
    ],
)
def test_what_uv_was_told_itself_stands(key: str, own: str) -> None:
    assert index_settings.uv_settings({key: "pips"}, {}).environment
    assert index_settings.uv_settings({key: "pips"}, {own: "uvs"}).environment == {}


def test_what_uv_toml_says_stands(tmp_path: Path) -> None:
    file = tmp_path / "uv.toml"
    file.write_text(
        '[[index]]\nurl = "https://mirror.test/simple"\ndefault = true\n[pip]\nno-index = true\n'
    )
    keys = index_settings.toml_keys({"UV_CONFIG_FILE": str(file)})
    told = index_settings.uv_settings(
        {"index-url": "https://pips.test", "no-index": "1", "timeout": "5"}, {}, keys
    )
    assert (told.environment, told.arguments) == ({"UV_HTTP_TIMEOUT": "5"}, [])


def test_pips_own_configuration_reaches_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "pip.conf"
    file.write_text(
        "[global]\nindex-url = https://mirror.test/simple\n[install]\nfind-links =\n    /one\n    /two\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    monkeypatch.setenv("PIP_TRUSTED_HOST", "mirror.test")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    pip = index_settings.pip_settings(sys.executable)
    assert pip["index-url"] == "https://mirror.test/simple"
    assert pip["find-links"].split() == ["/one", "/two"]
    assert pip["trusted-host"] == "mirror.test"
    assert index_settings.pip_settings("/bin/false")["trusted-host"] == "mirror.test", (
        "without a pip, its variables"
    )


def test_a_stranger_has_our_way_to_the_index_and_nothing_else() -> None:
    pip = {
        "index-url": "https://mirror.test",
        "cert": "/c.pem",
        "find-links": "/wheels",
        "extra-index-url": "file:///more",
        "constraint": "/c.txt",
    }
    ours = {
        "PIP_FIND_LINKS": "/wheels",
        "UV_FIND_LINKS": "/wheels",
        "PIP_CONSTRAINT": "/c.txt",
        "HOME": "/home/me",
    }
    assert index_settings.as_a_stranger(pip, ours) == {
        "HOME": "/home/me",
        "PIP_INDEX_URL": "https://mirror.test",
        "PIP_CERT": "/c.pem",
        "PIP_CONFIG_FILE": os.devnull,
    }


def test_the_lock_names_no_index_and_holds_the_tools_exactly() -> None:
    text = environment.LOCK.read_text()
    assert "://" not in text
    for package in ("uv", "pip", "torch", "triton", "hatchling", "ray"):
        assert environment.locked(package)
    with pytest.raises(environment.SetupError, match="no version of nothing: make lock"):
        environment.locked("nothing")


def wheel(folder: Path, name: str, version: str, *needs: str) -> None:
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        info = f"{name}-{version}.dist-info"
        lines = [
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
            *(f"Requires-Dist: {need}\n" for need in needs),
        ]
        file.writestr(f"{info}/METADATA", "".join(lines))
        file.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        file.writestr(f"{info}/RECORD", "")


@pytest.mark.skipif(not UV.exists(), reason="uv is not in this environment: make setup")
@pytest.mark.parametrize(
    ("constraints", "problem"),
    [
        ("torch==2.0\ntriton==3.9 ; sys_platform == 'linux'\n", None),
        ("torch==2.0\ntriton==3.6 ; sys_platform == 'linux'\n", "triton"),
        ("torch==2.0\n", "not pinned: triton==3.9"),
        ("torch==2.0+cpu\ntriton==3.9\n", "torch"),
    ],
)
def test_a_lock_that_strangers_cannot_resolve_is_found(
    tmp_path: Path, shared_folder: Path, constraints: str, problem: str | None
) -> None:
    """The bug of the first set-up: a pin of triton beside a torch that wants its own."""
    wheel(tmp_path, "torch", "2.0", "triton~=3.9.0; platform_system == 'Linux'")
    for version in ("3.6", "3.9"):
        wheel(tmp_path, "triton", version)
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "demo"\nversion = "1"\ndependencies = ["torch>=1"]\n'
    )
    (tmp_path / "constraints.txt").write_text(constraints)
    linux, mac = lock.Target("3.12", "Linux arm64"), lock.Target("3.13", "macOS arm64")
    # uv would ask every Python of the machine what it is, unless its cache knows
    this = ["--python", sys.executable, "--cache-dir", str(shared_folder / "uv")]
    settings = ["--no-index", "--find-links", str(tmp_path), *this]
    surroundings = {
        name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_"))
    }
    problems = lock.check(tmp_path, UV, [linux, mac], surroundings, settings, content=())
    if problem is None:
        assert problems == {}
    else:
        assert problem in problems[linux]
        assert (mac in problems) == ("cpu" in constraints), "macOS needs no triton"


def test_another_python_or_half_an_environment_is_made_again(tmp_path: Path) -> None:
    venv = tmp_path / ".venv"
    assert not environment.is_this_python(venv)
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to("/no/such/python")  # what is left when a Python is removed
    assert not environment.is_this_python(venv)
    python = environment.make_venv(venv)
    assert environment.is_this_python(venv)
    assert environment.output(python, "-m", "pip", "--version").startswith("pip ")
    marker = venv / "kept"
    marker.touch()
    assert environment.make_venv(venv) == python
    assert marker.exists(), "one that fits is kept"


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "thesis.tex").touch()
    with pytest.raises(
        environment.SetupError,
        match=r"\.venv is there and is no virtual environment \(no pyvenv.cfg\): move it away",
    ):
        environment.make_venv(tmp_path / ".venv")
    assert (tmp_path / ".venv" / "thesis.tex").exists()


def test_a_python_without_ensurepip_is_told_which_package_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "works", lambda *command, environment=None: False)
    with pytest.raises(
        environment.SetupError, match=rf"apt install python3\.{sys.version_info.minor}-venv"
    ):
        environment.make_venv(tmp_path / ".venv")


def test_a_ready_environment_is_not_touched_and_remembers_its_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, list[str]]] = []

    class Recorded:
        def run(self, what: str, arguments: list[str], hint: str = "") -> None:
            ran.append((what, arguments))

    monkeypatch.setattr(environment, "make_venv", lambda venv: venv / "bin" / "python")
    monkeypatch.setattr(environment, "find_installer", lambda python: Recorded())
    monkeypatch.setattr(environment, "is_this_python", lambda venv: True)
    monkeypatch.setattr(environment.sys, "platform", "linux")
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    environment.make_main(tmp_path, "cpu", "ray")
    (torch, others), ran[:] = list(ran), []
    assert torch[1][:2] == ["--torch-backend", "cpu"]
    assert torch[1][-1] == "torch"
    assert "--torch-backend" not in others[1], (
        "triton comes from the index: PyTorch's CPU index need not have it"
    )
    assert any(argument.endswith("[ray,research,serve]") for argument in others[1])
    environment.make_main(tmp_path, None, None)
    assert ran == []
    environment.make_main(tmp_path, "default", None)
    assert ran[0] == (
        "torch",
        ["--reinstall-package", "torch", "-c", str(environment.LOCK), "torch"],
    )
    assert any(argument.endswith("[ray,research,serve]") for argument in ran[1][1]), "extras stay"


def test_bytecode_is_written_once_where_python_would_write_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A container's PYTHONDONTWRITEBYTECODE=1 made every process compile PyTorch's modules again."""
    (tmp_path / "imported_by_all.py").write_text("answer = 42\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(environment, "_IMPORTED", ("imported_by_all",))
    environment.compile_imports(Path(sys.executable))
    assert list((tmp_path / "__pycache__").glob("imported_by_all.*.pyc"))
    monkeypatch.setattr(environment, "_IMPORTED", ("is_not_there",))
    environment.compile_imports(Path(sys.executable))
    said = capfd.readouterr().err
    assert "No module named 'is_not_there'" in said
    assert "the environment is complete" in said


def test_the_site_has_a_small_environment_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []

    class Recorded:
        def run(self, what: str, arguments: list[str], hint: str = "") -> None:
            ran.append(arguments)

    monkeypatch.setattr(environment, "make_venv", lambda venv: venv / "bin" / "python")
    monkeypatch.setattr(environment, "find_installer", lambda python: Recorded())
    monkeypatch.setattr(environment, "is_this_python", lambda venv: True)
    environment.make_docs(tmp_path)
    environment.make_docs(tmp_path)
    (arguments,) = ran
    assert arguments[-1].endswith("pyproject.toml:docs"), "the group alone, without the project"
    assert str(environment.LOCK) in arguments
    for package in ("mkdocs", "mkdocs-material"):
        assert environment.locked(package)


def test_vllm_says_which_pythons_it_runs_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment.sys, "version_info", type("V", (), {"minor": 99})())
    with pytest.raises(
        environment.SetupError, match=r"runs on Python 3\.11 to 3\.\d\d, this is .*VLLM_PYTHON="
    ):
        environment.make_vllm(tmp_path / ".venv-vllm", "cpu")


@pytest.mark.parametrize(("variable", "compiles"), [("1", True), ("", False)])
def test_the_bytecode_of_vllm_is_written_once_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, compiles: bool
) -> None:
    """Three processes of each vLLM launch compiled it again: on two slow cores one had not started after 240 s."""
    ran: list[list[str]] = []

    class Recorded:
        uv = Path("uv")

        def run(self, what: str, arguments: list[str], hint: str = "") -> None:
            ran.append(arguments)

    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", variable)
    monkeypatch.setattr(environment, "make_venv", lambda venv: venv / "bin" / "python")
    monkeypatch.setattr(environment, "find_installer", lambda python: Recorded())
    environment.make_vllm(tmp_path, "cpu")
    assert ["--compile-bytecode" in arguments for arguments in ran] == [compiles, compiles]


def test_without_uv_pip_installs_the_same_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(
        environment, "run_with_sign_of_life", lambda command, *_: commands.append(command) or 0
    )
    monkeypatch.setattr(
        environment.index_settings, "for_uv", lambda python: index_settings.UvSettings()
    )
    installer = environment.Installer(Path(sys.executable), uv=None)
    installer.run("torch", ["-c", "constraints.txt", "torch"])
    assert commands[0][1:4] == ["-m", "pip", "install"]
    assert commands[0][-3:] == ["-c", "constraints.txt", "torch"]
    with pytest.raises(environment.SetupError, match="TORCH=cpu needs uv"):
        installer.run("torch", ["--torch-backend", "cpu", "torch"])


def test_a_failed_installation_says_what_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        environment.index_settings,
        "for_uv",
        lambda python: index_settings.UvSettings(arguments=["--no-index"]),
    )
    installer = environment.Installer(Path(sys.executable), uv=Path("/bin/false"))
    words = r"torch could not be installed; the lines above say why\. Ask PyTorch's index\."
    with pytest.raises(environment.SetupError, match=words):
        installer.run("torch", ["torch"], hint="Ask PyTorch's index")


def test_long_work_shows_that_it_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(0.5)", "--quiet"]
    assert environment.run_with_sign_of_life(command, os.environ, "torch", every_s=0.1) == 0
    assert re.search(r"still at torch, \d+ s", capfd.readouterr().err)


def test_an_interpreter_is_found_by_version_or_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = f"3.{sys.version_info.minor}"
    shims = tmp_path / "shims"
    shims.mkdir()
    # as pyenv has them for versions that are not switched on
    (shims / f"python{version}").write_text("#!/bin/sh\nexit 127\n")
    (shims / f"python{version}").chmod(0o755)
    real = tmp_path / "root" / "versions" / f"{version}.1" / "bin"
    real.mkdir(parents=True)
    (real / f"python{version}").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(shims))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("UV_PYTHON_INSTALL_DIR", str(tmp_path / "none"))
    assert strangers.interpreter(version) == str(real / f"python{version}")
    assert strangers.interpreter(sys.executable) == sys.executable
    assert strangers.interpreter("3.99") is None


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
def test_make_names_the_pythons_that_fit() -> None:
    done = subprocess.run(
        ["make", "--no-print-directory", "PYTHON=/no/such/python", "setup"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "Python 3.11 to 3.14 is needed" in done.stderr
    assert "make PYTHON=" in done.stderr
