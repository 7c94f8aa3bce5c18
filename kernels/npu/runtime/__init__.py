"""Runs programs on an NPU through pyxrt, the XDNA way; an emulator may stand in pyxrt's place."""
