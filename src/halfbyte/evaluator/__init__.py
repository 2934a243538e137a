"""What was lost: one harness for every candidate, paired statistics, honest intervals."""
