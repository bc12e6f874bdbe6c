"""The flags of `pit-jax`, and help that teaches. Imports nothing slow: `pit-jax --help` answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import pit_jax
from pit_jax.cli import serve, shipped

_STAGES = "pit_jax.cli.stages:"
_DATA = "pit_jax.cli.data:"

_OVERVIEW = """\
Train models that improve their own answers (PIT).

A recipe, a gin file, describes a whole run: data, model and stages. `pipeline` runs all of its stages in order,
skips those that are complete and continues one that was interrupted; `sft`, `reward`, `rl` ... run one of them.
"""

_EXAMPLES = """\
start here
  pit-jax pipeline --gin_file=recipes/demo.gin --gin.MODEL_DIR="'runs/demo'"
      everything, on a small synthetic set, in minutes on a laptop; ends with a report in runs/demo/report

your own data
  pit-jax inspect-data --input=mine.jsonl -n 3                  is the file all right, and what does it hold?
  pit-jax inspect-data --gin_file=my.gin --view=sft_improver    what the model is trained on, mask visible
  pit-jax pipeline --gin_file=my.gin --gin.MODEL_DIR="'runs/mine'"

look closer
  pit-jax pipeline --gin_file=studies/main_table.gin --gin.MODEL_DIR="'runs/demo'"        all systems, by all judges

use what was trained
  pit-jax improve --checkpoint=runs/demo                                  type prompts, see what changes
  pit-jax improve --checkpoint=runs/demo --input=drafts.jsonl --output=better.jsonl
  pit-jax serve --checkpoint=runs/demo                                    OpenAI's API on localhost:8000
  pit-jax convert --input=runs/mine/rl_improver --output=improver_hf      for transformers, vLLM, ...

a large machine
  pit-jax plan --gin_file=recipes/pit_t5_xxl.gin --topology=v5e:16x16     does it fit? asked without the machine
  pit-jax doctor                                                          is everything there that a run needs?

a model you have
  pit-jax pipeline --gin_file=recipes/pretrained.gin --gin.INITIAL_CHECKPOINT_PATH="'path/to/hf'" ...

settings
  --gin.NAME=VALUE overrides what the files say; strings need quotes of their own:
      --gin.MODEL_DIR="'runs/a'"   --gin.RANDOM_SEED=3   --gin.sft_policy/Loop.steps=500
  --print_config shows the result of all files and flags without running anything
"""

_GIN_EXAMPLE = """\
example
  pit-jax {verb} --gin_file={recipe} --gin.MODEL_DIR="'runs/mine'"{more}

recipes that come with pit_jax, and studies that go on from one
  {recipes}
"""

_IMPROVE_EXAMPLE = """\
DIR is a run (its improver is used) or one stage of it. Each line of the input has `prompt` and `response`, the draft;
without drafts the run's policy writes them. Each line of the output has the improved response and how it came about.
Without --input prompts are typed, which shows what changes word by word, or piped, a line each.

Rows are written as they come. --output=FILE collects them in FILE.part until all are there; the same command goes on
from there after an interruption.

examples
  pit-jax improve --checkpoint=runs/demo
  pit-jax improve --checkpoint=runs/demo --input=drafts.jsonl --output=better.jsonl --iterations=2
  cat prompts.txt | pit-jax improve --checkpoint=runs/demo --candidates=4 | jq -r .improved
"""

_ANNOTATE_EXAMPLE = """\
Each person gets a page that needs no network (and a table), with sides and order of their own; `pit-jax votes` reads
what they send back. More: docs/annotation.md.

example
  pit-jax annotate --candidate=better.jsonl --baseline=drafts.jsonl --annotators=ann,bob --output=pages --key=key.json
  pit-jax votes ann.json bob.json --key=key.json
"""

_CONVERT_EXAMPLE = """\
The input is a stage of a run (RUN/STAGE or RUN/STAGE:SNAPSHOT), a Hugging Face or T5X checkpoint, a name on the
Hugging Face hub, or a PEFT adapter (with --base).

examples
  pit-jax convert --input=runs/mine/rl_improver --output=improver            a directory for transformers and vLLM
  pit-jax convert --input=runs/mine/rl_improver --output=adapter --format=peft
  pit-jax convert --input=t5x/checkpoint_1000000 --config=network.json --output=flan_hf
  pit-jax convert --input=google/flan-t5-base --output=flan_t5x --format=t5x
"""

_PLAN_EXAMPLE = """\
Compiles every program of every stage for a machine that need not be there, and says what each takes of a chip's memory,
what it computes, moves and sends, and whether it fits. Nothing is read or trained; data and weights need not exist.

machines
  v4:2x2x2  v5e:16x16  v5p:4x4x4  v6e:4x8  tpu7x:2x2x1     TPU slices; also v5p-128, v5e-256 ...
  2*v5p:4x4x4                                              two slices (or --slices=2)
  gpu:h200  gpu:h100:8  gpu:a100:8  cpu  cpu:8

examples
  pit-jax plan --gin_file=recipes/pit_gemma3_27b.gin --topology=v5p:4x4x4
  pit-jax plan --gin_file=recipes/pit_t5_xxl.gin --topology=v5e:16x16 --stage=rl_improver --mesh=fsdp=32,tensor=8
  pit-jax plan --gin_file=recipes/pit_t5_xxl.gin --topology=v6e:16x16 --stage=sft_policy --search

exit status: 0 everything fits, 3 something does not, 1 error
"""

_DOCTOR_EXAMPLE = """\
Looks at everything a run needs before it costs anything, and says what to do. On several hosts, start the same line
on every one of them: each looks at itself and process 0 prints.

examples
  pit-jax doctor                                                               this machine
  pit-jax doctor --gin_file=recipes/hh_rlhf_1b.gin --gin.MODEL_DIR="'gs://bucket/run'" ...
      the recipe's mesh and storage
  pit-jax doctor --mesh=fsdp=4,tensor=2 --model_dir=gs://bucket/run

exit status: 0 no problem, 1 problems
"""

_STAGE_VERBS = {
    "lm": ("pre-train a language model on text", ()),
    "sft": ("supervised fine-tuning of the policy or the improver", ("policy", "improver")),
    "reward": ("train a reward model: Bradley-Terry or the gap between two answers", ("bt", "gap")),
    "rl": ("reinforcement learning of the policy, or of the improver over its curriculum", ("policy", "improver")),
    "dpo": ("direct preference optimisation of the policy: no reward model", ()),
    "srt-data": ("SRT: responses of the base model, criticised and refined by a critic", ()),
    "srt": ("SRT: tune a model on responses, feedback and refinements", ()),
    "srt-pairs": ("SRT: pairs for DPO, by the tuned model's own scores", ()),
    "evaluate": ("compare the run's models on held-out prompts and write the report", ()),
    "study": ("compare systems with a study's question, judges and report", ()),
    "study-gap": ("compare gap models trained on different terms of their loss on held-out records", ()),
    "study-references": ("compare the gap model with the judge on references that models wrote", ()),
}
_EXAMPLE_RECIPES = {
    "lm": "recipes/hh_small.gin",
    "study": "studies/main_table.gin",
    "study-gap": "studies/gap_loss.gin",
    "study-references": "studies/reward_on_references.gin",
}


class _Parser(argparse.ArgumentParser):
    """Keeps the examples' line breaks, and never guesses abbreviated flags."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)  # type: ignore[arg-type]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the parsed command line; `gin_bindings` holds the `NAME=VALUE` of every `--gin.NAME=VALUE`.

    Exits with status 2 on wrong usage, and with 0 after `--help` or `--version`.
    """
    parser = _parser()
    bindings = [word.removeprefix("--gin.") for word in argv if word.startswith("--gin.")]
    args = parser.parse_args([word for word in argv if not word.startswith("--gin.")])
    for binding in bindings:
        if "=" not in binding:
            parser.error(f"--gin.{binding} has no value; write --gin.{binding}=VALUE in one word")
    if bindings and "gin_file" not in args:
        parser.error(f"{args.verb} takes no --gin.NAME=VALUE (got --gin.{bindings[0]})")
    args.gin_bindings = tuple(bindings)
    return args


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="pit-jax", description=_OVERVIEW, epilog=_EXAMPLES)
    parser.add_argument("--version", action="version", version=f"pit-jax {pit_jax.__version__}")
    verbs = parser.add_subparsers(
        title="verbs (pit-jax VERB --help says more)", dest="verb", metavar="VERB", required=True
    )

    def verb(name: str, summary: str, run: str, epilog: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=epilog)
        made.set_defaults(run=run)
        _add_common(made)
        return made

    pipeline = verb(
        "pipeline", "run all stages of a recipe, then the report", f"{_STAGES}pipeline", _gin_epilog("pipeline")
    )
    _add_gin(pipeline)
    _add_hosts(pipeline)
    for name, (summary, roles) in _STAGE_VERBS.items():
        more = f" --role={roles[-1]}" if roles else ""
        recipe = _EXAMPLE_RECIPES.get(name, "recipes/demo.gin")
        stage = verb(name, summary, f"{_STAGES}stage", _gin_epilog(name, more, recipe))
        _add_gin(stage)
        _add_hosts(stage)
        stage.set_defaults(role=None)
        if roles:
            stage.add_argument("--role", choices=roles, help="which stage of this kind the recipe should run")
        stage.add_argument("--stage", metavar="NAME", help="the same by its name, where there are several of a role")
    _add_improve(verb)
    serve.add_flags(
        verb("serve", "answer clients of OpenAI's API with an improver", "pit_jax.cli.serve:serve", serve.EPILOG)
    )
    _add_convert(verb)
    _add_plan(verb)
    _add_doctor(verb)
    _add_people(verb)
    _add_data(verb)
    return parser


def _gin_epilog(verb: str, more: str = "", recipe: str = "recipes/demo.gin") -> str:
    return _GIN_EXAMPLE.format(
        verb=verb, more=more, recipe=recipe, recipes="\n  ".join([*shipped.recipes(), *shipped.studies()]) or "(none)"
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("general")
    group.add_argument("--debug", action="store_true", help="show Python's traceback with an error")
    group.add_argument(
        "--compilation_cache", default="auto", metavar="DIR",
        help="where compiled programs are kept between runs; auto: the user's cache directory, off: nowhere"
        " (default: %(default)s)",
    )  # fmt: skip


def _add_gin(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "configuration", "--gin.NAME=VALUE sets a macro or a parameter; may be repeated, wins over the files"
    )
    group.add_argument(
        "--gin_file", action="append", default=[], metavar="FILE",
        help="a gin file: a path, or a name below a search path or pit_jax's own; repeat it, later ones win",
    )  # fmt: skip
    group.add_argument(
        "--gin_search_paths", type=_comma_list, default=(), metavar="DIR,DIR", help="further folders with gin files",
    )  # fmt: skip
    group.add_argument("--tfds_data_dir", metavar="DIR", help="where TensorFlow Datasets keeps its data sets")
    group.add_argument(
        "--seqio_additional_cache_dirs", type=_comma_list, default=(), metavar="DIR,DIR",
        help="folders with caches of SeqIO tasks; a task that has one is read from there",
    )  # fmt: skip
    group.add_argument("--print_config", action="store_true", help="print the configuration in force and stop")


def _add_hosts(parser: argparse.ArgumentParser, *, joins: bool = True) -> None:
    """Add what tells a process of the others; `joins`: the verb's process joins them before it does anything."""
    parser.set_defaults(joins=joins)
    group = parser.add_argument_group(
        "several hosts",
        "start the same line on every host; on TPU VMs, GKE (TPU), SLURM and Open MPI nothing need be said",
    )
    group.add_argument(
        "--coordinator_address", metavar="HOST:PORT", help="of process 0 (default: JAX_COORDINATOR_ADDRESS)"
    )
    group.add_argument("--process_count", type=int, metavar="N", help="of all hosts (default: JAX_PROCESS_COUNT)")
    group.add_argument("--process_id", type=int, metavar="N", help="of this process, from 0 (default: JAX_PROCESS_ID)")
    group.add_argument(
        "--process_timeout", type=float, default=60.0, metavar="SECONDS",
        help="without a sign of life after which a process counts as lost (default: 60)",
    )  # fmt: skip


def _add_improve(verb: Callable[[str, str, str, str], argparse.ArgumentParser]) -> None:
    parser = verb("improve", "improve answers: of a file, piped, or typed", f"{_STAGES}improve", _IMPROVE_EXAMPLE)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a run, or a stage of one")
    parser.add_argument(
        "--input", metavar="FILE",
        help="lines with `prompt` and, unless the run's policy is to write it, `response` (default: standard input, "
        "a prompt a line)",
    )  # fmt: skip
    parser.add_argument("--output", metavar="FILE", help="where the rows go (default: standard output)")
    parser.add_argument(
        "--chat", action="store_true", help="a prompt that is a text is a user's message, not a whole prompt"
    )
    parser.add_argument(
        "--on-bad-record", choices=("fail", "skip"), default="fail", help="stop at a bad line (default), or skip it"
    )
    parser.add_argument("--iterations", type=int, default=1, metavar="N", help="improve N times over (default: 1)")
    parser.add_argument("--candidates", type=int, default=1, metavar="N", help="draw N and keep the best (default: 1)")
    parser.add_argument(
        "--accept", choices=("gap", "always"), default="gap",
        help="keep a candidate only if the gap model prefers it (default), or always",
    )  # fmt: skip
    parser.add_argument(
        "--margin",
        type=float,
        default=0.0,
        metavar="M",
        help="by which the gap must rise with --accept=gap (default: 0)",
    )
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 is greedy (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same answers (default: 0)")
    parser.add_argument(
        "--draft-tokens", type=int, metavar="N",
        help="guess N tokens from the response and check them at once: the same answers, faster where they repeat it "
        "(default: as the run's improver)",
    )  # fmt: skip
    _add_hosts(parser)


def _add_convert(verb: Callable[[str, str, str, str], argparse.ArgumentParser]) -> None:
    parser = verb("convert", "turn a checkpoint into another format", f"{_STAGES}convert", _CONVERT_EXAMPLE)
    parser.add_argument("--input", required=True, metavar="CHECKPOINT", help="what is read; see below")
    parser.add_argument("--output", required=True, metavar="DIR", help="a directory that does not exist yet")
    parser.add_argument(
        "--format", choices=("hf", "t5x", "peft", "pit"), default="hf",
        help="hf: Hugging Face, adapters merged (default); peft: adapters alone; t5x; pit: ours",
    )  # fmt: skip
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the tensors (default: as read; float16 is read as float32)",
    )
    parser.add_argument("--base", metavar="DIR", help="the model a PEFT adapter stands on; with --format=peft its name")
    parser.add_argument("--config", metavar="FILE", help="JSON description of a T5X network (network, model, config)")
    parser.add_argument("--max_shard_size", type=int, metavar="BYTES", help="of a safetensors file (default: 5 GB)")
    parser.add_argument(
        "--layout", choices=("orbax", "legacy"), default="orbax", help="of a T5X checkpoint (default: orbax)"
    )
    parser.add_argument("--scanned", action="store_true", help="stack the layers of a T5X checkpoint (scalable T5)")
    parser.add_argument("--step", type=int, default=0, help="number of a T5X checkpoint's step (default: 0)")


def _add_plan(verb: Callable[[str, str, str, str], argparse.ArgumentParser]) -> None:
    parser = verb("plan", "say whether a recipe fits on a machine, without one", "pit_jax.cli.plan:plan", _PLAN_EXAMPLE)
    # A program for a machine that is not there can be written to a cache, but not read back.
    parser.set_defaults(compilation_cache="off")
    _add_gin(parser)
    parser.add_argument("--topology", required=True, metavar="MACHINE", help="what to plan for; see below")
    parser.add_argument("--slices", type=int, metavar="N", help="TPU slices (default: 1, or as MACHINE says)")
    parser.add_argument(
        "--mesh", metavar="AXIS=N,...",
        help="data, fsdp, tensor, sequence (default: the recipe's mesh, resized to the machine)",
    )  # fmt: skip
    parser.add_argument(
        "--stage", action="append", default=[], metavar="NAME", help="only this stage; may be repeated (default: all)"
    )
    parser.add_argument(
        "--search", action="store_true",
        help="also find, for each training stage, the largest batch and cheapest rematerialisation that fit",
    )  # fmt: skip
    parser.add_argument(
        "--compilations", type=int, default=12, metavar="N", help="most of --search for each stage (default: 12)"
    )
    parser.add_argument("--no-suggest", dest="suggest", action="store_false", help="do not try what would make it fit")
    parser.add_argument("--json", action="store_true", help="print JSON alone on standard output")


def _add_doctor(verb: Callable[[str, str, str, str], argparse.ArgumentParser]) -> None:
    parser = verb(
        "doctor", "check this machine, its devices, hosts and storage", "pit_jax.cli.doctor:doctor", _DOCTOR_EXAMPLE
    )
    _add_gin(parser)
    _add_hosts(parser, joins=False)
    parser.add_argument("--model_dir", metavar="DIR", help="storage to try (default: the recipe's MODEL_DIR)")
    parser.add_argument(
        "--mesh", metavar="AXIS=N,...",
        help="mesh to compare with the devices: data, fsdp, tensor, sequence (default: the recipe's)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON alone on standard output")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="longest wait for one check (default: 60)"
    )


def _add_people(verb: Callable[[str, str, str, str], argparse.ArgumentParser]) -> None:
    parser = verb(
        "annotate", "let people compare two files of responses", "pit_jax.cli.annotate:annotate", _ANNOTATE_EXAMPLE
    )
    for name in ("candidate", "baseline"):
        parser.add_argument(
            f"--{name}", required=True, metavar="FILE[:FIELD]",
            help="JSON Lines with `prompt` and FIELD (default: response), or AlpacaEval's model_outputs.json",
        )  # fmt: skip
    parser.add_argument("--annotators", type=_comma_list, required=True, metavar="NAME,NAME", help="who gets a page")
    parser.add_argument("--overlap", type=float, default=1.0, help="share of the questions that all get (default: 1)")
    parser.add_argument("--seed", type=int, default=1, help="of orders and sides (default: 1)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    parser.add_argument("--title", help="of the page")
    parser.add_argument("--instructions", metavar="TEXT", help="shown above the questions")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the pages go")
    parser.add_argument("--key", required=True, metavar="FILE", help="where it is kept which answer is whose")
    parser = verb("votes", "read what people said of two files of responses", "pit_jax.cli.annotate:votes", "")
    parser.add_argument("votes", nargs="+", metavar="FILE", help="what they sent back, JSON or CSV")
    parser.add_argument("--key", required=True, metavar="FILE", help="written by `pit-jax annotate`")
    parser.add_argument("--seed", type=int, default=1, help="of the intervals (default: 1)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_data(verb: Callable[[str, str, str, str], argparse.ArgumentParser]) -> None:
    inspect = verb(
        "inspect-data",
        "check a preference file, or show what a stage reads",
        f"{_DATA}inspect",
        _gin_epilog("inspect-data", " --view=rl"),
    )
    _add_gin(inspect)
    inspect.add_argument(
        "--input", metavar="FILE", help="a raw preference file (.jsonl, .gz, .xz, a glob) instead of a recipe"
    )
    _add_view(inspect)
    inspect.add_argument("-n", "--number", type=int, default=5, metavar="N", help="how many records (default: 5)")
    inspect.add_argument(
        "--on-bad-record", choices=("fail", "skip"),
        help="stop at a broken line, or count it and go on (default: as the recipe says; without one, fail)",
    )  # fmt: skip
    cache = verb(
        "cache",
        "write a view's tokenised examples to disk",
        f"{_DATA}cache",
        _gin_epilog("cache", " --view=rl --output=DIR"),
    )
    _add_gin(cache)
    _add_view(cache)
    cache.add_argument("--output", required=True, metavar="DIR", help="a folder that does not exist yet")
    cache.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    tokenizer = verb(
        "tokenizer",
        "train a SentencePiece vocabulary",
        f"{_DATA}tokenizer",
        _gin_epilog("tokenizer", " --vocab_size=8000 --output=DIR"),
    )
    _add_gin(tokenizer)
    tokenizer.add_argument(
        "--input", nargs="+", default=[], metavar="FILE", help="text or preference files instead of a recipe's data"
    )
    tokenizer.add_argument(
        "--input_format", choices=("preferences", "text"),
        help="what --input holds (default: preferences in .json files, else text, a document a line)",
    )  # fmt: skip
    tokenizer.add_argument("--vocab_size", type=int, metavar="N", help="number of pieces (default: as the recipe says)")
    tokenizer.add_argument("--seed", type=int, help="same texts and seed, same vocabulary")
    tokenizer.add_argument("--output", required=True, metavar="DIR", help="where the tokenizer is saved")


def _add_view(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--view", default="sft_improver", metavar="VIEW",
        help="lm, sft_policy, sft_improver (default), reward_bt, reward_gap, rl, evaluate, records (text; cache only)",
    )  # fmt: skip
    parser.add_argument(
        "--split", choices=("train", "validation"), default="train", help="which part of the data (default: train)"
    )


def _comma_list(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)
