"""Commands of the command line that have no home of their own: their options, and what they run."""
