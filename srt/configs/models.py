"""From a checkpoint's directory to its typed configuration: `model_type` names the reader. No torch here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from srt.configs.plan import ModelFacts
from srt.configs.section import Section
from srt.configs.shards import all_entries
from srt.configs.step3p7 import Step3p7Config, part_of, read_step3p7
from srt.errors import StartupError

READERS: Final = {"step3p5": read_step3p7, "step3p7": read_step3p7}
"""`model_type` of config.json -> reader of that family."""


def read_json(path: Path) -> Section:
    """A JSON object from a file.

    Raises: StartupError if the file is missing or holds something else.
    """
    if not path.is_file():
        raise StartupError(f"{path.parent} has no {path.name}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StartupError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise StartupError(f"{path} holds {type(values).__name__}, it must hold an object")
    return Section(values, path.name)


def read_config(directory: Path) -> Step3p7Config:
    """The typed configuration of the checkpoint in `directory`.

    Raises: StartupError that names the key, its value and the rule.
    """
    section = read_json(directory / "config.json")
    model_type = section.text("model_type")
    reader = READERS.get(model_type)
    if reader is None:
        raise StartupError(f"config.json.model_type is {model_type!r}, supported are {', '.join(sorted(READERS))}")
    return reader(section)


def read_facts(directory: Path, *, with_weights: bool = True) -> ModelFacts:
    """What the processes without torch need to know of the checkpoint in `directory`.

    End-of-sequence ids are those of config.json and generation_config.json together: releases list different
    ones in the two, and each of them ends a turn. Without `with_weights` the shards are not looked at, as random
    weights need none.
    Raises: StartupError as `read_config`; also if no shard is there.
    """
    config = read_config(directory)
    eos = list(config.eos_token_ids)
    generation = directory / "generation_config.json"
    if generation.is_file():
        eos += read_json(generation).integers("eos_token_id")
    weight_bytes = {"text": 0, "mtp": 0, "vision": 0}
    for _, entry in all_entries(directory) if with_weights else ():
        weight_bytes[part_of(entry.name, config.text.main_layers)] += entry.bytes
    return ModelFacts(
        path=str(directory),
        architecture=config.architecture,
        model_type=config.model_type,
        vocab_size=config.text.vocab_size,
        context_length=config.text.max_positions,
        bos_token_id=config.bos_token_id,
        eos_token_ids=tuple(dict.fromkeys(eos)),
        groups=config.text.kv_groups(),
        weight_bytes=weight_bytes,
        has_vision=config.vision is not None,
        mtp_modules=len(config.text.mtp_layers) if weight_bytes["mtp"] else 0,
        draft_group=config.text.draft_group() if weight_bytes["mtp"] else None,
        dtype=config.dtype,
    )
