"""The measured code of an earlier commit, read from git without checking it out."""

import ast
import io
import subprocess
import tarfile
import tempfile
from pathlib import Path

from experiments.host.provenance import ROOT, code_digest

_PROVENANCE = ("experiments/host/provenance.py", "experiments/provenance.py")
"""Where a commit says which files are measured code; the second is the place of older commits."""


class NotInGitError(Exception):
    """Why the code of a commit cannot be read; the message is a reason for a person."""


def code_digest_of(commit: str, root: Path = ROOT) -> str:
    """The digest that `experiments.host.provenance.code_digest` gave in a clean checkout of a
    commit: of the files that this commit itself calls measured code. Raises NotInGitError.
    """
    with tempfile.TemporaryDirectory() as aside:
        tree = Path(aside)
        _extract(commit, root, tree)
        source = next((tree / name for name in _PROVENANCE if (tree / name).is_file()), None)
        if source is None:
            raise NotInGitError(
                f"commit {commit[:12]} does not say which of its files are measured"
            )
        return code_digest(tree, _patterns(source.read_bytes()))


def _extract(commit: str, root: Path, target: Path) -> None:
    """Writes src/ and experiments/ of a commit into a folder."""
    command = ["git", "-C", str(root), "archive", "--format=tar", commit, "src", "experiments"]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError as error:
        raise NotInGitError(f"git cannot be run: {error}") from error
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["git archive failed"]
        raise NotInGitError(
            f"this clone cannot read commit {commit[:12]} ({lines[0]}); fetch the whole history, "
            "for example with `git fetch --unshallow`"
        )
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(target, filter="data")


def _patterns(source: bytes) -> tuple[str, ...]:
    """The value of _MEASURED_CODE in provenance.py. Raises NotInGitError."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "_MEASURED_CODE"
            for target in node.targets
        ):
            return tuple(ast.literal_eval(node.value))
    raise NotInGitError("the commit's provenance.py has no _MEASURED_CODE")
