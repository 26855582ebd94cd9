"""Production requests: read, cleaned of duplicates and personal data, and a calibration set chosen from them."""

from compiler.requests.calibration_set import CalibrationSet, open_set, write_set
from compiler.requests.reader import Fields, RequestFile, read_requests
from compiler.requests.request import Request
from compiler.requests.selection import SelectOptions

__all__ = ["CalibrationSet", "Fields", "Request", "RequestFile", "SelectOptions", "open_set", "read_requests", "write_set"]
