"""Finished runs, read and shown: text tables and the HTML report."""
