"""A PATH of fake programs, and launchers run on it."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from typing import Any

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
NAMES = ("gcloud", "kubectl", "xpk", "sky", "srun", "scontrol", "squeue", "pit-jax", "python3", "nvidia-smi")

FLAGS = (
    "--gin.TOKENIZER='my model'",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 14, 'targets': 14}",
    '--gin.X=it\'s $HOME "b" \\n \\\\ & | ; * ~ # % $(echo no) `echo no` ${IFS} $$ $(HOME)',
    "--gin.Y=\tgrün ☃ !x  two spaces ",
    "--gin_file=meshes/cpu.gin",
    "",
    "--gin.Z='gs://bucket/a b'",
)
"""Words that every shell on the way would like to change."""


@dataclasses.dataclass(frozen=True)
class Tools:
    """The fakes of one test, in a folder of their own."""

    folder: pathlib.Path

    @classmethod
    def install(cls, folder: pathlib.Path, *without: str) -> Tools:
        """Make the folder of fakes."""
        source = (pathlib.Path(__file__).parent / "fake.py").read_text()
        (folder / "bin").mkdir(parents=True)
        program = folder / "fake"
        program.write_text(f"#!{sys.executable} -IS\n{source}")  # started hundreds of times
        program.chmod(0o755)
        for name in NAMES:
            if name not in without:
                (folder / "bin" / name).symlink_to(program)
        return cls(folder)

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment in which launchers find the fakes before anything else."""
        path = f"{self.folder / 'bin'}:/usr/bin:/bin"
        here = {"FAKE": str(self.folder), "FAKE_SITE": sysconfig.get_path("purelib"), "HOME": str(self.folder)}
        return {"PATH": path, "PIT_JAX": "pit-jax"} | here | more

    def write(self, name: str, *lines: str) -> None:
        """Set a piece of the fakes' state."""
        (self.folder / name).write_text("\n".join(lines))

    def run(self, script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a launcher to its end."""
        command = ["bash", str(LAUNCH / script), *words]
        return subprocess.run(
            command, capture_output=True, text=True, env=self.environment(**environment), timeout=60, cwd=self.folder
        )

    def start(self, script: str, *words: str) -> subprocess.Popen[str]:
        """Start a launcher."""
        return subprocess.Popen(
            ["bash", str(LAUNCH / script), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=self.environment(), cwd=self.folder, start_new_session=True,
        )  # fmt: skip

    def hanging(self) -> list[int]:
        """Return the processes of pit-jax that were told to hang."""
        path = self.folder / "hanging"
        return [int(pid) for pid in path.read_text().split()] if path.exists() else []

    def calls(self, *beginning: str) -> list[dict[str, Any]]:
        """Return the calls of a tool, whose words begin like this, in their order."""
        path = self.folder / "calls.jsonl"
        calls = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        tool, words = beginning[0], list(beginning[1:])
        return [call for call in calls if call["tool"] == tool and call["words"][: len(words)] == words]

    def words(self, *beginning: str) -> list[list[str]]:
        """Return the words of those calls."""
        return [call["words"] for call in self.calls(*beginning)]


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "this did not come to pass in time"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Return whether a process is there and has not ended."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z" and os.path.exists(f"/proc/{pid}")


def line(directory: str, *flags: str, recipe: str = "recipes/demo.gin") -> list[str]:
    """Return the words that every host is to run after the program's name."""
    return ["pipeline", f"--gin_file={recipe}", f"--gin.MODEL_DIR='{directory}'", *flags]
