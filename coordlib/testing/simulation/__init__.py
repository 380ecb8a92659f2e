"""Whole clusters in one thread and in virtual time: production code on a simulated network, disk and clock."""
