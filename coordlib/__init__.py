"""coordlib: locks and replicated state for Python services, over Raft, with nothing to install beside the app."""

__version__ = "0.1.0"
