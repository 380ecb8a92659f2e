"""Measurements of coordlib against the limits of the machine it runs on. Nothing here is imported by the library."""
