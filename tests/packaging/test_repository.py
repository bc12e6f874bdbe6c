"""Rules about the repository itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_gin_folder_does_not_hide_gin_config() -> None:
    """An `__init__.py` anywhere in gin/ would turn the folder into a package named as gin-config's."""
    assert not list((ROOT / "gin").rglob("*.py"))
    code = "import gin; print(gin.__file__); gin.parse_config"
    for extra in ([], ["-P"]):
        done = subprocess.run(
            [sys.executable, *extra, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert Path(done.stdout.strip()).parent.parent != ROOT


def test_importing_the_package_is_free() -> None:
    """Neither `import pit_jax` nor the command line's parser may pull in jax, TensorFlow or gin."""
    code = (
        "import sys, pit_jax, pit_jax.cli.main, pit_jax.cli.arguments as a; a._parser().format_help();"
        "print(sorted({'jax', 'tensorflow', 'seqio', 'gin', 'numpy', 'flax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_found_lazily() -> None:
    import pit_jax

    for name in pit_jax.__all__:
        assert getattr(pit_jax, name) is not None
    assert not hasattr(pit_jax, "no_such_name")
