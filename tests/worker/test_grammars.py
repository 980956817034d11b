"""Grammars of rows: masks behind guesses, where a grammar begins and ends, and rows that cannot go on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from srt.grammar.backends import open_backend
from srt.grammar.contract import GrammarBackend, Vocabulary
from srt.grammar.shelf import GrammarFiles, key_of
from srt.messages import Constraint, GrammarSpec, SamplingSpec
from srt.worker.grammars import RowGrammar, Taken
from tests.support.checkpoints import write_checkpoint
from tests.support.steps import MTP, Steps, plan_for, random_ids

AFTER, EOS = 256, 257
VOCABULARY = Vocabulary((*(bytes([byte]) for byte in range(256)), b"", b""), (EOS,))
NUMBERS = Constraint("regex", r"\[[0-9]{1,3}(,[0-9]{1,3})*\]")


@pytest.fixture(scope="module")
def backend() -> GrammarBackend:
    return open_backend("xgrammar", VOCABULARY)


def row_of(backend: GrammarBackend, after: int | None = None, constraint: Constraint = NUMBERS) -> RowGrammar:
    """A row at its beginning."""
    spec = GrammarSpec(b"", (EOS,), after)
    return RowGrammar(backend.load(backend.compile(constraint)).matcher(spec.stop_ids), spec, VOCABULARY.words)


def walked(row: RowGrammar, guesses: Sequence[int]) -> list[list[int]]:
    """What may stand behind the known tokens and each guess, as far as that means anything."""
    masks = np.zeros((len(guesses) + 1, VOCABULARY.words), np.int32)
    filled = row.walk(guesses, masks)
    bits = np.unpackbits(masks[:filled].view(np.uint8), axis=1, bitorder="little")[:, : EOS + 1]
    return [np.flatnonzero(mask).tolist() for mask in bits]


def test_masks_behind_guesses_are_those_of_a_replay(backend: GrammarBackend) -> None:
    rng = random.Random(3)
    row, said = row_of(backend), list[int]()
    for _ in range(60):
        guesses = [rng.choice(b"[]0123,,x") for _ in range(3)]
        found = walked(row, guesses)
        for count, mask in enumerate(found):
            replay = row_of(backend)
            assert not replay.take(said + guesses[:count]).wrong
            assert walked(replay, []) == ([] if replay.ended else [mask])
            assert replay.ended == (mask == [EOS])
        if len(found) <= len(guesses):
            assert guesses[len(found) - 1] not in found[-1]
        token = rng.choice([token for token in found[0] if token not in (EOS, ord("]"))])
        assert row.take([token]) == Taken(1)
        said.append(token)


def test_a_grammar_begins_right_behind_its_token_also_among_guesses(backend: GrammarBackend) -> None:
    row = row_of(backend, after=AFTER)
    free = list(range(EOS))
    found = walked(row, [65, AFTER, ord("["), 65])
    assert found[:2] == [free, free], "all but the end while it thinks"
    assert found[2:] == [[ord("[")], [*b"0123456789"]]
    assert row.take([65, AFTER]) == Taken(2)
    assert walked(row, []) == [[ord("[")]]


def test_a_guess_that_the_grammar_bars_is_refused_without_a_word(
    backend: GrammarBackend, capfd: pytest.CaptureFixture[str]
) -> None:
    row = row_of(backend)
    assert walked(row, [AFTER]) == [[ord("[")]], "the library warns of special tokens that it is offered"
    assert len(walked(row, [ord("["), ord("x"), AFTER])) == 2
    assert capfd.readouterr() == ("", "")


def test_a_complete_grammar_ends_at_the_token_that_completes_it(backend: GrammarBackend) -> None:
    row = row_of(backend)
    assert len(walked(row, list(b"[1]x"))) == 4, "behind the end nothing is masked"
    assert row.take(b"[1]xy") == Taken(3, ended=True)
    assert walked(row, [65]) == []


def test_a_stop_id_ends_it_only_where_it_can_end(backend: GrammarBackend) -> None:
    digits = Constraint("regex", "[0-9]+")
    row = row_of(backend, constraint=digits)
    assert EOS not in walked(row, [])[0]
    assert [EOS in mask for mask in walked(row, [ord("1"), EOS, 65])] == [False, True]
    assert row.take([ord("1"), EOS, 65]) == Taken(2, ended=True)
    assert row_of(backend, constraint=digits).take([EOS]) == Taken(1, ended=True, wrong=True)


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints") / "nano"
    write_checkpoint(directory, "nano", seed=5)
    return directory


def steps_of(nano: Path, rundir: Path, *, guesses: bool = True) -> Steps:
    """A worker on the random model."""
    return Steps(plan_for(nano, drafting=MTP) if guesses else plan_for(nano), rundir)


def stored(nano: Path, rundir: Path, constraint: Constraint) -> SamplingSpec:
    """Greedy sampling under a constraint whose compiled form is in its file."""
    model = plan_for(nano).model
    files = GrammarFiles(rundir)
    files.make()
    backend = open_backend("xgrammar", Vocabulary.read(nano, model.vocab_size, model.eos_token_ids))
    files.write(key_of(constraint), backend.compile(constraint), "test")
    return SamplingSpec(temperature=0.0, grammar=GrammarSpec(key_of(constraint), model.eos_token_ids))


def run_to_end(steps: Steps, row: int, drafts: int) -> tuple[list[int], str]:
    """New tokens up to the ending that the worker tells, and its fault."""
    known = len(steps.tokens[row])
    for _ in range(300):
        before = len(steps.tokens[row])
        result = steps.run({row: before - steps.computed[row]}, drafts)
        for ending in result.endings:
            return steps.tokens[row][known : before + ending.tokens], ending.fault
    raise AssertionError("it did not end")


def test_greedy_answers_are_the_same_with_and_without_guesses_and_after_a_retraction(
    nano: Path, tmp_path: Path
) -> None:
    schema = '{"type":"array","items":{"type":"string","maxLength":4},"minItems":3,"maxItems":3}'
    sampling = stored(nano, tmp_path, Constraint("json_schema", schema))
    prompt = random_ids(20, 1, 4096)
    answers = []
    for guesses in (False, True):
        steps = steps_of(nano, tmp_path, guesses=guesses)
        steps.add(0, prompt, sampling=sampling)
        answers.append(run_to_end(steps, 0, 3 if guesses else 0))
    assert answers[0] == answers[1]
    said, fault = answers[0]
    assert not fault
    again = steps_of(nano, tmp_path)
    again.add(1, prompt + said[:5], sampling=sampling, prompt_tokens=len(prompt))
    assert run_to_end(again, 1, 3) == (said[5:], "")


def test_a_row_that_no_token_can_follow_fails_alone(nano: Path, tmp_path: Path) -> None:
    sampling = stored(nano, tmp_path, Constraint("ebnf", 'root ::= "ab" [0-9]'))
    eos = plan_for(nano).model.eos_token_ids
    ids = {text: Vocabulary.read(nano, 4096, eos).tokens.index(text.encode()) for text in "0123456789"}
    barred = tuple((index, -np.inf) for index in ids.values())
    stuck = SamplingSpec(temperature=1.0, grammar=sampling.grammar, logit_bias=barred)
    steps = steps_of(nano, tmp_path, guesses=False)
    steps.add(0, random_ids(12, 2, 4096), sampling=sampling)
    steps.add(1, random_ids(12, 3, 4096), sampling=stuck)
    faults: dict[int, str] = {}
    while len(faults) < 2:
        running = [row for row in (0, 1) if row not in faults]
        counts = {row: len(steps.tokens[row]) - steps.computed[row] for row in running}
        result = steps.run(counts)
        faults |= {running[ending.at]: ending.fault for ending in result.endings}
    assert faults == {0: "", 1: "no token of the vocabulary can follow in its grammar here"}


def test_a_row_whose_grammar_is_gone_fails(nano: Path, tmp_path: Path) -> None:
    sampling = stored(nano, tmp_path, NUMBERS)
    GrammarFiles(tmp_path).remove(key_of(NUMBERS))
    steps = steps_of(nano, tmp_path, guesses=False)
    steps.add(0, random_ids(12, 2, 4096), sampling=sampling)
    [ending] = steps.run({0: 12}).endings
    assert "gone" in ending.fault
