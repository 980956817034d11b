"""However an answer is cut, it says the same, and nothing of it is lost.

`python -m tests.formats.test_chunkings COUNT` tries COUNT transcripts with every 2-split of each.
"""

from __future__ import annotations

import json
import sys
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from srt.formats.answer import parse
from srt.formats.description import STEP
from srt.formats.reader import Reader, ReadOptions
from tests.support.transcripts import MARKS, TOOLS, Transcripts, check_cuts, read, two_splits

OPTIONS = (
    ReadOptions(),
    ReadOptions(thinking=False),
    ReadOptions(calls=False),
    ReadOptions(reasoning=False),
)


def test_ten_thousand_transcripts_say_the_same_in_random_pieces() -> None:
    transcripts = Transcripts(seed=8)
    for number in range(10_000):
        text = transcripts.damaged() if number % 2 else transcripts.whole()[0]
        ways = [transcripts.cuts(text), list(text) if number % 8 == 0 else transcripts.cuts(text)]
        check_cuts(text, OPTIONS[number // 2 % 4 if number % 3 == 0 else 0], ways, complete=number % 5 != 0)


def test_transcripts_say_the_same_in_every_cut_in_two() -> None:
    transcripts = Transcripts(seed=9)
    for number in range(150):
        text = transcripts.damaged() if number % 2 else transcripts.whole()[0]
        check_cuts(text, OPTIONS[0], two_splits(text), complete=number % 3 != 0)


def test_whole_transcripts_say_what_they_were_made_to_say() -> None:
    transcripts = Transcripts(seed=10)
    for _ in range(2000):
        text, wanted = transcripts.whole()
        found = parse(text, STEP, TOOLS, ReadOptions())
        assert (found.reasoning, found.content, found.problems) == (wanted.reasoning, wanted.content, ()), text
        assert [call.name for call in found.calls] == [call.name for call in wanted.calls]
        for call, meant in zip(found.calls, wanted.calls, strict=True):
            assert json.loads(call.arguments) == json.loads(meant.arguments), text


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from((*MARKS, "w1", " ", "null", "é")), max_size=14), st.data())
def test_any_order_of_marks_says_the_same_in_any_pieces(parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    for options in OPTIONS:
        check_cuts(text, options, [pieces, list(text)], complete=data.draw(st.booleans()))


def test_no_more_is_held_back_than_may_be_a_mark() -> None:
    reader = Reader(STEP, TOOLS, ReadOptions(calls=False))
    said = "".join(event.text for piece in "thinking about a < b and </ more" for event in reader.feed(piece))  # type: ignore[union-attr]
    assert said == "thinking about a < b and </ more"


def test_a_long_answer_costs_as_many_times_more_as_it_is_longer() -> None:
    def seconds(count: int) -> float:
        value = '{"k": [' + "1, " * count + "1]}"
        text = "x\n" * count + "</think>\n" + "\n" * count + "<tool_call>\n<function=plan>\n<parameter=first>\n"
        pieces = [*text, *(value[at : at + 4] for at in range(0, len(value), 4)), "</parameter></function></tool_call>"]
        begun = time.process_time()
        events = read(pieces, ReadOptions())
        assert len(events) == 4
        return time.process_time() - begun

    seconds(500)
    assert min(seconds(16_000) for _ in range(2)) < 12 * min(seconds(4_000) for _ in range(3))


def test_a_whole_answer_of_nothing_but_marks_is_read_in_a_moment() -> None:
    begun = time.process_time()
    parse("</think>" + "<tool_call>" * 32_000, STEP, TOOLS, ReadOptions())
    assert time.process_time() - begun < 3


def main(count: int) -> None:
    """Every 2-split of many transcripts."""
    transcripts = Transcripts(seed=count)
    for number in range(count):
        text = transcripts.damaged() if number % 2 else transcripts.whole()[0]
        ways = [*two_splits(text), list(text), *(transcripts.cuts(text) for _ in range(8))]
        check_cuts(text, OPTIONS[number % 4 if number % 3 == 0 else 0], ways, complete=number % 5 != 0)
    print(f"{count} transcripts read alike in every cut in two, letter by letter, and in 8 random cuts each")


if __name__ == "__main__":
    main(int(sys.argv[1]))
