"""Guessing ahead is used where it is faster, for each size of batch, and what is not used is tried again."""

from __future__ import annotations

import random

from srt.scheduler.depth import DepthControl

DRAFTS = 3


class Machine:
    """Steps of `rows` decodes whose time and luck are set by the test."""

    def __init__(self, seed: int = 0, hiccups: float = 0.0) -> None:
        self.hiccups = hiccups
        self.control = DepthControl(DRAFTS)
        self.rng = random.Random(seed)
        self.guessed = self.steps = 0
        self.spent_us = self.tokens = 0

    def run(self, rows: int, steps: int, tokens_a_row: float, plain_us: int, checking_us: int, guess_us: int) -> float:
        """So many steps; returns tokens a microsecond."""
        tokens = spent = 0
        for _ in range(steps):
            depth, guesses = self.control.depth(rows), self.control.guesses(rows)
            made = guess_us if guesses else 0
            elapsed = (checking_us if depth else plain_us) + made
            if self.rng.random() < self.hiccups:
                elapsed *= 60
            got = sum(1 + (self.rng.random() < tokens_a_row - 1) * DRAFTS for _ in range(rows)) if depth else rows
            self.control.observe(rows, depth * rows, got, elapsed, made)
            tokens, spent = tokens + got, spent + elapsed
            self.guessed += depth > 0
            self.steps += 1
        return tokens / spent


def test_where_guesses_are_right_nearly_all_steps_check_them() -> None:
    machine = Machine()
    rate = machine.run(1, 2000, tokens_a_row=2.0, plain_us=100, checking_us=120, guess_us=30)
    assert machine.guessed > 0.95 * machine.steps
    assert rate > 1.3 / 100


def test_where_guesses_are_wrong_hardly_any_time_goes_into_them() -> None:
    machine = Machine()
    machine.run(4, 500, tokens_a_row=1.0, plain_us=100, checking_us=140, guess_us=40)
    rate = machine.run(4, 20_000, tokens_a_row=1.0, plain_us=100, checking_us=140, guess_us=40)
    assert rate > 0.99 * 4 / 100


def test_a_machine_that_is_held_up_now_and_then_does_not_change_the_verdict() -> None:
    machine = Machine(hiccups=0.01)
    machine.run(1, 4000, tokens_a_row=2.0, plain_us=100, checking_us=120, guess_us=30)
    assert machine.guessed > 0.95 * machine.steps


def test_large_batches_are_judged_for_themselves() -> None:
    machine = Machine()
    for _ in range(20):
        machine.run(1, 50, tokens_a_row=2.0, plain_us=100, checking_us=110, guess_us=20)
        machine.run(32, 50, tokens_a_row=2.0, plain_us=100, checking_us=400, guess_us=50)
    assert machine.control.depth(1) == DRAFTS
    assert machine.control.depth(32) == 0


def test_a_drafter_that_becomes_good_is_used_again() -> None:
    machine = Machine()
    machine.run(2, 2000, tokens_a_row=1.0, plain_us=100, checking_us=140, guess_us=40)
    assert machine.control.depth(2) == 0
    machine.run(2, 10_000, tokens_a_row=3.0, plain_us=100, checking_us=140, guess_us=40)
    assert machine.control.depth(2) == DRAFTS


def test_a_drafter_that_is_never_right_is_shown_no_prompts_until_it_is_right() -> None:
    machine = Machine()
    shown = [machine.control.reads_prompts]
    machine.run(8, 2000, tokens_a_row=1.0, plain_us=100, checking_us=140, guess_us=40)
    shown.append(machine.control.reads_prompts)
    machine.run(8, 20_000, tokens_a_row=2.0, plain_us=100, checking_us=140, guess_us=40)
    shown.append(machine.control.reads_prompts)
    assert shown == [True, False, True]


def test_a_drafter_that_is_right_but_does_not_pay_is_shown_prompts() -> None:
    machine = Machine()
    machine.run(32, 5000, tokens_a_row=1.3, plain_us=100, checking_us=400, guess_us=50)
    assert machine.control.depth(32) == 0
    assert machine.control.reads_prompts


def test_without_a_drafter_nothing_is_guessed() -> None:
    control = DepthControl(0)
    control.observe(1, 0, 1, 10, 0)
    assert control.depth(1) == 0
    assert not control.guesses(1)
