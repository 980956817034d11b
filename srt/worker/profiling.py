"""A trace of a worker's steps, taken by torch's profiler when an operator asks for it, and written to a file."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from srt.messages import Profiled, StartProfile, StopProfile

log = logging.getLogger(__name__)


class Profiler:
    """At most one recording at a time; it ends when it is told to, or after the steps it was asked for."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._running: profile | None = None
        self._file = Path()
        self._steps_left = 0

    def start(self, asked: StartProfile) -> Profiled:
        """Record from the next step on."""
        if self._running is not None:
            return Profiled(asked.call, self._rank, ok=False, text="a profile is being taken already")
        activities = [ProfilerActivity.CPU] if asked.cpu else []
        if asked.device and torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        if not activities:
            return Profiled(asked.call, self._rank, ok=False, text="there is no such activity on this device")
        self._file = Path(asked.directory) / f"{asked.name}-TP-{self._rank}.trace.json.gz"
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._running = profile(
                activities=activities, with_stack=asked.with_stack, record_shapes=asked.record_shapes
            )
            self._running.start()
        except (OSError, RuntimeError) as error:
            self._running = None
            return Profiled(asked.call, self._rank, ok=False, text=str(error))
        self._steps_left = asked.steps
        return Profiled(asked.call, self._rank, ok=True, text=str(self._file))

    def steps_ended(self, count: int) -> None:
        """Count steps; the last one that was asked for ends the recording."""
        if self._running is None or not self._steps_left:
            return
        self._steps_left = max(0, self._steps_left - count)
        if not self._steps_left:
            log.info("profile: %s", self._write())

    def stop(self, asked: StopProfile) -> Profiled:
        """End the recording and write it."""
        if self._running is None:
            return Profiled(asked.call, self._rank, ok=False, text="no profile is being taken")
        failure = self._write()
        return Profiled(asked.call, self._rank, ok=not failure, text=failure or str(self._file))

    def _write(self) -> str:
        """Write the trace. Returns why it could not be; a full disk must not end the server."""
        assert self._running is not None
        recording, self._running = self._running, None
        try:
            recording.stop()
            recording.export_chrome_trace(str(self._file))
        except (OSError, RuntimeError) as error:
            return f"{self._file}: {error}"
        return ""
