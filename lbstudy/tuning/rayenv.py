"""Settings that Ray reads from the environment when it is imported; modules that need Ray import this one first.

Whatever the user has set stays, but for what nothing here would work with. Where Ray is there already (in its workers,
or in a user's own program), its authentication is decided and left alone.
"""

from __future__ import annotations

import os
import secrets
import sys
import tempfile

SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0 only Tune's old output engine is silent
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run` Ray would start every process with another `uv run`
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less per lane
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "86400",  # for its resources; how long a study waits, it says itself
    "TUNE_MAX_PENDING_TRIALS_PG": "10000",  # the search says how many trials there may be at a time
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files beside ours
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # Tune's snapshots are not used
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a failed trial has no value
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # lbstudy.console.interrupt has its own
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}

os.environ["RAY_TRAIN_V2_ENABLED"] = "1"  # lanes are Ray Train's second version; old job scripts switch it off
if not os.environ.get("RAY_ADDRESS", "set"):
    del os.environ["RAY_ADDRESS"]  # empty: unset, and not an address

if os.path.expanduser("~") == "~":  # a user whom the system does not know, as in containers: Ray wants a home
    os.environ["HOME"] = tempfile.gettempdir()

for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)

if "ray" not in sys.modules and not {"RAY_ADDRESS", "RAY_AUTH_MODE"} & set(os.environ):
    # Ray's servers listen on all network interfaces, and who reaches them can run code. A private Ray therefore asks
    # for a token that only this process and its children know.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
