"""What backends that emit programs share: lowering to kernel calls, and the memory plan."""
