"""Makes the tiny tokenizer directories beside this file, in the forms in which the model families ship theirs.

    python tests/data/hf_tokenizers/make.py

llama3   byte-level BPE, ids of special tokens after the text's, three EOS tokens, writes BOS
qwen     byte-level BPE, ChatML, no BOS, the chat template names another EOS than the tokenizer
gemma    metaspace BPE with byte fallback and no space before a text, refuses a system's turn
mistral  metaspace BPE with byte fallback and a space before a text, [INST] in plain text, template in the config
t5       unigram, no chat template, 10 <extra_id_n>
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = pathlib.Path(__file__).parent
TEXTS = [
    *(f"the quick brown fox {n} jumps over\n\nthe lazy dog  {n * 7} times, don't you think?" for n in range(60)),
    *("Reference answer: better than the answer, please", "user assistant system model Äpfel größer 日本 😀 []{}"),
]
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
CHATML = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


def special(*tokens: str) -> list[AddedToken]:
    return [AddedToken(token, special=True, normalized=False) for token in tokens]


def byte_level(split: str, *tokens: str) -> Tokenizer:
    """Return a byte-level BPE whose special tokens come last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(special(*tokens))
    return tokenizer


def metaspace(pieces: list[str], *, space: bool) -> Tokenizer:
    """Return a BPE with byte fallback, whose special tokens come first."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if space else replace
    strip = [decoders.Strip(" ", 1, 0)] if space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=520, special_tokens=[*pieces, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    state = json.loads(tokenizer.to_str())
    # Bytes are pieces, not tokens that text could name.
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(state))


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace("▁", "always")]
    )
    tokenizer.decoder = decoders.Metaspace("▁", "always")
    pieces = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=pieces, unk_token="<unk>", show_progress=False, max_piece_length=8
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(special(*(f"<extra_id_{n}>" for n in reversed(range(10)))))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def with_bos(tokenizer: Tokenizer, token: str) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, tokenizer.token_to_id(token))]
    )
    return tokenizer


def write(name: str, tokenizer: Tokenizer, config: dict[str, Any], others: dict[str, Any]) -> None:
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    for file, content in ({"tokenizer_config.json": config} | others).items():
        text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
        (folder / file).write_text(text)


SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def main() -> None:
    names = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eom_id", "eot_id")
    llama = with_bos(byte_level(SPLIT, *(f"<|{name}|>" for name in names)), "<|begin_of_text|>")
    bos, end, _, _, eom, eot = (llama.token_to_id(f"<|{name}|>") for name in names)
    write(
        "llama3",
        llama,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        {
            "special_tokens_map.json": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
            "generation_config.json": {"bos_token_id": bos, "eos_token_id": [end, eom, eot], "temperature": 0.6},
            "config.json": {"model_type": "llama", "bos_token_id": bos, "eos_token_id": [end, eom, eot]},
            "chat_template.jinja": LLAMA3,
        },
    )
    qwen = byte_level(SPLIT.replace("{1,3}", ""), "<|endoftext|>", "<|im_start|>", "<|im_end|>")
    write(
        "qwen",
        qwen,
        {
            "add_bos_token": False,
            "bos_token": None,
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "chat_template": [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "{{ tools }}"}],
        },
        {
            "generation_config.json": {
                "bos_token_id": qwen.token_to_id("<|endoftext|>"),
                "eos_token_id": qwen.token_to_id("<|endoftext|>"),
            },
            "config.json": {"model_type": "qwen2", "eos_token_id": 2},
        },
    )
    turns = ["<start_of_turn>", "<end_of_turn>"]
    gemma = with_bos(metaspace(["<pad>", "<eos>", "<bos>", "<unk>", *turns], space=False), "<bos>")
    roles = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    write(
        "gemma",
        gemma,
        roles | {"add_bos_token": True, "chat_template": GEMMA},
        {
            "special_tokens_map.json": {role: {"content": token, "lstrip": False} for role, token in roles.items()},
            "generation_config.json": {"bos_token_id": 2, "eos_token_id": [1, 5], "pad_token_id": 0},
        },
    )
    mistral = with_bos(metaspace(["<unk>", "<s>", "</s>"], space=True), "<s>")
    write(
        "mistral",
        mistral,
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None, "chat_template": MISTRAL},
        {"config.json": {"model_type": "mistral", "bos_token_id": 1, "eos_token_id": 2}},
    )
    write(
        "t5",
        unigram(),
        {
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "additional_special_tokens": [f"<extra_id_{n}>" for n in range(10)],
        },
        {"config.json": {"model_type": "t5", "eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0}},
    )


if __name__ == "__main__":
    main()
