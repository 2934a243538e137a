"""From weights and rows to one vector per figure: models whole or layer by layer, one head, one comparison."""
