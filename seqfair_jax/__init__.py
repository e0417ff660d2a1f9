"""Train and judge sequential recommenders that serve every user group well."""

__version__ = "0.2.0"
