"""Profiles concern the workers: questions go through the scheduler, answers of all ranks come back as one."""

from __future__ import annotations

from srt.messages import Done, Profiled


class ProfileCalls:
    """Calls that wait for every rank."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._answers: dict[int, list[Profiled]] = {}

    def take(self, answer: Profiled) -> Done | None:
        """The answer of one rank; returns the answer of all when it is the last."""
        answers = self._answers.setdefault(answer.call, [])
        answers.append(answer)
        if len(answers) < self._ranks:
            return None
        del self._answers[answer.call]
        wrong = [each for each in answers if not each.ok]
        told = sorted(wrong or answers, key=lambda each: each.rank)
        return Done(answer.call, ok=not wrong, text="\n".join(dict.fromkeys(each.text for each in told)))
