"""Entry of the process that runs a server for another program: `python -m srt.launch.hosted RUNDIR`.

The program has the api's role and owns the directory, in which the plan and the board are ready. Its end of this
process's standard input is the leash: when it is closed, by purpose or because the program died, the server stops.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import msgspec
import setproctitle

from srt import __version__, log
from srt.configs.plan import RuntimePlan
from srt.heartbeat import process_name
from srt.launch import PLAN
from srt.launch.report import show_table
from srt.launch.start import CHILD_DEFAULTS
from srt.launch.supervisor import Supervisor

logger = logging.getLogger(__name__)


def main(rundir: Path) -> int:
    """Run the server until the leash is let go; returns the exit status."""
    plan = msgspec.msgpack.decode((rundir / PLAN).read_bytes(), type=RuntimePlan)
    name = process_name("launch")
    setproctitle.setproctitle(name)
    log.configure(name, plan.server.log_level, plan.server.log_format)
    environment = CHILD_DEFAULTS | dict(os.environ)  # handed down as it is; no setting is read from it
    supervisor = Supervisor(plan, rundir, environment, {}, owner=sys.stdin.buffer)
    if logger.isEnabledFor(logging.INFO):
        show_table(f"srt {__version__}", plan.table, plan.server.log_format)
    return supervisor.run(lambda: logger.info("%s is ready", plan.server.served_model_name or plan.server.model_path))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
