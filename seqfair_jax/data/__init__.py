"""From a log to a split `Dataset`: readers, ids, filter and split, groups, cache."""
