"""Train the demo's improver by RL on 1 process with 4 devices and on 2 processes with 2, and compare the records.

    python -m tests.hosts.demo_on_two_hosts DIRECTORY [--records N] [--supervised STEPS] [--stage1 STEPS] ...

Everything is the demo's but what is said here; what comes before the improver's RL is trained once, for both. Prints
the largest difference of every metric, and ends with 0 if all are the same to 1e-4. DIRECTORY must not exist.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import sys
import time

from .together import finish, records, start

BEFORE = (
    ("sft", "policy"),
    ("sft", "improver"),
    ("reward", "bt"),
    ("reward", "gap"),
    ("rl", "policy"),
)
TOLERANCE = 1e-4
FORMS = {"1 process x 4 devices": (1, 4), "2 processes x 2 devices": (2, 2)}


def command(directory: pathlib.Path, verb: str, role: str, options: argparse.Namespace) -> list[str]:
    """Return the command of one stage of the demo."""
    stages = ("sft_policy", "sft_improver", "reward_bt", "reward_gap")
    settings = {f"{stage}/loop.Loop.steps": options.supervised for stage in stages} | {
        "rlhf/curriculum.Round.steps": 20,
        "rl_policy/rl.Rl.snapshots": (10,),
        "ORIGINAL": "rl_policy:10",
        "evaluate.Evaluate.policy_curve": {},
        "stage1/curriculum.Round.steps": options.stage1,
        "stage2/curriculum.Round.steps": options.stage2,
        "synthetic.SyntheticConfig.num_records": options.records,
        "rl.RlTraining.log_every": 1,
        "MODEL_DIR": str(directory),
    }
    bound = [f"--gin.{name}={value!r}" for name, value in settings.items()]
    return [verb, f"--role={role}", "--gin_file=recipes/demo.gin", *bound]


def train(options: argparse.Namespace) -> list[pathlib.Path]:
    """Train what comes before once, then the improver in both forms; return the two runs."""
    base = options.directory / "before"
    for verb, role in BEFORE:
        begin = time.monotonic()
        finish(
            start(options.directory / "logs" / f"{verb}_{role}", [command(base, verb, role, options)], devices=1), 3600
        )
        print(f"{verb} {role}: {time.monotonic() - begin:.0f} s", flush=True)
    runs = []
    for name, (processes, devices) in FORMS.items():
        run = options.directory / f"{processes}x{devices}"
        shutil.copytree(base, run)
        begin = time.monotonic()
        line = command(run, "rl", "improver", options)
        finish(start(options.directory / "logs" / run.name, [line] * processes, devices=devices), 3600)
        print(f"rl improver, {name}: {time.monotonic() - begin:.0f} s", flush=True)
        runs.append(run)
    return runs


def worst(left: pathlib.Path, right: pathlib.Path) -> dict[str, tuple[float, int]]:
    """Return metric -> (largest difference, relative where values are above 1, and its step)."""
    found: dict[str, tuple[float, int]] = {}
    for ours, theirs in zip(records(left, "rl_improver"), records(right, "rl_improver"), strict=True):
        for name in ours.keys() - {"kind", "step"}:
            difference = abs(ours[name] - theirs[name]) / max(abs(ours[name]), 1.0)
            found[name] = max(found.get(name, (0.0, 0)), (difference, ours["step"]))
    return found


def main(arguments: list[str]) -> int:
    """Do it; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--records", type=int, default=90000)
    parser.add_argument("--supervised", type=int, default=1500, help="steps of every SFT and reward stage")
    parser.add_argument("--stage1", type=int, default=100)
    parser.add_argument("--stage2", type=int, default=120)
    options = parser.parse_args(arguments)
    options.directory = options.directory.resolve()
    options.directory.mkdir(parents=True)
    differences = worst(*train(options))
    for name, (difference, step) in sorted(differences.items()):
        print(f"{name:28} {difference:.1e}  (step {step})")
    same = max(difference for difference, _ in differences.values()) <= TOLERANCE
    print("the same" if same else f"different by more than {TOLERANCE:g}")
    return int(not same)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
