"""From a checkpoint's directory to its typed configuration: `model_type` names the reader. No torch here."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Final

import msgspec

from srt.configs.census import PLAIN, announced_formats, expert_formats
from srt.configs.geometry import activations, weight_kinds
from srt.configs.images import read_images
from srt.configs.plan import ImageConfig, ModelFacts
from srt.configs.section import Section
from srt.configs.shards import all_entries
from srt.configs.step3p7 import Step3p7Config, TextConfig, part_of, read_step3p7
from srt.errors import StartupError

READERS: Final = {"step3p5": read_step3p7, "step3p7": read_step3p7}
"""`model_type` of config.json -> reader of that family."""

BUILTIN: Final = {"builtin:tiny": ("srt.builtin", "tiny")}
"""Checkpoints that are data of this package: model path -> package and directory in it."""


def checkpoint_directory(model_path: str) -> Path:
    """Where the checkpoint of a `--model-path` lies: that directory, or the one in this package.

    Raises: StartupError if there is no such directory.
    """
    if model_path in BUILTIN:
        package, name = BUILTIN[model_path]
        return Path(str(resources.files(package))) / name
    directory = Path(model_path)
    if not directory.is_dir():
        raise StartupError(f"--model-path is {model_path}; there is no such directory{_instead(model_path)}")
    return directory


def _instead(model_path: str) -> str:
    """What else to say about a path that leads nowhere."""
    return f"; built in: {', '.join(BUILTIN)}" if model_path.startswith("builtin") else ""


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
    extra = directory / "hf_quant_config.json"
    return reader(section, read_json(extra) if extra.is_file() else None)


def read_facts(
    directory: Path, *, with_weights: bool = True, draft_directory: Path | None = None, announced: bool = False
) -> ModelFacts:
    """What the processes without torch need to know of the checkpoint in `directory`.

    End-of-sequence ids are those of config.json and generation_config.json together: releases list different
    ones in the two, and each of them ends a turn. Without `with_weights` the shards are not looked at, as random
    weights need none; with `announced`, too, which takes the MTP modules that config.json speaks of as being there. MTP
    modules are those of the checkpoint in `draft_directory`, if one is given.
    Raises: StartupError as `read_config`; also if no shard is there, if quantised weights are incomplete, or if a
        special token is outside the vocabulary.
    """
    config = read_config(directory)
    eos = list(config.eos_token_ids)
    generation = directory / "generation_config.json"
    if generation.is_file():
        eos += read_json(generation).integers("eos_token_id")
    for token_id in (*eos, *(() if config.bos_token_id is None else (config.bos_token_id,))):
        if not 0 <= token_id < config.text.vocab_size:
            raise StartupError(
                f"{directory} names the special token {token_id}; its vocabulary has {config.text.vocab_size} tokens"
            )
    weight_bytes = {"text": 0, "mtp": 0, "vision": 0}
    kv_scales = False
    for _, entry in all_entries(directory) if with_weights and not announced else ():
        weight_bytes[part_of(entry.name, config.text.main_layers)] += entry.bytes
        kv_scales |= entry.name.endswith((".k_scale", ".v_scale"))
    formats = expert_formats(directory, config) if with_weights and not announced else announced_formats(config)
    mtp = config.text
    if draft_directory is not None:
        mtp, weight_bytes["mtp"] = _borrowed_modules(config, draft_directory)
    modules = mtp.mtp_layers if weight_bytes["mtp"] or announced else ()
    text = msgspec.structs.replace(config.text, mtp_layers=modules)
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
        weights=weight_kinds(text, config.vision, formats),
        activations=activations(text, config.vision, formats),
        has_vision=config.vision is not None,
        images=_images(directory, config),
        mtp_modules=len(modules),
        draft_group=text.draft_group(),
        dtype=config.dtype,
        experts=",".join(sorted(set(formats.values()))) or PLAIN,
        producer=config.quant.producer if config.quant is not None else "",
        kv_scales=kv_scales,
    )


def _images(directory: Path, config: Step3p7Config) -> ImageConfig | None:
    """How the checkpoint wants images, if it takes any."""
    if config.vision is None or config.images is None:
        return None
    path = directory / "preprocessor_config.json"
    processor = read_json(path) if path.is_file() else Section({}, path.name)
    return read_images(config.vision, config.images, processor)


def _borrowed_modules(config: Step3p7Config, directory: Path) -> tuple[TextConfig, int]:
    """The language model of another checkpoint whose MTP modules are used, and their bytes.

    Raises: StartupError if it is another model, or has none.
    """
    if not directory.is_dir():
        raise StartupError(f"--draft-model-path is {directory}; there is no such directory")
    own, other = config.text, read_config(directory).text
    mine, theirs = ((text.hidden_size, text.vocab_size, text.main_layers) for text in (own, other))
    if mine != theirs:
        raise StartupError(
            f"--draft-model-path {directory} is of another model: hidden size, vocabulary and layers are {theirs}, "
            f"those of the model {mine}"
        )
    size = sum(e.bytes for _, e in all_entries(directory) if part_of(e.name, other.main_layers) == "mtp")
    if not size:
        raise StartupError(f"--draft-model-path {directory} has no MTP modules")
    return other, size
