"""The paper: its settings, tables, claims and published figures."""
