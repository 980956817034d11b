"""Which drafter guesses ahead, and with what: from flags and checkpoint to `DraftTraits`."""

from __future__ import annotations

import json
from typing import Final, Literal, NamedTuple

import msgspec

from srt.configs.plan import DraftTraits, KVGroupSpec, ModelFacts
from srt.configs.server import ServerConfig
from srt.errors import StartupError

Algorithm = Literal["off", "mtp", "ngram"]
ALGORITHMS: Final[dict[str, Algorithm]] = {
    "off": "off",
    "mtp": "mtp",
    "nextn": "mtp",
    "eagle": "mtp",
    "step3p5_mtp": "mtp",
    "ngram": "ngram",
}
"""What users call them, in lower case; for this family the draft modules are also known as NEXTN and EAGLE."""

NGRAM_DRAFTS: Final = 7


class Drafting(NamedTuple):
    """The drafter, and why it is this one."""

    traits: DraftTraits
    reason: str


class Asked(NamedTuple):
    """What flags say; None where they say nothing."""

    algorithm: Algorithm | None
    drafts: int | None
    reason: str


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`--speculative-config`, as other servers write it."""

    method: str | None = None
    num_speculative_tokens: int | None = None
    model: str | None = None


def read_speculative_config(text: str) -> Config:
    """The JSON object of `--speculative-config`. Raises: StartupError that names the key and the rule."""
    try:
        return msgspec.json.decode(text, type=Config)
    except msgspec.ValidationError as error:
        known = ", ".join(Config.__struct_fields__)
        raise StartupError(f"--speculative-config: {error}; known keys are {known}") from error
    except msgspec.DecodeError as error:
        raise StartupError(f"--speculative-config is not JSON: {json.dumps(text)}") from error


def draft_model_path(server: ServerConfig) -> str | None:
    """The checkpoint that draft modules are taken from, if it is another one."""
    if server.speculative_config is None:
        return server.draft_model_path
    return server.draft_model_path or read_speculative_config(server.speculative_config).model


def resolve_drafting(server: ServerConfig, model: ModelFacts, device: str) -> Drafting:
    """The drafter that a server runs on `device`, cpu or cuda.

    Raises: StartupError if it was asked for what the checkpoint or the device does not have.
    """
    asked = _asked(server)
    algorithm: Algorithm = asked.algorithm or ("mtp" if model.mtp_modules else "off")
    match algorithm:
        case "off":
            reason = asked.reason if asked.algorithm else "auto: the checkpoint has no MTP modules"
            return Drafting(DraftTraits(), reason)
        case "ngram":
            if device != "cpu":
                raise StartupError(
                    f"{asked.reason}: guesses from earlier text are made on a CPU only; mtp runs on GPUs"
                )
            return Drafting(DraftTraits("ngram", asked.drafts or NGRAM_DRAFTS), asked.reason)
        case "mtp":
            return _mtp(server, model, asked)


def _asked(server: ServerConfig) -> Asked:
    config = Config() if server.speculative_config is None else read_speculative_config(server.speculative_config)
    name, flag = server.speculative_algorithm, "--speculative-algorithm"
    if name in (None, "auto") and config.method is not None:
        name, flag = config.method, "--speculative-config method"
    drafts = server.speculative_num_steps
    if drafts is None:
        drafts = config.num_speculative_tokens
    if drafts is not None and not 1 <= drafts <= 64:
        raise StartupError(f"--speculative-config num_speculative_tokens is {drafts}; it must be 1 to 64")
    if name is None or name == "auto":
        return Asked(None, drafts, "auto")
    if name.lower() not in ALGORITHMS:
        raise StartupError(f"{flag} is {name!r}; it must be one of {', '.join(ALGORITHMS)}")
    return Asked(ALGORITHMS[name.lower()], drafts, f"{flag} {name}")


def _mtp(server: ServerConfig, model: ModelFacts, asked: Asked) -> Drafting:
    if not model.mtp_modules:
        raise StartupError(
            f"{asked.reason}: the checkpoint has no MTP modules; "
            "--draft-model-path takes them from another checkpoint of the same model"
        )
    drafts = min(asked.drafts or model.mtp_modules, model.mtp_modules)
    reason = (
        f"{asked.reason}: the checkpoint has {model.mtp_modules} MTP modules" if not asked.algorithm else asked.reason
    )
    if asked.drafts is not None and asked.drafts > drafts:
        reason += f"; {asked.drafts} were asked for, there are {drafts} modules"
    path = draft_model_path(server) or model.path
    if path != model.path:
        reason += f", weights from {path}"
    traits = DraftTraits("mtp", drafts, modules=drafts, look_ahead=drafts, weights_path=path)
    return Drafting(traits, reason)


def kv_groups(model: ModelFacts, drafting: DraftTraits) -> tuple[KVGroupSpec, ...]:
    """The KV groups that a server has: those of the model, then that of the draft modules that it runs.

    These run again over up to so many positions before the frontier as there are modules, so their window is held
    that much longer than they see.
    """
    draft = model.draft_group
    if not drafting.modules or draft is None:
        return model.groups
    window = None if draft.window is None else draft.window + drafting.modules - 1
    held = msgspec.structs.replace(draft, layers=draft.layers[: drafting.modules], window=window)
    return (*model.groups, held)
