"""``qtrain range-test``: the lowest width at which a config trains, by a short run through the widths."""
