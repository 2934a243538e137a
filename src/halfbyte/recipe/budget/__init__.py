"""A budget of bytes: which modules get finer blocks, or stay as they are, so that the measured loss is smallest."""
