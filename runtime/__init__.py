"""Runs bundles. Knows nothing about how they are made."""

import os

# ONNX Runtime 1.31 leaves a device id and a record of its sessions in the user's cache otherwise,
# and can send them. It reads this when it is imported; `disable_telemetry_events` comes too late.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
