"""One module for each `seqfair` command."""
