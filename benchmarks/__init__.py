"""The benchmark harness: paired measurements of every op against its peers."""
