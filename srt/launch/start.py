"""From a parsed command line to a running server and back to an exit status."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec
import setproctitle

from srt import __version__, log
from srt.api.tls import tls_context
from srt.configs.arguments import Launch
from srt.configs.device import read_device
from srt.configs.drafting import draft_model_path
from srt.configs.models import checkpoint_directory, read_facts
from srt.configs.plan import RuntimePlan
from srt.configs.resolve import resolve
from srt.configs.server import ServerConfig
from srt.heartbeat import process_name
from srt.launch.report import show_table, url
from srt.launch.rundir import private_directory, reserve_port, write_plan
from srt.launch.supervisor import Supervisor

API_KEY: Final = "SRT_API_KEY"
ADMIN_API_KEY: Final = "SRT_ADMIN_API_KEY"

logger = logging.getLogger(__name__)


def make_plan(server: ServerConfig) -> RuntimePlan:
    """Read checkpoint and machine, and resolve. Raises: StartupError."""
    device = read_device(server.device, server.tp_size)
    directory = checkpoint_directory(server.model_path)
    drafts = draft_model_path(server)
    facts = read_facts(
        directory,
        with_weights=server.load_format != "dummy",
        draft_directory=None if drafts is None else Path(drafts),
    )
    return resolve(server, facts, device, fresh_seed=secrets.randbits(31))


CHILD_DEFAULTS: Final = {"OMP_WAIT_POLICY": "passive"}
"""Environment that children get unless the user set it. Idle kernel threads sleep instead of spinning: the processes of
a server share their cores, and a spinning thread keeps the core from the very process that it waits for (32 tokens of a
small model on two busy cores: 0.04 s asleep, 1 s spinning)."""


def launch(request: Launch, environment: Mapping[str, str], entry: str = "srt.launch.child") -> int:
    """Run a server until it is told to stop; returns the exit status.

    `environment` is that of this process; the two API keys reach the api process alone. `entry` is the module that
    children run. Raises: StartupError before anything was started.
    """
    begun = time.monotonic()
    setproctitle.setproctitle(process_name("launch"))  # hides keys given as arguments, too
    log.configure(process_name("launch"), request.server.log_level, request.server.log_format)
    tls_context(request.server)  # the api process makes its own; what is wrong with it is said before anything starts
    for notice in request.notices:
        logger.warning(notice)
    keys = {API_KEY: request.api_key, ADMIN_API_KEY: request.admin_api_key}
    open_environment = CHILD_DEFAULTS | {name: value for name, value in environment.items() if name not in keys}
    given_keys = {name: value for name, value in keys.items() if value is not None}
    with reserve_port(request.server.host, request.server.port) as reserved, private_directory() as rundir:
        server = msgspec.structs.replace(request.server, port=reserved.getsockname()[1])
        plan = make_plan(server)

        def when_ready() -> None:
            reserved.close()
            name = server.served_model_name or server.model_path
            logger.info("%s is served at %s, ready after %.2f s", name, url(plan), time.monotonic() - begun)

        write_plan(rundir, plan)
        supervisor = Supervisor(plan, rundir, open_environment, given_keys, entry, begun_s=begun)
        show_table(f"srt {__version__}", plan.table, server.log_format)
        return supervisor.run(when_ready)
