"""A supervisor in a process of its own, with stand-ins for the roles: `python -m tests.launch.supervised OPTIONS`."""

from __future__ import annotations

import os
import shutil
import sys

from srt import log
from srt.configs.arguments import parse_launch
from srt.configs.resolve import resolve
from srt.launch.rundir import make_rundir, write_plan
from srt.launch.supervisor import Supervisor
from tests.support.resolved import DEVICE, MODEL

if __name__ == "__main__":
    server = parse_launch(["--model-path", "checkpoint", *sys.argv[1:]]).server
    plan = resolve(server, MODEL, DEVICE)
    log.configure("srt:launch")
    rundir = make_rundir()
    print(rundir, flush=True)
    write_plan(rundir, plan)
    try:
        secrets = {"SRT_API_KEY": "open sesame", "SRT_ADMIN_API_KEY": "root sesame"}
        supervisor = Supervisor(plan, rundir, dict(os.environ), secrets, entry="tests.launch.stand_in")
        status = supervisor.run(lambda: print("ready", flush=True))
    finally:
        shutil.rmtree(rundir)
    sys.exit(status)
