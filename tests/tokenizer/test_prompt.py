"""Chat templates rendered as transformers does, prompts refused with both numbers, sampling completed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from srt.errors import ErrorCode, ServingError, StartupError
from srt.messages import ChatPrompt, SamplingParams, TextPrompt, TokenPrompt
from srt.tokenizer.prompt import Prompter, pack_ids, unpack_ids
from srt.tokenizer.sampling import SamplingDefaults, SamplingResolver
from srt.tokenizer.template import ChatTemplate, find_template
from srt.tokenizer.vocabulary import Vocabulary
from tests.support.tokens import CHAT_TEMPLATE

CONTEXT = 128
SPECIALS = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}

TRICKY_TEMPLATE = """
{% for message in messages %}
    {% if loop.first %}
{{ bos_token }}
    {% endif %}
    {% if message.role == 'skip' %}
        {% continue %}
    {% endif %}
[{{ message.role }}] {{ message.content | trim }}
    {% generation %}{{ eos_token }}{% endgeneration %}
{% endfor %}
{% set ns = namespace(n=0) %}
{% for tool in tools or [] %}{% set ns.n = ns.n + 1 %}{{ tool | tojson(indent=2) }}{% endfor %}
{{ ns.n }} {{ {'ä<b>': 'é'} | tojson }} {{ strftime_now('%Y') | length }}
{% if add_generation_prompt %}>>{% endif %}
"""

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief.  "},
    {"role": "skip", "content": "no"},
    {"role": "user", "content": "<b>größer & 数</b>\n"},
    {"role": "assistant", "content": "ok"},
]
TOOLS = [
    {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {"ö": {}}}}}
]


def render_in_transformers(messages: list[dict[str, Any]], source: str, **kwargs: Any) -> str:
    """What transformers makes of a conversation."""
    from transformers.utils.chat_template_utils import render_jinja_template

    variables: dict[str, Any] = {**SPECIALS, **kwargs}
    rendered: Any = render_jinja_template([messages], chat_template=source, **variables)
    text: str = rendered[0][0]
    return text


@pytest.mark.parametrize("source", [TRICKY_TEMPLATE, CHAT_TEMPLATE])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("generate", [True, False])
def test_templates_render_as_in_transformers(source: str, tools: list[dict[str, Any]] | None, generate: bool) -> None:
    theirs = render_in_transformers(MESSAGES, source, tools=tools, add_generation_prompt=generate)
    assert ChatTemplate(source, SPECIALS).render(MESSAGES, tools, {"add_generation_prompt": generate}) == theirs


@pytest.mark.parametrize("source", [TRICKY_TEMPLATE, CHAT_TEMPLATE])
@pytest.mark.parametrize("final", ["The answer is", "ends in spaces  "])
def test_a_continued_message_is_cut_as_in_transformers(source: str, final: str) -> None:
    messages = [*MESSAGES[:3], {"role": "assistant", "content": final}]
    theirs = render_in_transformers(messages, source, continue_final_message=True)
    assert ChatTemplate(source, SPECIALS).render(messages, None, {"continue_final_message": True}) == theirs


def test_a_template_cannot_reach_python() -> None:
    template = ChatTemplate("{{ messages.__class__.__mro__ }}{{ ''.__class__ }}", {})
    with pytest.raises(ServingError, match="cannot render"):
        template.render([{"role": "user", "content": "x"}], None, {})


def test_the_template_is_the_operators_then_the_checkpoints_own(tmp_path: Path) -> None:
    assert find_template(tmp_path, {}, None) is None
    variants = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert find_template(tmp_path, {"chat_template": variants}, None) == "d"
    assert find_template(tmp_path, {"chat_template": "c"}, None) == "c"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "j"}))
    assert find_template(tmp_path, {"chat_template": "c"}, None) == "j"
    (tmp_path / "chat_template.jinja").write_text("f")
    assert find_template(tmp_path, {"chat_template": "c"}, None) == "f"
    (tmp_path / "own").write_text("o")
    assert find_template(tmp_path, {}, str(tmp_path / "own")) == "o"
    with pytest.raises(StartupError, match="cannot be read"):
        find_template(tmp_path, {}, str(tmp_path / "missing"))
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff{{")
    with pytest.raises(StartupError, match="jinja cannot be read"):
        find_template(tmp_path, {}, None)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").unlink()
    assert find_template(tmp_path, {"chat_template": [5, {"name": "default"}]}, None) is None
    with pytest.raises(StartupError, match="not valid"):
        ChatTemplate("{% if %}", {})


@pytest.fixture
def prompter(vocabulary: Vocabulary) -> Prompter:
    """A prompter with a small context."""
    return Prompter(vocabulary, ChatTemplate(CHAT_TEMPLATE, vocabulary.specials), CONTEXT)


def rendered(prompter: Prompter, vocabulary: Vocabulary, *messages: dict[str, Any], **kwargs: Any) -> str:
    """The text that the model reads."""
    prompt = ChatPrompt(json.dumps(messages).encode(), template_kwargs=json.dumps(kwargs).encode() if kwargs else b"")
    return vocabulary.decode(unpack_ids(prompter.packed_ids(prompt)), skip_special_tokens=False)


def test_messages_are_brought_into_the_form_that_templates_expect(prompter: Prompter, vocabulary: Vocabulary) -> None:
    developer = rendered(prompter, vocabulary, {"role": "developer", "content": "x"})
    assert developer == "<|bos|><|im_start|>system\nx<|im_end|>\n<|im_start|>assistant\n"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "user\nab<" in rendered(prompter, vocabulary, {"role": "user", "content": parts})
    call = {"function": {"name": "f", "arguments": '{"k": [1, "ü"]}'}}
    spoken = rendered(prompter, vocabulary, {"role": "assistant", "reasoning": "why", "tool_calls": [call]})
    assert "<think>why</think>k=[1, 'ü'];" in spoken
    assert "Reasoning: low\n" in rendered(
        prompter, vocabulary, {"role": "user", "content": "x"}, reasoning_effort="low"
    )


def test_a_final_message_in_parts_can_be_continued(prompter: Prompter, vocabulary: Vocabulary) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    for content in ("ab", parts):
        opened = rendered(prompter, vocabulary, {"role": "assistant", "content": content}, continue_final_message=True)
        assert opened.endswith("<|im_start|>assistant\nab")


def test_parts_are_joined_for_a_template_that_wants_text(vocabulary: Vocabulary) -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content.upper() }}{% endfor %}", {})
    prompter = Prompter(vocabulary, template, CONTEXT)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert rendered(prompter, vocabulary, {"role": "user", "content": parts}) == "A\nB"


def test_json_that_is_too_deep_to_be_built_is_refused_by_its_name(prompter: Prompter) -> None:
    deep = b"[" * 5_000 + b"]" * 5_000
    user = b'[{"role": "user", "content": "x"}]'
    for name, prompt in (
        ("messages", ChatPrompt(b'[{"role": "user", "content": "x", "extra": %b}]' % deep)),
        ("tools", ChatPrompt(user, tools=b'[{"function": %b}]' % deep)),
        ("chat_template_kwargs", ChatPrompt(user, template_kwargs=b'{"a": %b}' % deep)),
    ):
        with pytest.raises(ServingError, match=f"'{name}' is nested too deeply") as caught:
            prompter.packed_ids(prompt)
        assert caught.value.param == name


@pytest.mark.parametrize(
    ("messages", "kwargs", "told"),
    [
        ([{"role": "tool", "content": "refuse"}], {}, "no such tool result"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1"}}]}], {}, r"\[1"),
        ([{"role": "user", "content": "x"}], {"messages": []}, "must not set 'messages'"),
        ([{"role": "user", "content": "x"}], {"add_generation_prompt": True, "continue_final_message": True}, "both"),
    ],
)
def test_a_chat_that_cannot_be_rendered_says_why(
    prompter: Prompter, vocabulary: Vocabulary, messages: list[dict[str, Any]], kwargs: dict[str, Any], told: str
) -> None:
    with pytest.raises(ServingError, match=told) as caught:
        rendered(prompter, vocabulary, *messages, **kwargs)
    assert caught.value.status == 400


def test_without_a_template_a_chat_is_refused(vocabulary: Vocabulary) -> None:
    with pytest.raises(ServingError, match="no chat template"):
        Prompter(vocabulary, None, CONTEXT).packed_ids(ChatPrompt(b"[]"))


def test_a_text_that_is_far_too_long_is_refused_without_being_tokenized_whole(prompter: Prompter) -> None:
    with pytest.raises(
        ServingError, match=r"1000000 characters and more than \d+ tokens, the context length is 128"
    ) as caught:
        prompter.packed_ids(TextPrompt("ab " * 333_333 + "x"))
    assert caught.value.code is ErrorCode.PROMPT_TOO_LONG


def test_an_empty_prompt_is_refused(prompter: Prompter) -> None:
    with pytest.raises(ServingError, match="0 tokens"):
        prompter.packed_ids(TokenPrompt(b""))


def resolver(**defaults: Any) -> SamplingResolver:
    """A resolver whose checkpoint says `defaults`."""
    return SamplingResolver(SamplingDefaults.of(defaults), (1, 2), CONTEXT, random_seed=5)


def test_what_a_request_leaves_open_comes_from_the_checkpoint_then_is_neutral() -> None:
    sampling, stop = resolver(temperature=0.7, top_k=20, eos_token_id=[1]).resolve(SamplingParams(), 8)
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.7, 20, 1.0, 0.0)
    assert (stop.max_new_tokens, stop.token_ids) == (CONTEXT - 8, (1, 2))
    given = SamplingParams(
        temperature=1e-7, top_k=-1, seed=-3, stop_token_ids=(7, 1), min_new_tokens=2, ignore_eos=True
    )
    sampling, stop = resolver(temperature=0.7).resolve(given, 8)
    assert (sampling.temperature, sampling.top_k, sampling.suppressed_ids) == (0.0, 0, (7, 1))
    assert sampling.seed >= 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", "hot"), ("temperature", -1), ("top_p", 0), ("top_p", 7), ("top_k", 0.5), ("min_p", 2)],
)
def test_a_checkpoint_whose_sampling_makes_no_sense_is_refused_at_the_start(name: str, value: Any) -> None:
    with pytest.raises(StartupError, match=rf"generation_config.json: .*\$\.{name}"):
        SamplingDefaults.of({name: value})


def test_seeds_that_nobody_gave_come_from_the_servers_seed() -> None:
    drawn = [resolver().resolve(SamplingParams(), 8)[0].seed for _ in range(2)]
    assert drawn[0] == drawn[1]
    one = resolver()
    assert len({one.resolve(SamplingParams(), 8)[0].seed for _ in range(100)}) == 100


def test_an_implied_limit_shrinks_to_the_room_and_a_given_one_must_fit() -> None:
    assert resolver().resolve(SamplingParams(usual_new_tokens=128), 100)[1].max_new_tokens == 28
    assert resolver().resolve(SamplingParams(max_new_tokens=28), 100)[1].max_new_tokens == 28
    with pytest.raises(
        ServingError, match="29 new tokens after a prompt of 100 tokens make 129; the context length is 128"
    ):
        resolver().resolve(SamplingParams(max_new_tokens=29), 100)
    with pytest.raises(ServingError, match="the prompt has 128 tokens; the context length is 128"):
        resolver().resolve(SamplingParams(), 128)


def test_no_new_tokens_may_follow_a_prompt_that_fills_the_context() -> None:
    assert resolver().resolve(SamplingParams(max_new_tokens=0), CONTEXT)[1].max_new_tokens == 0
    with pytest.raises(ServingError, match="the prompt has 129 tokens; the context length is 128"):
        resolver().resolve(SamplingParams(max_new_tokens=0), CONTEXT + 1)


def test_ids_survive_packing() -> None:
    assert unpack_ids(pack_ids([0, 1, 128_000])) == [0, 1, 128_000]
