"""Where packages come from: what pip was told (its variables, its configuration files), said again
in uv's words.

uv reads none of pip's settings. Who sits behind a proxy or an index mirror has told pip about it,
as a rule, and should not have to say it twice. What uv was told itself, in its variables or in
`uv.toml`, stands.

Not taken over: `constraint`. The exact versions are those of constraints.txt; a second list could
only contradict it.
"""

from __future__ import annotations

import ast
import os
import ssl
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

_SECTIONS = ("global", "install", ":env:")
"""The sections of pip's configuration that `pip install` reads, the later before the earlier."""
_SINGLE = {
    "index-url": "UV_DEFAULT_INDEX",
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
    "timeout": "UV_HTTP_TIMEOUT",
    "retries": "UV_HTTP_RETRIES",
}
_LISTS = {
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "trusted-host": ("UV_INSECURE_HOST", " "),
}
"""Settings of several values: uv's variable, and what stands between its values (pip: white space)."""
_OWN = {
    "index-url": ("UV_INDEX_URL",),
    "extra-index-url": ("UV_EXTRA_INDEX_URL",),
}
"""Other variables with which uv is told the same."""
_TOML = {
    "index-url": ("index", "index-url"),
    "extra-index-url": ("index", "extra-index-url"),
    "find-links": ("find-links",),
    "trusted-host": ("allow-insecure-host",),
    "no-index": ("no-index",),
}
"""Keys of uv.toml that say the same."""
NOT_A_STRANGERS = ("find-links", "extra-index-url", "constraint", "no-index")
"""What a machine has beside its index: packages on its disk, another's packages, versions of its own."""


@dataclass
class UvSettings:
    environment: dict[str, str] = field(default_factory=dict)
    """Variables to add for uv."""
    arguments: list[str] = field(default_factory=list)
    """Arguments of `uv pip`: what has no variable."""


def parse_pip_config(listing: str) -> dict[str, str]:
    """The settings of `pip install` in the output of `pip config list`, by their long names. Raises
    ValueError.
    """
    found: dict[str, dict[str, str]] = {section: {} for section in _SECTIONS}
    for line in listing.splitlines():
        name, equals, value = line.partition("=")
        section, dot, key = name.rpartition(".")
        if not equals or not dot:
            raise ValueError(
                f"`pip config list` printed {line!r}, which is not SECTION.NAME='VALUE'"
            )
        if section in found:
            found[section][key.replace("_", "-")] = str(ast.literal_eval(value))
    return {key: value for section in _SECTIONS for key, value in found[section].items()}


def pip_settings(python: str | os.PathLike[str]) -> dict[str, str]:
    """What the pip of this interpreter was told: its variables and its configuration files, its own
    before the user's before the machine's. Without a pip the variables alone.
    """
    done = subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", "config", "list"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return parse_pip_config(done.stdout)
    return {
        name[4:].lower().replace("_", "-"): value
        for name, value in os.environ.items()
        if name.startswith("PIP_") and value
    }


def uv_settings(
    pip: Mapping[str, str],
    environ: Mapping[str, str],
    toml_keys: Iterable[str] = (),
    system_store: bool = False,
) -> UvSettings:
    """`pip`: its settings by long name; `environ`: in which uv's own variables are looked for;
    `toml_keys`: what uv.toml says;
    `system_store`: this machine has certificates of its own, which pip trusts."""
    result = UvSettings()
    told = {key for key, names in _TOML.items() if set(names) & set(toml_keys)}

    def say(key: str, variable: str, value: str) -> None:
        if key not in told and not any(
            environ.get(name) for name in (variable, *_OWN.get(key, ()))
        ):
            result.environment[variable] = value

    for key, variable in _SINGLE.items():
        if pip.get(key):
            say(key, variable, pip[key])
    for key, (variable, between) in _LISTS.items():
        values = [os.path.expanduser(value) for value in pip.get(key, "").split()]
        if values:
            say(key, variable, between.join(values))
    # pip takes the best version of all its indexes, uv the first index that knows the package.
    if "UV_INDEX" in result.environment and not environ.get("UV_INDEX_STRATEGY"):
        result.environment["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    if pip.get("proxy"):
        for variable in ("HTTP_PROXY", "HTTPS_PROXY"):
            if not any(
                environ.get(name) for name in (variable, variable.lower(), "ALL_PROXY", "all_proxy")
            ):
                result.environment[variable] = pip["proxy"]
    if _is_true(pip.get("no-index")) and "no-index" not in told:
        result.arguments.append("--no-index")
    if pip.get("keyring-provider") == "subprocess":
        say("keyring-provider", "UV_KEYRING_PROVIDER", "subprocess")
    if _is_true(pip.get("no-cache-dir")):
        say("no-cache-dir", "UV_NO_CACHE", "1")
    if system_store and not any(
        environ.get(name) or result.environment.get(name)
        for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "UV_NATIVE_TLS")
    ):
        say("system-certs", "UV_SYSTEM_CERTS", "1")
    return result


def for_uv(python: str | os.PathLike[str]) -> UvSettings:
    """The same for the pip of this interpreter, this process's variables and this user's uv.toml."""
    return uv_settings(pip_settings(python), os.environ, toml_keys(os.environ), has_certificates())


def has_certificates() -> bool:
    """Whether the operating system keeps certificates for programs to trust. A bare container has
    none; uv then uses its own.
    """
    paths = ssl.get_default_verify_paths()
    directory = Path(paths.capath) if paths.capath else None
    return (
        sys.platform == "darwin"
        or bool(paths.cafile)
        or (directory is not None and directory.is_dir() and any(directory.iterdir()))
    )


def toml_keys(environ: Mapping[str, str]) -> set[str]:
    """The keys of the configuration files that uv reads for this user and this machine."""
    if environ.get("UV_CONFIG_FILE"):
        files = [Path(environ["UV_CONFIG_FILE"])]
    else:
        home = Path(environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser())
        machine = (environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(":")
        files = [folder / "uv" / "uv.toml" for folder in (home, *map(Path, machine))] + [
            Path("/etc/uv/uv.toml")
        ]
    keys: set[str] = set()
    for file in files:
        if file.is_file():
            content = tomllib.loads(file.read_text())
            keys |= set(content) | set(content.get("pip", {}))
    return keys


def as_a_stranger(pip: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of someone who has this machine's way to the index (mirror, proxy,
    certificates) and nothing else of it: no wheels on the disk, no further index, no versions of
    its own, no configuration file.
    """
    hidden = {f"PIP_{key.replace('-', '_').upper()}" for key in NOT_A_STRANGERS}
    hidden |= {
        "UV_FIND_LINKS",
        "UV_INDEX",
        "UV_EXTRA_INDEX_URL",
        "UV_CONSTRAINT",
        "UV_OVERRIDE",
        "UV_TORCH_BACKEND",
    }
    result = {name: value for name, value in environ.items() if name not in hidden}
    for key, value in pip.items():
        if key not in NOT_A_STRANGERS:
            result[f"PIP_{key.replace('-', '_').upper()}"] = value
    return {**result, "PIP_CONFIG_FILE": os.devnull}


def _is_true(value: str | None) -> bool:
    return (value or "").lower() in ("1", "true", "yes", "on")
