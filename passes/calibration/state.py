"""The name of the file by which finished results of calibration are recognized; `passes.calibration.work` writes it."""

STATE_NAME = "state.json"
