"""Select a calibration set from production requests, without duplicates and personal data."""

from belle_compile.compiler.requests.calibration_set import CalibrationSet, open_set, write_set
from belle_compile.compiler.requests.reader import Fields, RequestFile, read_requests
from belle_compile.compiler.requests.request import Request
from belle_compile.compiler.requests.selection import SelectOptions

__all__ = ["CalibrationSet", "Fields", "Request", "RequestFile", "SelectOptions", "open_set", "read_requests", "write_set"]
