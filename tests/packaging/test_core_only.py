"""Everything but the rim imports and works where TensorFlow, SeqIO and gin are not installed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RIM = ("tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio", "gin", "torch", "transformers")


def _modules() -> list[Path]:
    return sorted((ROOT / "pit_jax").rglob("*.py"))


def _rim(path: Path) -> bool:
    return path.name.startswith("seqio_") or path.name in ("gin_config.py", "__main__.py")


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def test_rim_libraries_are_imported_in_their_places_only() -> None:
    """TensorFlow and SeqIO in data/seqio_*.py, gin in cli/gin_config.py; also no lazy import anywhere else."""
    places = {
        (str(path.relative_to(ROOT / "pit_jax")), name)
        for path in _modules()
        for name in _imports(path) & {"tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio", "gin"}
    }
    allowed = {
        (place, name)
        for place, name in places
        if (place.startswith("data/seqio_") and name != "gin") or (place, name) == ("cli/gin_config.py", "gin")
    }
    assert places == allowed
    assert ("cli/gin_config.py", "gin") in places


def test_every_module_imports_without_the_rim() -> None:
    """One process in which the rim cannot be imported imports all other modules."""
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in _modules()
        if not _rim(path)
    ]
    assert "pit_jax.stages.rl" in names
    program = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({RIM!r}))\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_pretrained_models_load_without_the_rim() -> None:
    """The everyday interface needs nothing but the core: model, tokenizer, logits and a continuation."""
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({RIM!r}))\n"
        "import pit_jax\n"
        "assert 'jax' not in sys.modules\n"
        f"model = pit_jax.load_pretrained({str(ROOT / 'tests' / 'data' / 'hf' / 'qwen2')!r})\n"
        "assert model.logits([[3, 4, 5]]).shape == (1, 3, 96)\n"
        "assert len(model.generate([[3, 4, 5]], max_new_tokens=2)[0]) <= 2\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
