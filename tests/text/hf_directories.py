"""Where the tiny tokenizer directories lie, and how a test gets a changed copy of one."""

import json
import pathlib
import shutil

HERE = pathlib.Path(__file__).parents[1] / "data" / "hf_tokenizers"
CHAT = ("llama3", "qwen", "gemma", "mistral")
ALL = (*CHAT, "t5")


def changed(name, folder, /, file="tokenizer_config.json", without=(), **fields):
    """Copy a directory to `folder`, with other fields in one of its files."""
    shutil.copytree(HERE / name, folder, dirs_exist_ok=True)
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    content = {key: value for key, value in (content | fields).items() if key not in without}
    path.write_text(json.dumps(content))
    return folder
