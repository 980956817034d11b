"""A small byte-level BPE tokenizer with specials and a chat template, as a checkpoint has it."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIALS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
PLAIN_ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>")
VOCAB_SIZE = 512

CORPUS = (
    "The quick brown fox jumps over the lazy dog. import os; return value; def function(argument): pass",
    "Übermäßig größere Straßen, naïve café, 数据结构与算法, 日本語のテキスト, русский текст, 🙂🙃🎉👩‍👩‍👧",
    "STOP the stop words stopped stopping. hello world, this is a test of the tokenizer 12345 67890",
)

CHAT_TEMPLATE = """{{- bos_token -}}
{%- if tools -%}{{- '<|im_start|>system\\n# Tools\\n' -}}
{%- for tool in tools -%}{{- tool | tojson -}}{{- '\\n' -}}{%- endfor -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
{%- if reasoning_effort is defined -%}{{- 'Reasoning: ' + reasoning_effort + '\\n' -}}{%- endif -%}
{%- for message in messages -%}
{%- if message.content == 'refuse' -%}{{- raise_exception('no such tool result') -}}{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.reasoning_content -%}{{- '<think>' + message.reasoning_content + '</think>' -}}{%- endif -%}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}{%- for part in message.content -%}{{- part.text -}}{%- endfor -%}{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{%- for key, value in call.function.arguments.items() -%}{{- key + '=' + (value | string) + ';' -}}{%- endfor -%}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def make_tokenizer() -> Tokenizer:
    """The tokenizer; byte-level, so it can say anything."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(PLAIN_ADDED),
        special_tokens=[AddedToken(text, normalized=False, special=True) for text in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in PLAIN_ADDED])
    return tokenizer


def write_tokenizer(directory: Path) -> Tokenizer:
    """Write tokenizer.json and the files around it; returns the tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<|bos|>", "eos_token": {"content": "<|eos|>"}, "add_bos_token": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (directory / "generation_config.json").write_text(
        json.dumps({"temperature": 0.7, "top_p": 0.9, "eos_token_id": [1]})
    )
    return tokenizer
