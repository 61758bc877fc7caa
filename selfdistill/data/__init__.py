"""Data: files and hub datasets of several formats become rows of one shape."""

from selfdistill.data.loading import DataSplits, load_data

__all__ = ["DataSplits", "load_data"]
