"""Methods: one file per paper, composed from the other rooms."""
