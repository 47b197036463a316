"""The course's hospitals and server on Flower (flower.ai): simulated, or each on a machine of its own.

`client_app` answers the server's questions with the functions of `fedssg_helpers.client`, `server_app` asks them with
`fedssg_helpers.server`, `task` says what travels and what a hospital keeps, and `deploy` starts all of it.
"""

import os

# Before Flower is imported: it and Ray report their use to nobody, look for no newer version, and Ray's processes get
# the processor like any other (by default they stand back, and starve on a busy machine).
SETTINGS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",
}
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)

try:
    import flwr.app  # noqa: F401
except ImportError as error:
    cure = "it is an extra, and only lesson 07 uses it. In the project's folder: pip install -e '.[flower]'"
    raise ImportError(f"Flower is not installed; {cure}") from error
