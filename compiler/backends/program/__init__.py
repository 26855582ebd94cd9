"""The shared part of backends that emit programs: lowering to kernel calls, and the memory plan."""
