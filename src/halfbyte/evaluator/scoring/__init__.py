"""From weights and rows to one vector per figure: one head, one comparison, whichever way the layers ran."""
