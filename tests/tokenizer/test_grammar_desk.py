"""Grammars from the arrival of a constraint to the last request that obeys it."""

from __future__ import annotations

from pathlib import Path

import pytest

from srt.errors import ErrorCode
from srt.grammar.errors import GrammarError
from srt.grammar.shelf import GrammarFiles, key_of
from srt.messages import Constraint, GrammarLoaded, GrammarRefused, GrammarStored, PrepareGrammar
from srt.tokenizer import grammar_desk
from srt.tokenizer.grammar_desk import CompilingDesk

WORDS = Constraint("regex", "[a-z]+", field="regex")
DIGITS = Constraint("regex", "[0-9]+", field="regex")


class Pool:
    """Remembers what is to be compiled."""

    def __init__(self) -> None:
        self.wanted: list[bytes] = []

    def submit(self, key: bytes, constraint: Constraint) -> None:
        self.wanted.append(key)

    def close(self) -> None:
        """Nothing runs."""


class Worker:
    """Remembers what is to be loaded."""

    def __init__(self) -> None:
        self.told: list[bytes] = []

    def send(self, message: PrepareGrammar) -> None:
        self.told.append(message.key)

    def close(self) -> None:
        """Nothing is open."""


class Site:
    """A desk with two workers."""

    def __init__(self, rundir: Path) -> None:
        self.pool, self.workers, self.files = Pool(), [Worker(), Worker()], GrammarFiles(rundir)
        self.files.make()
        self.desk = CompilingDesk(self.pool, self.workers, self.files)

    def store(self, constraint: Constraint, size: int = 100) -> bytes:
        """A grammar process has compiled it."""
        key = key_of(constraint)
        self.files.write(key, b"grammar", "test")
        self.desk.hear(GrammarStored(key, size, 0.1))
        return key

    def make(self, constraint: Constraint, size: int = 100) -> bytes:
        """And every worker has loaded it."""
        key = self.store(constraint, size)
        for rank in (0, 1):
            self.desk.hear(GrammarLoaded(key, rank))
        return key

    def there(self, key: bytes) -> bool:
        """Whether its file is there."""
        try:
            return self.files.read(key) == b"grammar"
        except GrammarError:
            return False


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_a_request_goes_on_when_every_worker_has_its_grammar(site: Site) -> None:
    site.desk.begin("a", WORDS)
    site.desk.begin("b", WORDS)
    assert site.pool.wanted == [key_of(WORDS)], "one compilation for both"
    key = site.store(WORDS)
    assert [worker.told for worker in site.workers] == [[key], [key]]
    site.desk.hear(GrammarLoaded(key, 1))
    assert site.desk.take() == ([], [])
    site.desk.hear(GrammarLoaded(key, 0))
    assert site.desk.take() == ([("a", key), ("b", key)], [])
    site.desk.begin("c", WORDS)
    assert site.desk.take() == ([("c", key)], [])
    assert len(site.pool.wanted) == 1


def test_where_a_constraint_begins_and_what_it_is_called_make_no_other_grammar() -> None:
    assert key_of(WORDS) == key_of(Constraint("regex", "[a-z]+", after_token=5, after_thinking=True))
    assert key_of(WORDS) != key_of(DIGITS)
    assert key_of(Constraint("json_schema", "{}")) != key_of(Constraint("json_schema", "{}", strict=False))


def test_refusals_are_remembered_and_told_with_the_field(site: Site) -> None:
    site.desk.begin("a", WORDS)
    site.desk.hear(GrammarRefused(key_of(WORDS), "it is evil"))
    site.desk.begin("b", WORDS)
    ready, failed = site.desk.take()
    assert not ready
    assert [(owner, error.text, error.param) for owner, error in failed] == [
        ("a", "'regex' cannot be obeyed: it is evil", "regex"), ("b", "'regex' cannot be obeyed: it is evil", "regex"),
    ]  # fmt: skip
    assert len(site.pool.wanted) == 1


def test_a_grammar_that_one_worker_cannot_load_is_an_error_of_the_server(site: Site) -> None:
    site.desk.begin("a", WORDS)
    key = site.store(WORDS)
    site.desk.hear(GrammarLoaded(key, 0, "it is broken"))
    site.desk.hear(GrammarLoaded(key, 1))
    _, [(owner, error)] = site.desk.take()
    assert (owner, error.code, "it is broken" in error.text) == ("a", ErrorCode.INTERNAL, True)
    assert not site.there(key)
    site.desk.begin("b", WORDS)
    assert site.desk.take() == ([], []), "the next request tries again"


def test_who_leaves_before_its_grammar_is_ready_is_not_told(site: Site) -> None:
    site.desk.begin("a", WORDS)
    site.desk.begin("b", WORDS)
    site.desk.release("a")
    key = site.make(WORDS)
    assert site.desk.take() == ([("b", key)], [])


def test_files_that_somebody_needs_stay_and_the_oldest_others_go(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_desk, "FILES_BYTES", 250)
    keys = []
    for owner, constraint in (("a", WORDS), ("b", DIGITS)):
        site.desk.begin(owner, constraint)
        keys.append(site.make(constraint))
    site.desk.release("b")
    third = Constraint("regex", "x")
    site.desk.begin("c", third)
    keys.append(site.make(third))
    assert [site.there(key) for key in keys] == [True, False, True]
    site.desk.begin("d", DIGITS)
    assert site.pool.wanted.count(key_of(DIGITS)) == 2
