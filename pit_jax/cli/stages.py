"""The verbs that run stages: a recipe is built from gin, then does the work itself."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pit_jax.core.errors import ConfigError

if TYPE_CHECKING:
    from etils import epath

    from pit_jax.stages.pipeline import Recipe

ROOT = "pit_jax.stages.pipeline:Recipe"


def build_recipe(args: argparse.Namespace, defaults: tuple[str, ...] = ()) -> tuple[Recipe, str]:
    """Return the recipe that the command line describes, and its configuration as gin text.

    Args:
      args: of a verb with gin flags.
      defaults: bindings (`NAME=VALUE`) for required macros that the verb can do without.
    """
    try:
        from pit_jax.cli.gin_config import GinSource, build
    except ModuleNotFoundError as error:
        if error.name != "gin":
            raise
        raise ConfigError("Recipes need gin, which is not installed here: pip install gin-config.") from error
    source = GinSource(
        files=tuple(args.gin_file),
        bindings=args.gin_bindings,
        search_paths=tuple(args.gin_search_paths),
        defaults=defaults,
    )
    built = build(source, ROOT)
    _use_folders(args)
    return built.value, built.text


def _use_folders(args: argparse.Namespace) -> None:
    """Tell TFDS and SeqIO where data are; without such flags neither is imported."""
    if args.tfds_data_dir is None and not args.seqio_additional_cache_dirs:
        return
    try:
        from pit_jax.data.seqio_runtime import use_folders
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--tfds_data_dir and --seqio_additional_cache_dirs are for SeqIO, which is not installed here ({error}). "
            "Leave them out, or install seqio."
        ) from error
    use_folders(args.tfds_data_dir, args.seqio_additional_cache_dirs)


def pipeline(args: argparse.Namespace) -> None:
    """`pit-jax pipeline`: run every stage of the recipe in order."""
    recipe, text = build_recipe(args)
    if args.print_config:
        print(text)
        return
    _run(recipe, text, None)


def stage(args: argparse.Namespace) -> None:
    """`pit-jax lm | sft | reward | rl | dpo | evaluate ...`: run the one stage of that kind and role."""
    recipe, text = build_recipe(args)
    name = select_stage(recipe, args.verb, args.role, args.stage)
    if args.print_config:
        print(text)
        return
    _run(recipe, text, [name])


def select_stage(recipe: Recipe, verb: str, role: str | None, name: str | None = None) -> str:
    """Return the name of the recipe's stage of kind `verb` and, if given, of that role and name.

    Raises:
      ConfigError: there is none, or there are several; what the recipe has is listed.
    """
    found = [s for s in recipe.stages if s.verb == verb and role in (None, s.role) and name in (None, s.name)]
    if len(found) == 1:
        return found[0].name
    flags = [f"--{flag}={value}" for flag, value in (("role", role), ("stage", name)) if value]
    wanted = " ".join([verb, *flags])
    if found:
        choices = [f"--role={s.role}" for s in found]
        if len(set(choices)) < len(found):
            choices = [f"--stage={s.name}" for s in found]
        raise ConfigError(f"The recipe has {len(found)} stages for {wanted!r}. Choose one with {' or '.join(choices)}.")
    listed = "; ".join(f"{s.name} ({s.verb}{f' --role={s.role}' if s.role else ''})" for s in recipe.stages)
    raise ConfigError(f"The recipe has no stage for {wanted!r}. It has: {listed or 'no stages at all'}.")


def improve(args: argparse.Namespace) -> None:
    """`pit-jax improve`: improve answers of a file, or to prompts that are typed or piped."""
    from pit_jax.stages.improve import Request, improve_file
    from pit_jax.stages.improve_typed import improve_typed

    request = Request(
        checkpoint=args.checkpoint,
        input=args.input,
        output=args.output,
        iterations=args.iterations,
        candidates=args.candidates,
        accept=args.accept,
        margin=args.margin,
        temperature=args.temperature,
        seed=args.seed,
        on_bad_record=args.on_bad_record,
        chat=args.chat,
        draft_tokens=args.draft_tokens,
    )
    if request.input is None:
        improve_typed(request)
    else:
        improve_file(request)


def convert(args: argparse.Namespace) -> None:
    """`pit-jax convert`: turn a checkpoint into another format."""
    from pit_jax.stages.convert import Conversion
    from pit_jax.stages.convert import convert as run

    size = {} if args.max_shard_size is None else {"max_shard_size": args.max_shard_size}
    run(
        Conversion(
            source=args.input,
            output=args.output,
            format=args.format,
            base=args.base,
            dtype=args.dtype,
            config=args.config,
            layout=args.layout,
            scanned=args.scanned,
            step=args.step,
            **size,
        )
    )


def _run(recipe: Recipe, text: str, names: list[str] | None) -> None:
    """Run stages, and leave the configuration beside what they make, in MODEL_DIR/config.gin.

    A directory that holds a run already is the recipe's to accept or refuse: the file is written once it has accepted.
    """
    from etils import epath

    from pit_jax.sharding import processes

    def record() -> None:
        if processes.is_first():
            _record(epath.Path(recipe.model_dir) / "config.gin", text)

    recipe.run(names, claimed=record)


def _record(path: epath.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
