"""How a start went: what each process did when, and what it holds beside what was planned."""

from __future__ import annotations

from typing import Final

from srt.configs.plan import Choice, RuntimePlan
from srt.configs.startup_table import human
from srt.heartbeat import process_name
from srt.messages import Ready

PLANNED: Final = "plan"
REST: Final = "ready"
"""Phase from the last one that a process spoke of until launch heard that it is ready."""
BAR: Final = 32
"""Characters of the longest bar."""
TOLERANCE: Final = 0.03
"""A measured part further from the plan than this is marked."""


class StartReport:
    """Collects what the processes say while they start. Times are of the machine's monotonic clock, in seconds.

    `begun_s`: when the command began; `spawned_s`: when the plan was ready and the processes were started.
    """

    def __init__(self, plan: RuntimePlan, begun_s: float, spawned_s: float) -> None:
        self._plan, self._begun_s, self._spawned_s = plan, begun_s, spawned_s
        self._ends: dict[str, list[tuple[str, float]]] = {}
        self._facts: list[Choice] = []
        self._memory: dict[str, int] = {}

    def phase(self, process: str, name: str, at_s: float) -> None:
        """A phase of a process is over."""
        self._ends.setdefault(process, []).append((name, at_s))

    def ready(self, message: Ready, at_s: float) -> None:
        """A process can work."""
        process = process_name(message.role, message.rank)
        self.phase(process, REST, at_s)
        facts = [f"{name}: {value}" for name, value in message.facts.items()] or ["ready"]
        after = f"{at_s - self._spawned_s:.2f} s"
        self._facts += [Choice("" if at else process, "" if at else after, fact) for at, fact in enumerate(facts)]
        for part, size in message.memory.items():
            self._memory[part] = self._memory.get(part, 0) + size

    def tables(self) -> list[tuple[str, list[Choice]]]:
        """All that there is to show, with titles."""
        tables = [("ready after", self.facts()), ("memory, measured", self.memory()), ("start-up", self.waterfall())]
        return [(title, rows) for title, rows in tables if rows]

    def facts(self) -> list[Choice]:
        """What the processes said of themselves, each after how long."""
        return self._facts

    def memory(self) -> list[Choice]:
        """Planned and measured bytes of each part, over all ranks."""
        rows = []
        for part, size in self._memory.items():
            planned = self._plan.memory.get(part, 0)
            off = size / planned - 1 if planned else 0.0
            told = f"planned {human(planned)}, {off:+.1%}" if planned else "not planned"
            rows.append(Choice(part, human(size), told + ("  <-- off" if abs(off) > TOLERANCE else "")))
        return rows

    def waterfall(self) -> list[Choice]:
        """Each process' phases as bars over the time since the command began; short ones are left out."""
        total = max((end for ends in self._ends.values() for _, end in ends), default=self._spawned_s) - self._begun_s
        rows = [self._bar("launch", PLANNED, self._begun_s, self._spawned_s, total)]
        for process, ends in self._ends.items():
            begin = self._spawned_s
            for name, end in ends:
                if end - begin >= total / (2 * BAR):
                    rows.append(self._bar(process, name, begin, end, total))
                begin = end
        return rows

    def phases(self) -> dict[str, float]:
        """Seconds of each phase of the worker that was ready last, and of the plan before them."""
        slowest = process_name("worker", 0)
        for process, ends in self._ends.items():
            if process.startswith("srt:worker") and ends[-1][1] > self._ends.get(slowest, ends)[-1][1]:
                slowest = process
        seconds, begin = {PLANNED: self._spawned_s - self._begun_s}, self._spawned_s
        for name, end in self._ends.get(slowest, []):
            seconds[name], begin = end - begin, end
        return seconds

    def _bar(self, process: str, name: str, begin_s: float, end_s: float, total_s: float) -> Choice:
        scale = BAR / total_s if total_s > 0 else 0.0
        before = round((begin_s - self._begun_s) * scale)
        width = max(1, round((end_s - self._begun_s) * scale) - before)
        bar = (" " * before + "#" * width).ljust(BAR)
        return Choice(f"{process} {name}", f"{end_s - begin_s:.2f} s", f"|{bar}|")
