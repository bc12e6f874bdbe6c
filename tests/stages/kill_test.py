"""Kill training with `kill -9` at random moments, again and again, and compare its end with that of a run in peace.

    python -m tests.stages.kill_test DIRECTORY [--kills 20] [--seed 0] [--stages sft_policy,rl_improver,sft_policy:2]

Every stage of `nano.gin` is run in peace. Then each stage named (`NAME:2` on two processes, of which one is killed, and
soon after the other) is made again under kills: a quarter of them at any moment of an attempt's first seconds, the
others at any moment after it has begun to write a checkpoint. A run that comes to its end is compared, and another is
begun, until there have been so many kills. Ends with 0 if parameters, optimiser state, data position, records and
results were always the same, bit by bit.
"""

from __future__ import annotations

import argparse
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

from tests.stages import nano

STAGES = "sft_policy,reward_gap,rl_improver,sft_policy:2"
_START_SECONDS = 6.0
_LIMIT_SECONDS = 180.0


class Victim:
    """A stage that is made under kills, and the one it must come to equal."""

    def __init__(self, directory: pathlib.Path, stage: str, processes: int, peace: pathlib.Path) -> None:
        """Start with all other stages done."""
        self.stage, self.processes = stage, processes
        self.log = directory / f"{stage}_{processes}.log"
        self.run = nano.without(stage, peace, directory / f"killed_{stage}_{processes}")
        self.line = nano.command(self.run, nano.VERBS[stage])
        self.model = peace / stage
        if processes > 1:
            of_several = nano.without(stage, peace, directory / f"peace_{stage}_{processes}")
            line = nano.command(of_several, nano.VERBS[stage])
            nano.run(line, self.log, devices=1, processes=processes)
            self.model = of_several / stage

    def attempt(self, moments: random.Random) -> str | None:
        """Start the command and kill it; return when, None if it had ended before."""
        before = self._checkpoints()
        running = nano.start(self.line, self.log, devices=1, processes=self.processes)
        begin = time.monotonic()
        if moments.random() < 0.25:
            when = f"{_wait(running, moments.uniform(0.0, _START_SECONDS)):.2f} s after the start"
        else:
            while self._checkpoints() <= before and all(process.poll() is None for process in running):
                time.sleep(0.005)
                if time.monotonic() - begin > _LIMIT_SECONDS:
                    raise SystemExit(f"nothing happens; see {self.log}")
            # Mostly soon: a fast machine comes to its end in a second.
            when = f"{_wait(running, moments.uniform(0.0, 1.2) ** 2):.2f} s after the first checkpoint"
        if all(process.poll() == 0 for process in running):
            return None
        moments.shuffle(running)
        for process in running:
            process.send_signal(signal.SIGKILL)
            process.wait()
            time.sleep(moments.uniform(0.0, 0.05))
        return f"{when}; there is {', '.join(sorted(self._checkpoints())) or 'no checkpoint'}"

    def _checkpoints(self) -> set[str]:
        """Return the names of all checkpoints, of half ones too."""
        return {path.name for path in (self.run / self.stage).glob("checkpoint_*")}

    def finish(self) -> list[str]:
        """Let it come to its end and return what differs."""
        nano.run(self.line, self.log, devices=1, processes=self.processes)
        return nano.differences(self.model, self.run / self.stage)

    def begin_anew(self) -> None:
        """Remove what the stage has made."""
        shutil.rmtree(self.run / self.stage)


def _wait(running: list[subprocess.Popen[bytes]], seconds: float) -> float:
    """Wait so long, or until a process ends."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit and all(process.poll() is None for process in running):
        time.sleep(0.002)
    return seconds


def torment(victim: Victim, kills: int, moments: random.Random) -> list[str]:
    """Kill a stage so many times; return what differed at the ends it came to."""
    found: list[str] = []
    done = ends = 0
    while done < kills:
        when = victim.attempt(moments)
        if when is None:
            found += victim.finish()
            ends += 1
            victim.begin_anew()
            continue
        done += 1
        print(f"{victim.stage}: kill {done} {when}", flush=True)
    found += victim.finish()
    print(f"{victim.stage} on {victim.processes} process(es): {done} kills, {ends + 1} ends, {found or 'all the same'}")
    return found


def main(arguments: list[str]) -> int:
    """Do it; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default=STAGES)
    options = parser.parse_args(arguments)
    directory: pathlib.Path = options.directory.resolve()
    directory.mkdir(parents=True)
    peace, begin = directory / "peace", time.monotonic()
    nano.run(nano.command(peace, ("pipeline",)), directory / "peace.log", devices=1)
    print(f"in peace: {time.monotonic() - begin:.0f} s; seed {options.seed}", flush=True)
    found: list[str] = []
    for chosen in options.stages.split(","):
        stage, _, processes = chosen.partition(":")
        begin = time.monotonic()
        victim = Victim(directory, stage, int(processes or 1), peace)
        found += torment(victim, options.kills, random.Random(f"{options.seed}/{chosen}"))
        print(f"{chosen}: {time.monotonic() - begin:.0f} s", flush=True)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
