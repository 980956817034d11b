"""What answers say, case by case; among them the answers that other servers are known to lose."""

from __future__ import annotations

import json
from collections.abc import Iterable

from srt.formats.answer import Parsed, parse
from srt.formats.description import STEP, Function
from srt.formats.events import ArgumentsDelta, CallBegin, CallEnd, ContentDelta, Problem, ReasoningDelta
from srt.formats.reader import Reader, ReadOptions
from tests.support.transcripts import TOOLS, check_cuts, read, two_splits

PARIS = "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"
OSLO = PARIS.replace("Paris", "Oslo")
WEATHER = (Function("get_weather", {"type": "object", "properties": {"city": {"type": "string"}}}),)


def said(text: str, *, complete: bool = True, tools: Iterable[Function] = WEATHER, **options: bool) -> Parsed:
    """What an answer says."""
    return parse(text, STEP, tools, ReadOptions(**options), complete=complete)


def cities(answer: Parsed) -> list[str]:
    """The arguments of calls for the weather."""
    return [json.loads(call.arguments)["city"] for call in answer.calls]


def sentences(answer: Parsed) -> str:
    """What is told of problems."""
    return "; ".join(problem.told() for problem in answer.problems)


# --- reasoning ------------------------------------------------------------------------------------------


def test_reasoning_ends_at_its_mark_and_loses_one_line_break_on_either_side() -> None:
    answer = said("\nfirst\n\n</think>\n\n  four\n")
    assert (answer.reasoning, answer.content) == ("\nfirst\n", "\n  four\n")


def test_an_answer_that_never_stops_thinking_is_all_reasoning() -> None:
    answer = said("thinking, and more\n", complete=False)
    assert (answer.reasoning, answer.content) == ("thinking, and more\n", "")


def test_a_model_may_open_its_reasoning_again() -> None:
    assert said("<think>\nhm\n</think>\nyes").reasoning == "hm"
    assert said("<thinking\n</think>\nyes").reasoning == "<thinking"


def test_a_second_end_of_reasoning_says_nothing_but_later_the_mark_is_a_word() -> None:
    assert said("a</think>\n</think>\nb").content == "b"
    assert said("a</think>`</think>` ends it").content == "`" + "</think>` ends it"


def test_an_answer_whose_prompt_ended_the_reasoning_is_content() -> None:
    answer = said('{"json": true}', thinking=False)
    assert (answer.reasoning, answer.content) == ("", '{"json": true}')


def test_reasoning_that_is_not_wanted_apart_stays_in_the_content_as_it_was_written() -> None:
    text = "<think>\nhm\n</think>\nyes </think>\n"
    assert said(text, reasoning=False).content == text.rstrip() + "\n"
    assert said(text, reasoning=False, calls=False).content == text


# --- content and calls ----------------------------------------------------------------------------------


def test_content_around_calls_keeps_its_text_and_loses_the_space_at_its_edges() -> None:
    answer = said(f"</think>\nLet me look.\n\n{PARIS}\n{OSLO}\n")
    assert (answer.content, cities(answer), answer.problems) == ("Let me look.", ["Paris", "Oslo"], ())
    assert said(f"</think>\n{PARIS}\nDone.").content == "Done."
    assert said(f"</think>\nOne\n{PARIS}\ntwo").content == "One\n\ntwo"


def test_without_calls_the_content_is_as_it_was_written() -> None:
    assert said("</think>\n  spaced \n\n").content == "  spaced \n\n"


def test_a_call_is_told_piece_by_piece() -> None:
    reader = Reader(STEP, WEATHER, ReadOptions())
    events = [reader.feed(letter) for letter in "</think>\n" + PARIS]
    flat = [event for piece in events for event in piece]
    assert flat[0] == CallBegin(0, "get_weather")
    assert flat[1:4] == [ArgumentsDelta(0, '{"city": '), ArgumentsDelta(0, '"P'), ArgumentsDelta(0, "a")]
    assert flat[-2:] == [ArgumentsDelta(0, "}"), CallEnd(0)]
    begun = next(number for number, piece in enumerate(events) if piece)
    assert ("</think>\n" + PARIS)[: begun + 1].endswith("<function=get_weather>"), "as soon as the name is known"


def test_a_text_argument_streams_while_it_is_written() -> None:
    reader = Reader(STEP, TOOLS, ReadOptions(thinking=False))
    reader.feed("<tool_call>\n<function=write_file>\n<parameter=text>\n")
    assert reader.feed('def f():\n    return "x"') == [ArgumentsDelta(0, '"def f():\\n    return \\"x\\"')]
    assert reader.feed("\n</para") == [], "it may be the end"
    assert reader.feed("graph>\n") == [ArgumentsDelta(0, "\\n</paragraph>")]


def test_arguments_have_the_types_of_the_schema() -> None:
    text = (
        '<tool_call><function=plan><parameter=steps>[{"a": 1.50}]</parameter><parameter=due>7</parameter>'
        "<parameter=note>7</parameter></function></tool_call>"
    )
    [call] = said("</think>" + text, tools=TOOLS).calls
    assert call.arguments == '{"steps": [{"a": 1.50}], "due": 7, "note": "7"}'


def test_without_tools_nothing_is_a_call() -> None:
    answer = said(f"</think>{PARIS}", calls=False)
    assert (answer.content, answer.calls) == (PARIS, ())


# --- what models get wrong ------------------------------------------------------------------------------


def test_missing_ends_are_understood_where_the_next_mark_makes_them_clear_and_told() -> None:
    answer = said(f"</think><tool_call><function=get_weather><parameter=city>Paris</tool_call>{OSLO}")
    assert cities(answer) == ["Paris", "Oslo"]
    assert "</parameter> of 'city' is missing" in sentences(answer)
    assert "</function> is missing" in sentences(answer)
    answer = said(f"</think><tool_call><function=get_weather><parameter=city>Paris{OSLO}")
    assert cities(answer) == ["Paris", "Oslo"]


def test_two_functions_in_one_call_are_two_calls() -> None:
    inner = PARIS.removesuffix("</tool_call>") + OSLO.removeprefix("<tool_call>")
    answer = said("</think>" + inner)
    assert (cities(answer), answer.content, answer.problems) == (["Paris", "Oslo"], "", ())


def test_an_offered_function_without_a_call_around_it_is_called() -> None:
    bare = PARIS.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
    answer = said(f"</think>{bare} and <function=other> is text")
    assert (cities(answer), answer.content) == (["Paris"], "and <function=other> is text")


def test_a_call_that_is_none_stays_content_and_is_told() -> None:
    text = '<tool_call>\n{"name": "get_weather"}\n</tool_call>'
    answer = said("</think>\n" + text)
    assert (answer.content, answer.calls) == (text, ())
    assert "without a function is kept as content" in sentences(answer)


def test_a_call_of_an_unknown_function_is_told_and_its_values_are_text() -> None:
    answer = said("</think>" + PARIS.replace("get_weather", "guess").replace("Paris", "7"))
    assert [(call.name, call.arguments) for call in answer.calls] == [("guess", '{"city": "7"}')]
    assert sentences(answer) == "tool call 0 (guess): the function is not among the tools"


def test_text_between_parameters_and_values_that_come_twice_are_told_with_their_text() -> None:
    twice = PARIS.replace("</function>", "oops <parameter=city>\nRome\n</parameter></function>")
    answer = said("</think>" + twice)
    assert cities(answer) == ["Paris"]
    assert "text between the parameters: 'oops'" in sentences(answer)
    assert "'city' is given again, the first value holds: 'Rome'" in sentences(answer)


def test_a_call_that_the_model_leaves_open_is_closed_and_one_that_is_cut_off_is_not() -> None:
    text = f"</think>{PARIS}<tool_call><function=get_weather><parameter=city>\nOs"
    ended, cut = said(text), said(text, complete=False)
    assert cities(ended) == ["Paris", "Os"]
    assert [call.whole for call in cut.calls] == [True, False]
    assert cut.calls[1].arguments == '{"city": "Os'
    assert "cut off" in sentences(cut)
    number = said("</think><tool_call><function=add><parameter=a>12", complete=False, tools=TOOLS)
    assert number.calls[0].arguments == '{"a": '
    assert sentences(number).endswith("are not whole: '12'")


# --- what other servers are known to lose (sglang 31915, 38892, 38894, 14821; vllm 41967, 43267; llama.cpp 24181) --


def test_two_parallel_calls_in_coarse_pieces_lose_nothing_sglang_31915() -> None:
    text = f"plan\n</think>\n{PARIS}\n{OSLO}"
    assert cities(said(text)) == ["Paris", "Oslo"]
    coarse = [[text[at : at + size] for at in range(0, len(text), size)] for size in range(1, len(text))]
    check_cuts(text, ReadOptions(), [*coarse, *two_splits(text)], complete=True)


def test_calls_before_a_late_end_of_reasoning_are_calls_sglang_38892_38894() -> None:
    answer = said(f"I need both.\n{PARIS}\n{OSLO}\n</think>\n")
    assert (answer.reasoning, cities(answer), answer.content) == ("I need both.", ["Paris", "Oslo"], "")
    answer = said(f"First.\n{PARIS}\nthen the rest\n</think>\nDone.")
    assert (answer.reasoning, cities(answer)) == ("First.", ["Paris"])
    assert answer.content == "then the rest\nDone.", "only the end of the reasoning is no text"


def test_a_call_in_reasoning_that_never_ends_is_a_call_llama_cpp_24181() -> None:
    answer = said(f"Let me see.\n\n{PARIS}")
    assert (answer.reasoning, cities(answer)) == ("Let me see.\n", ["Paris"])


def test_reasoning_about_calls_stays_reasoning() -> None:
    answer = said("I could use <tool_call> or <function=get_weather> here.\n</think>\nNo.")
    assert (answer.reasoning, answer.content) == ("I could use <tool_call> or <function=get_weather> here.", "No.")
    assert answer.problems == ()


def test_the_first_calls_arguments_come_whole_with_several_tokens_a_step_vllm_41967_43267() -> None:
    text = f"</think>\n{PARIS}\n{OSLO}"
    pieces = [text[:60], text[60:61], text[61:150], text[150:]]
    events = read(pieces, ReadOptions())
    assert [event for event in events if not isinstance(event, ArgumentsDelta)] == [
        CallBegin(0, "get_weather"), CallEnd(0),
        Problem("tool call 0 (get_weather): the function is not among the tools"),
        CallBegin(1, "get_weather"), CallEnd(1),
        Problem("tool call 1 (get_weather): the function is not among the tools"),
    ]  # fmt: skip
    arguments = ["".join(e.text for e in events if isinstance(e, ArgumentsDelta) and e.index == at) for at in (0, 1)]
    assert list(map(json.loads, arguments)) == [{"city": "Paris"}, {"city": "Oslo"}]


def test_an_answer_in_json_behind_the_reasoning_is_content_sglang_14821() -> None:
    assert said('</think>{"a": 1}').content == '{"a": 1}'
    assert read(['{"a": 1}'], ReadOptions(thinking=False)) == [ContentDelta('{"a": 1}')]
    assert read(["a", "b"], ReadOptions()) == [ReasoningDelta("ab")]
