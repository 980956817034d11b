"""Which drafter runs: flags, the checkpoint's modules, and sentences for what is not there."""

from __future__ import annotations

import msgspec
import pytest

from srt.configs.plan import DraftTraits, RuntimePlan
from srt.configs.resolve import resolve
from srt.configs.server import ServerConfig
from srt.errors import StartupError
from tests.support.resolved import DEVICE, MODEL

BARE = msgspec.structs.replace(MODEL, mtp_modules=0, draft_group=None, weight_bytes={"text": 5_000_000})
MTP = DraftTraits("mtp", drafts=3, modules=3, look_ahead=3, weights_path="checkpoint")


def plan(**options: str | int) -> RuntimePlan:
    return resolve(msgspec.convert({"model_path": "checkpoint", **options}, ServerConfig), MODEL, DEVICE)


def reason(made: RuntimePlan) -> str:
    choice = next(choice for choice in made.table if choice.name == "speculative decoding")
    return f"{choice.value} because {choice.reason}"


@pytest.mark.parametrize("name", [None, "auto", "mtp", "NEXTN", "EAGLE"])
def test_the_modules_of_a_checkpoint_guess_by_all_their_names_and_unasked(name: str | None) -> None:
    made = plan(**({} if name is None else {"speculative_algorithm": name}))
    assert made.drafting == MTP
    assert [group.name for group in made.groups] == ["full", "sliding", "draft"]
    assert made.groups[2].window == 64 + 2
    assert made.max_step_tokens == 512 + 64 * 4


def test_fewer_modules_have_less_memory_and_more_are_cut_with_a_notice() -> None:
    one = plan(speculative_num_steps=1)
    assert one.groups[2].layers == (5,)
    assert one.groups[2].window == 64
    many = plan(speculative_num_steps=7)
    assert many.drafting == MTP
    assert "7 were asked for, there are 3 modules" in reason(many)


def test_the_object_of_other_servers_means_the_same_and_flags_win() -> None:
    text = '{"method": "mtp", "num_speculative_tokens": 2}'
    assert plan(speculative_config=text).drafting.drafts == 2
    assert plan(speculative_config=text, speculative_num_steps=1).drafting.drafts == 1
    assert plan(speculative_config=text, speculative_algorithm="off").drafting == DraftTraits()
    assert plan(speculative_config='{"method": "ngram"}').drafting == DraftTraits("ngram", 7)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"speculative_config": "{"}, "--speculative-config is not JSON"),
        ({"speculative_config": '{"k": 1}'}, "known keys are method, num_speculative_tokens, model"),
        ({"speculative_config": '{"method": "medusa"}'}, "--speculative-config method is 'medusa'; it must be one of"),
        ({"speculative_config": '{"num_speculative_tokens": 0}'}, "is 0; it must be 1 to 64"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(options: dict[str, str], sentence: str) -> None:
    with pytest.raises(StartupError, match=sentence):
        plan(**options)


def test_a_checkpoint_without_modules_says_so_and_runs_without() -> None:
    server = ServerConfig(model_path="checkpoint")
    made = resolve(server, BARE, DEVICE)
    assert made.drafting == DraftTraits()
    assert reason(made) == "off because auto: the checkpoint has no MTP modules"
    with pytest.raises(StartupError, match="has no MTP modules; --draft-model-path takes them from another"):
        resolve(msgspec.structs.replace(server, speculative_algorithm="mtp"), BARE, DEVICE)


def test_guesses_from_text_are_refused_on_a_gpu_which_would_make_none() -> None:
    gpu = msgspec.structs.replace(DEVICE, device="cuda", cuda_devices=1)
    with pytest.raises(StartupError, match=r"--speculative-algorithm ngram: .* on a CPU only"):
        resolve(ServerConfig(model_path="checkpoint", speculative_algorithm="ngram"), MODEL, gpu)
